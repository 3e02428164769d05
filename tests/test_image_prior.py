"""The deep image prior: its network, its loss and averages, and that finite time is what it denoises by."""

import math

import pytest
import torch

from gae_core import train
from gae_core.models.image_prior import Hourglass, ImagePrior, psnr


def prior(shape=(1, 16, 16), **options):
    torch.manual_seed(0)
    net = Hourglass(2, shape[0], widths=(4, 8), skips=(0, 2))
    z = 0.1 * torch.rand(1, 2, *shape[1:], generator=torch.Generator().manual_seed(1))
    return ImagePrior(net, z, **options)


@pytest.mark.parametrize(("widths", "skips"), [((4,), (0,)), ((4, 8), (0, 2)), ((3, 5, 7), (2, 0, 3))])
def test_the_network_gives_an_image_of_the_size_of_its_input(widths, skips):
    net = Hourglass(2, 3, widths=widths, skips=skips)
    image = net(torch.rand(1, 2, 16, 24))
    assert image.shape == (1, 3, 16, 24) and 0 < image.min() and image.max() < 1
    bypass = sum(any(p.requires_grad for p in m.parameters()) for m in net.skip)
    assert bypass == sum(s > 0 for s in skips)


def test_bad_shapes_and_numbers_are_named():
    with pytest.raises(ValueError, match="as long as each other"):
        Hourglass(2, 1, widths=(4, 8), skips=(0,))
    with pytest.raises(ValueError, match="sides divisible by 4"):
        Hourglass(2, 1, widths=(4, 8), skips=(0, 0))(torch.rand(1, 2, 10, 16))
    for options in ({"average": 1.0}, {"input_noise": -1.0}):
        with pytest.raises(ValueError, match="average must be in"):
            prior(**options)
    with pytest.raises(ValueError, match="must have the shape of x"):
        prior().loss(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="must have the shape of clean"):
        psnr(torch.zeros(3), torch.zeros(4))


def test_psnr_of_a_known_error():
    assert psnr(torch.full((5,), 0.6), torch.full((5,), 0.5)) == pytest.approx(20, abs=1e-4)


def test_the_loss_is_the_squared_error_of_what_is_seen_and_the_average_runs():
    mask = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    model, x = prior(degrade=lambda image: mask * image, average=0.9), torch.rand(1, 1, 16, 16)
    losses, outputs = [], []
    for seed in range(3):
        losses.append(model.loss(x, generator=torch.Generator().manual_seed(seed)).total)
        outputs.append(model.output)
    for loss, output in zip(losses, outputs, strict=True):
        torch.testing.assert_close(loss[0], (mask * output - x).square().sum())
    expected = 0.9 * (0.9 * outputs[0] + 0.1 * outputs[1]) + 0.1 * outputs[2]
    torch.testing.assert_close(model.averaged, expected)
    assert (outputs[0] - outputs[1]).abs().max() > 0  # the input's noise is drawn anew


def test_it_learns_the_image_before_the_noise():
    across = torch.linspace(0, 3 * math.pi, 32)
    clean = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    noisy = clean + 0.15 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    model, curve = prior((1, 32, 32)), []
    fit = {"epochs": 700, "batch_size": 1, "lr": 0.02, "device": "cpu", "progress": False}
    train.fit(
        model, noisy, callback=lambda m, step: curve.append((psnr(m.output, clean), psnr(m.output, noisy))), **fit
    )
    to_clean, to_noisy = zip(*curve, strict=True)
    best = max(to_clean)
    assert best > psnr(noisy, clean) + 3  # it denoises
    assert to_noisy[-1] > to_noisy[100] + 0.5  # and goes on towards the noise
    assert psnr(model.averaged, clean) > to_clean[-1]
