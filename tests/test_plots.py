"""Figures: pixels where they belong, and no warning on the way (warnings are errors here)."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from gae_core import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def images(n, channels=1, height=2, width=3):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def drawn(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns"), [(6, 3), (6, 2), (6, 6), (6, 1), (1, 1)])
def test_tile_puts_every_pixel_in_its_place(n, columns, channels):
    x = images(n, channels)
    picture = plots.tile(x, columns)
    assert picture.shape == (n // columns * 2, columns * 3, channels)
    for i in range(n):
        for c in range(channels):
            for h in range(2):
                for w in range(3):
                    assert picture[i // columns * 2 + h, i % columns * 3 + w, c] == x[i, c, h, w]


def test_tile_turns_bytes_into_the_unit_interval_and_takes_what_carries_a_gradient():
    assert plots.tile(torch.full((2, 1, 2, 2), 255, dtype=torch.uint8), 2).unique().tolist() == [1.0]
    assert not plots.tile(images(2).requires_grad_(), 2).requires_grad


@pytest.mark.parametrize("columns", [0, -1, 4, 7])
def test_tile_rejects_columns_that_do_not_divide(columns):
    with pytest.raises(ValueError, match=rf"columns must divide the number of images, got columns={columns} for 6"):
        plots.tile(images(6), columns)


def test_pictures_of_nothing_and_without_channels_are_named():
    with pytest.raises(ValueError, match=r"images must be \(n, channels, height, width\), got \(6, 2, 3\)"):
        plots.tile(images(6)[:, 0], 3)
    with pytest.raises(ValueError, match="panels must be at least one, got none"):
        plots.image_panels({}, columns=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_drawn_with_a_fixed_range_and_without_axes(channels, ax):
    x = 0.25 + 0.5 * images(4, channels)  # a range of its own must not stretch the grey values
    plots.draw_images(ax, x, columns=2, title="four")
    drawn(ax.figure)
    (picture,) = ax.images
    assert ax.get_title() == "four" and not ax.axison
    assert picture.get_clim() == (0, 1)
    np.testing.assert_allclose(np.squeeze(picture.get_array()), plots.tile(x, 2).squeeze(), atol=1e-6)


@pytest.mark.parametrize(("panels", "per_row", "shape"), [(1, 4, (1, 1)), (3, 4, (1, 3)), (5, 2, (3, 2))])
def test_panels_are_laid_out_row_by_row_each_under_its_title(panels, per_row, shape):
    contents = {f"panel {i}": torch.full((4, 1, 2, 2), i / 10) for i in range(panels)}
    figure = plots.image_panels(contents, columns=2, per_row=per_row)
    drawn(figure)
    assert len(figure.axes) == shape[0] * shape[1]
    assert [ax.get_title() for ax in figure.axes][:panels] == list(contents)
    for i, ax in enumerate(figure.axes):
        assert len(ax.images) == (i < panels) and not ax.axison
        if ax.images:
            np.testing.assert_allclose(ax.images[0].get_array(), i / 10, atol=1e-6)
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape


def test_codes_are_drawn_at_their_first_two_coordinates(ax):
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plots.draw_codes(ax, z, title="codes")
    drawn(ax.figure)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), z[:, :2].detach(), atol=1e-6)
    assert ax.get_title() == "codes" and ax.get_aspect() == 1


def test_codes_of_one_class_have_one_colour_and_those_of_others_another(ax):
    y = torch.tensor([0, 1, 2, 0, 1, 9])
    plots.draw_codes(ax, torch.zeros(6, 2), y, limit=3)
    drawn(ax.figure)
    colours = [tuple(c) for c in ax.collections[0].get_facecolors()]
    assert colours[0] == colours[3] and colours[1] == colours[4] and len(set(colours)) == 4
    assert colours[0][:3] == pytest.approx(to_rgba("tab:blue")[:3], abs=1e-6)
    assert ax.get_xlim() == ax.get_ylim() == (-3, 3)
