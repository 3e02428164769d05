"""The few figures that several chapters draw."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gae_core.data import to_unit


def tile(images: Tensor, columns: int) -> Tensor:
    """Lay images (n, channels, height, width) out row by row as one (height, width, channels) picture.

    Raises:
        ValueError: for another shape, or if n is not a multiple of ``columns``.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (n, channels, height, width), got {tuple(images.shape)}: x.unsqueeze(1)?")
    n, channels, height, width = images.shape
    if columns < 1 or n % columns:
        raise ValueError(f"columns must divide the number of images, got columns={columns} for {n} images")
    rows = to_unit(images.detach().cpu()).reshape(n // columns, columns, channels, height, width)
    return rows.permute(0, 3, 1, 4, 2).reshape(n // columns * height, columns * width, channels)


def draw_images(ax: Axes, images: Tensor, *, columns: int, title: str = "") -> None:
    """Draw images (n, channels, height, width) with values in [0, 1] as a grid into one axes."""
    ax.imshow(tile(images, columns).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def image_panels(panels: dict[str, Tensor], *, columns: int, per_row: int = 4, size: float = 2.4) -> Figure:
    """Grids of images side by side, each under its title.

    Args:
        panels: title -> images (n, channels, height, width); n a multiple of ``columns``.
        columns: images in a row of one grid.
        per_row: grids side by side.
        size: width of a grid in inches.

    Raises:
        ValueError: if there are no panels, and as :func:`tile`.
    """
    if not panels:
        raise ValueError("panels must be at least one, got none")
    per_row = min(per_row, len(panels))
    lines = -(-len(panels) // per_row)
    first = next(iter(panels.values()))
    aspect = (len(first) // columns * first.shape[2]) / (columns * first.shape[3])
    figure, axes = plt.subplots(
        lines, per_row, figsize=(size * per_row, (size * aspect + 0.3) * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, images) in zip(axes.flat, panels.items(), strict=False):
        draw_images(ax, images, columns=columns, title=title)
    return figure


def draw_codes(ax: Axes, z: Tensor, y: Tensor | None = None, *, title: str = "", limit: float | None = None) -> None:
    """Scatter the first two coordinates of codes (n, d), coloured by class y (n,)."""
    z = z.detach().cpu()
    colours = {} if y is None else {"c": y.cpu(), "cmap": "tab10"}
    ax.scatter(z[:, 0], z[:, 1], s=3, alpha=0.5, linewidths=0, rasterized=True, **colours)
    if limit is not None:
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    ax.set_aspect("equal")
    ax.set_title(title, fontsize=10)
