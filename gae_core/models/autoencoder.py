"""The plain autoencoder. Derived in the chapter *Autoencoders*."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class AutoencoderLoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: what is minimised; here the reconstruction error.
        reconstruction: squared error, summed over the entries of x.
    """

    total: Tensor
    reconstruction: Tensor


class Autoencoder(nn.Module):
    r"""Encoder E and decoder D trained to minimise :math:`\|x - D(E(x))\|^2`.

    Implements ``def-autoencoder-loss``.

    Args:
        encoder: module x (batch, ...) -> code (batch, dim).
        decoder: module z (batch, dim) -> x (batch, ...).
        dim: dimension of the code.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.dim = encoder, decoder, dim

    def encode(self, x: Tensor) -> Tensor:
        """Codes (batch, dim) of x."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Data (batch, ...) that codes z (batch, dim) stand for."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction D(E(x)), of the shape of x."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> AutoencoderLoss:
        """Loss on a batch; ``y`` and ``generator`` are there for the common interface and not used."""
        reconstruction = (x - self(x)).square().flatten(1).sum(1)
        return AutoencoderLoss(total=reconstruction, reconstruction=reconstruction)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Decode n codes drawn from N(0, I).

        The plain autoencoder gives no reason why its codes should be distributed so: the chapter shows it fail.
        """
        parameter = next(self.parameters())
        device = parameter.device if generator is None else generator.device
        z = torch.randn(n, self.dim, generator=generator, device=device, dtype=parameter.dtype)
        return self.decode(z.to(parameter.device))
