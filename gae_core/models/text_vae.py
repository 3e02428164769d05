"""Variational autoencoders of sentences, and what has been done against the collapse of their codes. In nats."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core.models.likelihoods import Likelihood
from gae_core.models.vae import LatentVariableModel, VAELoss


class Tokens(Likelihood):
    """The words of a sentence, by their logits. Padding, token 0, has no logit and counts nothing."""

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Logarithms of p(sentence), (batch,), for x (batch, length) and logits (batch, length, tokens - 1)."""
        logits = output.flatten(0, 1).to(torch.promote_types(output.dtype, torch.float32))  # autocast would round them
        return -F.cross_entropy(logits, x.flatten() - 1, ignore_index=-1, reduction="none").view(x.shape).sum(1)


class TextVAE(LatentVariableModel):
    r"""Variational autoencoder of sentences: an LSTM reads x into q(z | x), another speaks x word by word given z.

    .. math:: -\sum_t \log p(x_t | x_{<t}, z) + w\,\beta \sum_j K_j, \qquad
        K_j = \mathrm{KL}\bigl(q(z_j|x)\,\|\,N(0, 1)\bigr)

    Implements ``def-bn_vae_text-loss``. With the defaults w is 1, and this is the plain VAE. Against its collapse:

    - ``norm``: batch norm of the means (:class:`gae_core.normalization.FixedScaleBatchNorm`), of means and standard
      deviations (:class:`gae_core.normalization.CoupledBatchNorm`), or :class:`CommittedRate` (delta-VAE);
    - ``warmup``: w rises from 0 to 1 (Bowman et al., CoNLL 2016);
    - ``free_bits``: :math:`\max(\lambda, \bar K_j)` for the batch's mean of each :math:`K_j` (Kingma et al., 2016);
    - ``beta`` below 1;
    - ``encoder_steps``: the encoder trains that many steps for one of the decoder (He et al., ICLR 2019).

    Args:
        encoder: module tokens (batch, length) -> (batch, 2 * dim), the means beside the logarithms of the variances.
        decoder: a :class:`gae_core.nets.LSTMDecoder`.
        dim: dimension of the code.
        norm: module (mu, raw) -> (mu, logvar); None takes them as they are.
        beta: weight of the divergence.
        warmup: steps of training over which w rises; the model counts them in a buffer, which checkpoints keep.
        free_bits: lambda, nats a dimension.
        encoder_steps: 0 trains both at once.

    Raises:
        ValueError: for a negative number; when used, if encoder and decoder give other shapes, or x is no batch of
            sentences: int64, with a token in each.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        dim: int,
        *,
        norm: nn.Module | None = None,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        encoder_steps: int = 0,
    ) -> None:
        if not min(beta, warmup, free_bits, encoder_steps) >= 0:
            raise ValueError(
                f"beta, warmup, free_bits and encoder_steps must be at least 0, "
                f"got {beta}, {warmup}, {free_bits}, {encoder_steps}"
            )
        super().__init__(encoder, decoder, dim, likelihood=Tokens(), beta=beta, norm=norm)
        self.warmup, self.free_bits = warmup, free_bits
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if encoder_steps:
            inference = [*encoder.parameters(), *([] if norm is None else norm.parameters())]
            self.players = {"encoder": (inference, encoder_steps), "decoder": (list(decoder.parameters()), 1)}

    @property
    def weighs_divergence(self) -> bool:
        """Whether the loss has another weight of the divergence than 1, or makes a part of it free."""
        return self.beta != 1 or bool(self.free_bits) or bool(self.warmup)

    def train_together(self) -> None:
        """End the phase in which the encoder runs ahead: both networks train at once from here."""
        del self.players

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x), each (batch, dim)."""
        if x.ndim != 2 or x.dtype != torch.int64 or not (x != 0).any(1).all():
            raise ValueError(
                f"x must be int64 tokens (batch, length), none of the sentences empty, got {x.dtype} {tuple(x.shape)}"
            )
        return super().posterior(x, y)

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x | z) for each sentence (batch, length) at its z (batch, dim), shape (batch,)."""
        return self.likelihood.log_prob(x, self.decoder(x, z))

    def _observed(self, x: Tensor, generator: Generator | None) -> Tensor:
        return x  # tokens are not of the weights' type; posterior looks at them

    def _charge(self, kl: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        if self.free_bits:
            kl = self.divergence(mu, logvar).mean(0).clamp(min=self.free_bits).sum().expand(len(kl))
        if self.warmup:
            kl = kl * (self.steps / self.warmup).clamp(max=1)
            if self.training:
                self.steps += 1
        return self.beta * kl

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, player: str = ""
    ) -> VAELoss:
        """Loss on a batch with one z for each x; ``kl`` is the divergence itself, whatever ``total`` makes of it.

        ``y`` is not used, and ``player`` does not change the loss: both players minimise the same.
        """
        return super().loss(x, y, generator=generator)

    @torch.no_grad()
    def decode(
        self, z: Tensor, length: int, *, greedy: bool = True, end: int | None = 1, generator: Generator | None = None
    ) -> Tensor:
        """Speak a sentence about each code.

        Args:
            z: codes, (n, dim).
            length: tokens at most.
            greedy: take the most likely token each time; False draws it from p.
            end: token after which there is only padding; None if no token ends a sentence.
            generator: source of the draws.

        Returns:
            Tokens, int64, (n, length), padded.
        """
        state, x = self.decoder.start(z), z.new_zeros((len(z), 1), dtype=torch.int64)
        done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for _ in range(length):
            logits, state = self.decoder.step(x[:, -1:], z, state)
            logits = logits[:, 0]
            if greedy:
                token = logits.argmax(1) + 1
            else:
                device = z.device if generator is None else generator.device
                token = torch.multinomial(logits.softmax(1).to(device), 1, generator=generator)[:, 0].to(z.device) + 1
            token = token.masked_fill(done, 0)
            x = torch.cat([x, token[:, None]], 1)
            if end is not None:
                done = done | (token == end)
        return x[:, 1:]

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        *,
        length: int = 10,
        end: int | None = 1,
        generator: Generator | None = None,
    ) -> Tensor:
        """Tokens (n, length) of n sentences drawn from the model, code and words; ``y`` is not used."""
        z = self.sample_prior(n, y, generator=generator)
        return self.decode(z, length, greedy=False, end=end, generator=generator)


class CommittedRate(nn.Module):
    r"""The delta-VAE's q: no sentence can pay less than delta nats a dimension (Razavi et al., ICLR 2019).

    .. math:: \sigma^2 \in [l, u], \qquad \mu = \sqrt{2\delta + 1 + \log\sigma^2 - \sigma^2 + \mathrm{relu}(m)}

    Implements ``eq-bn_vae_text-committed``: l and u are the roots of :math:`\sigma^2 - \log\sigma^2 = 1 + 2\delta`.
    A constant q pays as well, so that the rate promises no information.

    Args:
        delta: nats a dimension, between 1e-8 and 350.

    Raises:
        ValueError: for another ``delta``.
    """

    def __init__(self, delta: float) -> None:
        super().__init__()
        from scipy.special import lambertw

        if not 1e-8 <= delta <= 350:  # nearer to 0 its branch -1 gives the other root, and beyond the exponential is 0
            raise ValueError(f"delta must be a positive number of nats, between 1e-8 and 350, got {delta}")
        self.delta = delta
        self.low, self.high = (math.log(-lambertw(-math.exp(-1 - 2 * delta), branch).real) for branch in (0, -1))

    def forward(self, mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, raw), each (batch, dim) -> (mu, logvar)."""
        logvar = self.low + (self.high - self.low) * raw.sigmoid()
        square = 2 * self.delta + 1 + logvar - logvar.exp() + mu.relu()
        return square.clamp(min=1e-12).sqrt(), logvar


class CodeReader(nn.Module):
    """The decoder alone, trained on the codes that the sentences were made from: what learning leaves, inference aside.

    Args:
        decoder: a :class:`gae_core.nets.LSTMDecoder`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.likelihood = decoder, Tokens()

    def loss(self, x: Tensor, y: Tensor, *, generator: Generator | None = None) -> VAELoss:
        """-log p(x | y) for sentences x (batch, length) and their codes y (batch, dim)."""
        nll = -self.likelihood.log_prob(x, self.decoder(x, y))
        return VAELoss(nll, nll, torch.zeros_like(nll))
