"""Small networks that the models are built from: the smallest ones that show what a chapter is about."""

import itertools
import math
from collections.abc import Sequence

from torch import nn


def mlp(sizes: Sequence[int], *, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of the given widths with activations between them (none after the last).

    Args:
        sizes: widths from input to output, at least two.
        activation: class of the activations, called without arguments.

    Raises:
        ValueError: if there are fewer than two sizes, or one is below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {list(sizes)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def mlp_pair(
    shape: Sequence[int],
    dim: int,
    *,
    hidden: Sequence[int] = (512, 256),
    heads: int = 1,
    output: type[nn.Module] = nn.Sigmoid,
) -> tuple[nn.Module, nn.Module]:
    """Encoder from images of a shape to codes (batch, dim), and the mirrored decoder back to images in [0, 1].

    Args:
        shape: shape of one image, (channels, height, width).
        dim: dimension of the code.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        heads: vectors of length dim that the encoder gives side by side, (batch, heads * dim): 2 for mu and logvar.
        output: class of the decoder's last layer; ``nn.Identity`` gives logits instead of images.
    """
    pixels = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), mlp([pixels, *hidden, heads * dim]))
    decoder = nn.Sequential(mlp([dim, *reversed(hidden), pixels]), output(), nn.Unflatten(1, tuple(shape)))
    return encoder, decoder


def conv_pair(
    shape: Sequence[int], dim: int, *, channels: int = 32, heads: int = 1, output: type[nn.Module] = nn.Sigmoid
) -> tuple[nn.Module, nn.Module]:
    """Convolutional encoder and decoder, halving the image twice, for sides that four divides.

    Args:
        shape: shape of one image, (channels, height, width), height and width divisible by 4.
        dim: dimension of the code.
        channels: width of the first layer; the second has twice as many.
        heads: as in :func:`mlp_pair`.
        output: as in :func:`mlp_pair`.

    Raises:
        ValueError: if a side is not divisible by 4.
    """
    colours, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"shape must have height and width divisible by 4, got {tuple(shape)}; pad the images")
    small = (2 * channels, height // 4, width // 4)
    encoder = nn.Sequential(
        nn.Conv2d(colours, channels, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        mlp([math.prod(small), 256, heads * dim]),
    )
    decoder = nn.Sequential(
        mlp([dim, 256, math.prod(small)]),
        nn.ReLU(),
        nn.Unflatten(1, small),
        nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, colours, 4, stride=2, padding=1),
        output(),
    )
    return encoder, decoder
