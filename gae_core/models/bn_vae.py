"""A variational autoencoder whose decoder sees the pixels before: strong enough to do without its code.

Derived in *Posterior collapse and batch norm*. The norms that are tried against it are in ``normalization``.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import nets
from gae_core.models.vae import VAE


class PixelDecoder(nn.Module):
    r"""Logits of each pixel from a few pixels before it and the code: :math:`p(x|z) = \prod_i p(x_i | x_{<i}, z)`.

    Pixels come row by row. Pixel i sees its neighbours to the left, up to ``reach`` away, and those in the ``reach``
    rows above, as far to either side, and ``channels`` numbers made of the code for its place. One small network makes
    the logit of all this, the same for all pixels.

    Args:
        shape: of an image, (1, height, width).
        dim: dimension of the code.
        reach: how far the neighbours go; 0 is a decoder of independent pixels.
        channels: numbers that the code gives a pixel.
        hidden: width of the network of a pixel.
        width: width of the network that makes those numbers.

    Raises:
        ValueError: for images with colours, or a negative ``reach``.
    """

    def __init__(
        self, shape: Sequence[int], dim: int, *, reach: int = 4, channels: int = 8, hidden: int = 32, width: int = 128
    ) -> None:
        super().__init__()
        colours, self.height, self.width = shape
        if colours != 1 or reach < 0:
            raise ValueError(f"shape must have one colour and reach be at least 0, got {tuple(shape)}, reach={reach}")
        self.reach = reach
        self.before = 2 * reach * (reach + 1)  # neighbours that come before a pixel
        pixels = self.height * self.width
        self.map = nn.Sequential(nets.mlp([dim, width, channels * pixels]), nn.Unflatten(1, (channels, pixels)))
        self.pixel = nets.mlp([self.before + channels, hidden, hidden, 1])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits (batch, 1, height, width) of x (batch, 1, height, width), each pixel's from those before it."""
        r = self.reach
        padded = F.pad(x.to(z.dtype), (r, r, r, 0))
        neighbours = F.unfold(padded, (r + 1, 2 * r + 1))[:, : self.before]  # (batch, before, pixels)
        inputs = torch.cat([neighbours, self.map(z)], 1).mT
        return self.pixel(inputs).view(x.shape)

    def draw(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Images (batch, 1, height, width) drawn pixel by pixel: a pixel is 1 where its number is below its mean.

        Args:
            z: codes (batch, dim).
            uniform: numbers in [0, 1), (batch, height, width), or with batch 1 the same for all codes.
        """
        r = self.reach
        codes = self.map(z)
        x = z.new_zeros(len(z), self.height + r, self.width + 2 * r)
        for i in range(self.height):
            for j in range(self.width):
                neighbours = x[:, i : i + r + 1, j : j + 2 * r + 1].flatten(1)[:, : self.before]
                logit = self.pixel(torch.cat([neighbours, codes[:, :, i * self.width + j]], 1))[:, 0]
                x[:, i + r, j + r] = (uniform[:, i, j] < logit.sigmoid()).to(x.dtype)
        return x[:, None, r:, r : r + self.width]


class AutoregressiveVAE(VAE):
    """Variational autoencoder of binary images with a :class:`PixelDecoder`.

    p(x | z) has no mean in closed form: ``decode`` and ``sample`` draw images.

    Args:
        encoder: module x (batch, 1, height, width) -> (batch, 2 * dim), the means beside the logarithms of variances.
        decoder: a :class:`PixelDecoder`.
        dim: dimension of the code.
        beta: weight of the divergence.
        norm: as in :class:`gae_core.models.vae.VAE`.
    """

    def __init__(
        self, encoder: nn.Module, decoder: PixelDecoder, dim: int, *, beta: float = 1.0, norm: nn.Module | None = None
    ) -> None:
        super().__init__(encoder, decoder, dim, beta=beta, norm=norm)

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x | z) for each x (batch, 1, height, width) at its z (batch, dim), shape (batch,)."""
        return self.likelihood.log_prob(x, self.decoder(x, z))

    @torch.no_grad()
    def decode(
        self, z: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, shared: bool = False
    ) -> Tensor:
        """One image (batch, 1, height, width) drawn from p(x | z) for each code z (batch, dim).

        Args:
            z: codes.
            y: not used.
            generator: source of the uniform numbers, on any device.
            shared: use the same numbers for all codes, so that images differ where codes do.
        """
        shape = (1 if shared else len(z), self.decoder.height, self.decoder.width)
        device = z.device if generator is None else generator.device
        uniform = torch.rand(shape, generator=generator, device=device, dtype=z.dtype)
        return self.decoder.draw(z, uniform.to(z.device))

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Draw n images: codes from N(0, I), and an image for each."""
        return self.decode(self.sample_prior(n, y, generator=generator), generator=generator)
