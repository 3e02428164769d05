"""Small networks that the models are built from: the smallest ones that show what a chapter is about."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    output: type[nn.Module] | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> tuple[nn.Module, nn.Module]:
    """Encoder from images of a shape to codes (batch, dim), and the mirrored decoder back to images.

    Args:
        shape: shape of one image, (channels, height, width).
        dim: dimension of the code.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        heads: vectors of length dim that the encoder gives side by side, (batch, heads * dim): 2 for mu and logvar.
        output: class of the decoder's last layer: ``nn.Sigmoid`` for images in [0, 1], ``nn.Identity`` for logits. By
            default the first with one head, and the second with two, as :class:`gae_core.models.vae.VAE` has them.
        activation: class of the activations between the layers.
    """
    pixels = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), mlp([pixels, *hidden, heads * dim], activation=activation))
    layers = mlp([dim, *reversed(hidden), pixels], activation=activation)
    decoder = nn.Sequential(layers, _output(output, heads)(), nn.Unflatten(1, tuple(shape)))
    return encoder, decoder


def _output(given: type[nn.Module] | None, heads: int) -> type[nn.Module]:
    return given or (nn.Sigmoid if heads == 1 else nn.Identity)


def conv_pair(
    shape: Sequence[int], dim: int, *, channels: int = 32, heads: int = 1, output: type[nn.Module] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Convolutional encoder and decoder, halving the image twice, for sides that four divides.

    Args:
        shape: shape of one image, (channels, height, width), height and width divisible by 4.
        dim: dimension of the code.
        channels: width of the first layer; the second has twice as many.
        heads: as in :func:`mlp_pair`.
        output: as in :func:`mlp_pair`.

    Raises:
        ValueError: if a side is not divisible by 4, or there are no channels.
    """
    if len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {tuple(shape)}: grey images are x.unsqueeze(1)")
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
        _output(output, heads)(),
    )
    return encoder, decoder


class FourierFeatures(nn.Module):
    """Rows x -> [x, sin(x W), cos(x W)] with fixed W, so that small networks learn functions that vary fast.

    Source: Tancik et al., *Fourier features let networks learn high frequency functions in low dimensional domains*,
    NeurIPS 2020.

    Args:
        inputs: entries of x, (batch, inputs).
        count: columns of W; the result has inputs + 2 * count entries.
        scale: standard deviation of the entries of W, the angular frequency in inverse units of x.
    """

    def __init__(self, inputs: int, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(inputs, count))

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, inputs + 2 * count)."""
        phase = x @ self.frequencies
        return torch.cat([x, phase.sin(), phase.cos()], 1)


class LSTMEncoder(nn.Module):
    """Sentences (batch, length) -> (batch, outputs), from an LSTM's state behind the last token that is no padding.

    Args:
        tokens: size of the vocabulary; token 0 is the padding.
        outputs: length of the result, for example 2 * dim for mu and logvar.
        embedding: dimension of the tokens' embedding.
        hidden: of the LSTM.
    """

    def __init__(self, tokens: int, outputs: int, *, embedding: int = 50, hidden: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for tokens (batch, length), int64; padding is at the end of a row, and changes nothing.

        Raises:
            ValueError: if padding stands elsewhere, a row is nothing else, or there are tokens of another vocabulary.
        """
        if ((x[:, 1:] != 0) & (x[:, :-1] == 0)).any() or (x[:, 0] == 0).any():
            raise ValueError("x must have its padding, token 0, at the ends of rows, each with a token before it")
        if ((x < 0) | (x >= self.embed.num_embeddings)).any():
            raise ValueError(
                f"x must be tokens 0 to {self.embed.num_embeddings - 1}, got {int(x.min())} to {int(x.max())}"
            )
        states, _ = self.lstm(self.embed(x))  # (batch, length, hidden)
        last = (x != 0).sum(1) - 1
        return self.out(states[torch.arange(len(x), device=x.device), last])


class LSTMDecoder(nn.Module):
    r"""Codes (batch, dim) and the tokens so far -> logits of the next token.

    .. math:: c_0 = W z, \quad h_0 = \tanh c_0, \quad h_t, c_t = \mathrm{LSTM}([e(x_{t-1}); z], h_{t-1}, c_{t-1})

    The code enters with each token and into the state at the beginning, where token 0 is read. The logits are those of
    tokens 1, 2, ...: padding is never spoken.

    Args:
        tokens: size of the vocabulary; token 0 is the padding.
        dim: dimension of the code.
        embedding: dimension of the tokens' embedding.
        hidden: of the LSTM.
    """

    def __init__(self, tokens: int, dim: int, *, embedding: int = 50, hidden: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, embedding)
        self.initial = nn.Linear(dim, hidden, bias=False)
        self.lstm = nn.LSTM(embedding + dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, tokens - 1)

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """State before the first token."""
        c = self.initial(z)[None]
        return c.tanh(), c

    def step(self, before: Tensor, z: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (batch, t, tokens - 1) of what follows each token of ``before`` (batch, t), and the state then."""
        codes = z[:, None].expand(-1, before.shape[1], -1)
        h, state = self.lstm(torch.cat([self.embed(before), codes], 2), state)
        return self.out(h), state

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits (batch, length, tokens - 1) of each token of x (batch, length) from those before it."""
        return self.step(F.pad(x[:, :-1], (1, 0)), z, self.start(z))[0]
