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


def check_shape(x: Tensor, reconstruction: Tensor) -> None:
    """Raise a ValueError if the two differ in shape.

    Images (n, h, w) minus images (n, 1, h, w) are (n, n, h, w): without the check each image is compared with all
    reconstructions, and the best of those is the mean image.
    """
    if x.shape != reconstruction.shape:
        told, given = ("(" + ", ".join(["n", *map(str, v.shape[1:])]) + ")" for v in (reconstruction, x))
        entries = reconstruction.shape[1:].numel()
        if x[:, None].shape == reconstruction.shape:
            mend = "x.unsqueeze(1)"
        elif x.shape[1:].numel() == entries:
            mend = f"x.reshape(-1, {', '.join(map(str, reconstruction.shape[1:]))})"
        else:
            mend = "the decoder must end in what x is made of"
        raise ValueError(f"x must have the shape that the decoder gives, {told}, got {given}: {mend}")


def squared_distance(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error of each row, (batch,), summed over its entries.

    Raises:
        ValueError: if the two differ in shape.
    """
    check_shape(x, reconstruction)
    return (x - reconstruction).square().flatten(1).sum(1)


class Autoencoder(nn.Module):
    r"""Encoder E and decoder D trained to minimise :math:`\|x - D(E(x))\|^2`.

    Implements ``def-autoencoder-loss``.

    Args:
        encoder: module x (batch, ...) -> code (batch, dim).
        decoder: module z (batch, dim) -> x (batch, ...).
        dim: dimension of the code.

    Raises:
        ValueError: from the loss, if x is of another type than the weights or of another shape than the decoder's
            output, or the codes are not (batch, dim).
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
        reconstruction = squared_distance(x, self.decode(self._codes(x)))
        return AutoencoderLoss(total=reconstruction, reconstruction=reconstruction)

    def _codes(self, x: Tensor) -> Tensor:
        """Codes of x, where x has the type of the weights and the codes are as long as ``dim`` says."""
        self._refuse_type(x)
        z = self.encode(x)
        if z.shape != (len(x), self.dim):
            raise ValueError(f"encoder must give codes of shape {(len(x), self.dim)}, got {tuple(z.shape)}")
        return z

    def _refuse_type(self, x: Tensor) -> None:
        """Raise a ValueError unless x has the type of the weights."""
        weight = next(self.parameters(), None)
        if weight is not None and x.dtype != weight.dtype:
            mend = "gae_core.data.to_unit(x) makes floats of bytes" if x.dtype == torch.uint8 else "convert it"
            raise ValueError(f"x must be {weight.dtype} as the model's weights are, got {x.dtype}: {mend}")

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Decode n codes drawn from N(0, I).

        The plain autoencoder gives no reason why its codes should be distributed so: the chapter shows it fail.
        """
        return self.decode(self._noise(n, generator))

    def _noise(self, n: int, generator: Generator | None) -> Tensor:
        """Codes (n, dim) drawn from N(0, I) on the generator's device, for the model on its own."""
        parameter = next(self.parameters())
        device = parameter.device if generator is None else generator.device
        eps = torch.randn(n, self.dim, generator=generator, device=device, dtype=parameter.dtype)
        return eps.to(parameter.device)
