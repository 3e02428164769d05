"""The deep image prior: one image, and the weights of a network as its code. Derived in the chapter *Image priors*."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


class Hourglass(nn.Module):
    """Convolutional network that halves and doubles an image as often as it has widths, with skip connections.

    Args:
        inputs: channels of the input.
        outputs: channels of the image.
        widths: channels at each scale, from fine to coarse.
        skips: channels that pass by each scale; 0 for none.

    Raises:
        ValueError: if there is no scale, or ``skips`` is not as long as ``widths``; when used, if a side of the input
            is not divisible by 2 to the number of scales.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        widths: Sequence[int] = (8, 16, 32, 64, 128),
        skips: Sequence[int] = (0, 0, 0, 4, 4),
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(skips):
            raise ValueError(f"widths and skips must be as long as each other, got {list(widths)} and {list(skips)}")
        self.scales = len(widths)
        self.down, self.skip, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        fan_in = inputs
        for scale, (width, skip) in enumerate(zip(widths, skips, strict=True)):
            self.down.append(nn.Sequential(_layer(fan_in, width, stride=2), _layer(width, width)))
            self.skip.append(_layer(fan_in, skip, size=1) if skip else nn.Identity())
            below = widths[min(scale + 1, self.scales - 1)]
            self.up.append(nn.Sequential(_layer(below + skip, width), _layer(width, width, size=1)))
            fan_in = width
        self.skips = tuple(skips)
        self.last = nn.Sequential(nn.Conv2d(widths[0], outputs, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        """Image (batch, outputs, height, width) in [0, 1] for an input (batch, inputs, height, width)."""
        if any(side % 2**self.scales for side in z.shape[2:]):
            raise ValueError(f"z must have sides divisible by {2**self.scales}, got {tuple(z.shape)}")
        inputs = []
        for down in self.down:
            inputs.append(z)
            z = down(z)
        for scale in reversed(range(self.scales)):
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
            if self.skips[scale]:
                z = torch.cat([z, self.skip[scale](inputs[scale])], 1)
            z = self.up[scale](z)
        return self.last(z)


def _layer(fan_in: int, fan_out: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution with reflected borders, batch norm, leaky ReLU."""
    convolution = nn.Conv2d(fan_in, fan_out, size, stride=stride, padding=size // 2, padding_mode="reflect", bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out), nn.LeakyReLU(0.2))


@dataclass(frozen=True)
class ImagePriorLoss:
    """Terms of the loss, shape (1,).

    Attributes:
        total: squared error between the degraded output and the observation, summed over its entries.
    """

    total: Tensor


class ImagePrior(nn.Module):
    r"""The GAE whose latent is the network's weights: :math:`l(\theta_0, t)` for one image, from random weights.

    .. math:: -\log q(x|\theta) = \|A f_\theta(z) - x\|^2 / 2\sigma^2 + \text{const}

    A network that is large enough fits x with its noise: the maximum over the weights is worth nothing, and t is the
    regularisation. Fix t beforehand; the best t in hindsight needs the clean image.

    Train it with :func:`gae_core.train.fit` on ``x[None]``, an epoch a step. After each step ``output`` holds the
    image of that step, and ``averaged`` the exponential average of the images so far.

    Args:
        net: module z (1, c, height, width) -> image (1, ...).
        z: fixed input, (1, c, height, width).
        degrade: A, differentiable, for example a mask or an average over blocks; None for the identity.
        input_noise: standard deviation of noise that is added to z at each step.
        average: weight of the past in ``averaged``.

    Raises:
        ValueError: if ``average`` is not in [0, 1) or ``input_noise`` is negative; when used, if what the network gives
            has another shape than x.
    """

    def __init__(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        degrade: Callable[[Tensor], Tensor] | None = None,
        input_noise: float = 1 / 30,
        average: float = 0.99,
    ) -> None:
        super().__init__()
        if not 0 <= average < 1 or not input_noise >= 0:
            raise ValueError(f"average must be in [0, 1) and input_noise at least 0, got {average} and {input_noise}")
        self.net, self.degrade, self.input_noise, self.average = net, degrade or nn.Identity(), input_noise, average
        self.register_buffer("z", z)
        self.register_buffer("output", torch.zeros(0))
        self.register_buffer("averaged", torch.zeros(0))

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> ImagePriorLoss:
        """Loss of the observation x (1, ...), noise of the input from ``generator``; ``y`` is not used."""
        noise = torch.randn(self.z.shape, generator=generator, device=self.z.device, dtype=self.z.dtype)
        output = self.net(self.z + self.input_noise * noise)
        seen = self.degrade(output)
        if seen.shape != x.shape:
            raise ValueError(f"the degraded output must have the shape of x, {tuple(x.shape)}, got {tuple(seen.shape)}")
        self.output = output.detach()
        self.averaged = (
            self.output if not self.averaged.numel() else torch.lerp(self.output, self.averaged, self.average)
        )
        return ImagePriorLoss((seen - x).square().flatten(1).sum(1))


def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for images in [0, 1]: -10 log10 of the mean squared error; inf where it is 0.

    Raises:
        ValueError: if the images differ in shape, or one is not floating point: bytes are not in [0, 1].
    """
    if image.shape != clean.shape:
        raise ValueError(f"image must have the shape of clean, {tuple(clean.shape)}, got {tuple(image.shape)}")
    if not (image.is_floating_point() and clean.is_floating_point()):
        raise ValueError(
            f"image and clean must be floating point, in [0, 1], got {image.dtype} and {clean.dtype}; "
            f"gae_core.data.to_unit makes bytes so"
        )
    return float(-10 * (image - clean).square().mean().log10())
