"""Measures of chains of samples: how soon they forget where they were."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gae_core.chains import effective_sample_size


@dataclass(frozen=True)
class Mixing:
    """How the labels of chains change.

    Attributes:
        ess: independent labels that a thousand steps of a chain are worth, 1000 for independent draws.
        stay: mean number of steps that a label stays; all steps, if none changes.
        entropy: of the shares of the labels in nats; log K for equal shares of K classes.
    """

    ess: float
    stay: float
    entropy: float


def mixing(labels: Tensor, classes: int) -> Mixing:
    r"""How fast chains forget their label.

    .. math:: \frac{1000}{K} \sum_k \frac{\mathrm{ESS}_k}{M n}

    Implements ``def-denoising-mixing``: ESS_k is that of the indicator of class k over M chains of n steps
    (``def-latent_mcmc-ess``), and 0 where no chain enters or leaves the class.

    Args:
        labels: classes 0..classes-1, (n >= 8, chains).
        classes: their number K.

    Raises:
        ValueError: for another shape, or labels out of range.
    """
    if labels.ndim != 2 or len(labels) < 8 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be (n >= 8, chains), from 0 to {classes - 1}, got {tuple(labels.shape)} "
            f"from {int(labels.min())} to {int(labels.max())}"
        )
    n, chains = labels.shape
    one_hot = F.one_hot(labels.long(), classes).double()  # (n, chains, classes)
    moves = one_hot.diff(dim=0).abs().sum(1)  # (n - 1, classes)
    half = n // 2
    moving = (moves[: half - 1].sum(0) > 0) | (moves[n - half :].sum(0) > 0)  # within a half of some chain
    ess = effective_sample_size(one_hot[..., moving]).sum() if moving.any() else torch.tensor(0.0)
    shares = one_hot.mean((0, 1))
    return Mixing(
        ess=float(1000 * ess / (chains * n * classes)),
        stay=(n - 1) * chains / max(1.0, float(moves.sum() / 2)),
        entropy=float(torch.special.entr(shares).sum()),
    )
