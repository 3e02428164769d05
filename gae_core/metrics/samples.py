"""Measures of samples beside data. Each says what a perfect model would get."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gae_core.data import to_unit


def _check_features(name: str, value: Tensor, *, like: Tensor, least: int) -> None:
    """Raise a ValueError unless ``value`` is finite, (n >= least, d) with the d of ``like``."""
    if value.ndim != 2 or len(value) < least or value.shape[1:] != like.shape[1:] or not value.shape[1]:
        raise ValueError(
            f"{name} must have shape (n >= {least}, d), d >= 1 and alike in both, got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Wasserstein distance between Gaussians with the moments of two samples (Fréchet distance).

    .. math:: \|m_a - m_b\|^2 + \operatorname{tr}\bigl(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\bigr)

    Implements ``def-autoencoder-frechet``. It is 0 if the first two moments agree, not only if the distributions do,
    and biased upwards by sampling: two samples of the same distribution do not give 0. Compare figures of the same
    features and sample sizes only.

    Args:
        a: features of one sample, (n, d), n >= 2.
        b: features of the other, (m, d), m >= 2.

    Returns:
        Distance, in squared units of the features.

    Raises:
        ValueError: for shapes that do not fit, or features that are not finite.
    """
    _check_features("a", a, like=a, least=2)
    _check_features("b", b, like=a, least=2)
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    d = a.shape[1]
    cov_a, cov_b = (torch.cov(x.T).reshape(d, d) for x in (a, b))
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        raise ValueError("a and b must be features whose squares are finite, got larger ones")
    eigen = (torch.linalg.eigh(cov) for cov in (cov_a, cov_b))
    # An eigenvalue of the size of the rounding is none: its square root, 1e-8 of the others', would enter the sum.
    least = d * torch.finfo(torch.float64).eps
    root_a, root_b = (
        vectors * values.where(values > least * values[-1], 0).sqrt() @ vectors.T for values, vectors in eigen
    )
    # The singular values of the product are the eigenvalues of that root, without the square root of a rounding error.
    cross = torch.linalg.svdvals(root_a @ root_b).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall. Both are in [0, 1], and below 1 even for two samples of the same distribution.

    Attributes:
        precision: share of generated samples that lie in the manifold of the real ones.
        recall: share of real samples that lie in the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, chunk_size: int = 1000) -> PrecisionRecall:
    """Improved precision and recall of generated samples (Kynkäänniemi et al., NeurIPS 2019).

    The manifold of a sample is the union of a ball around each of its points, which reaches to the point's k-th
    neighbour in that sample. One far outlier has a large ball and takes in much that is no data: compare figures of
    the same features, sample sizes and k only. The source takes k = 3.

    Args:
        real: features of data, (n, d), n > k, floating point.
        fake: features of generated samples, (m, d), m > k.
        k: which neighbour.
        chunk_size: rows of the distance matrix at a time.

    Raises:
        ValueError: for shapes that do not fit, features that are not finite floats, or k or chunk_size below 1.
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k and chunk_size must be at least 1, got k={k}, chunk_size={chunk_size}")
    if k != int(k):
        raise ValueError(f"k must be a whole number, got {k}")
    for name, value in (("real", real), ("fake", fake)):
        _check_features(name, value, like=real, least=k + 1)

    # Squared distances by matrix products: in double precision, about the mean, with an allowance for the rounding.
    centre = real.double().mean(0)
    real, fake = (value.detach().double() - centre for value in (real, fake))
    slack = 1e-12 * max(value.square().sum(1).max() for value in (real, fake))

    def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
        for rows in a.split(chunk_size):
            yield torch.addmm(b.square().sum(1), rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))

    def share_within(points: Tensor, sample: Tensor) -> float:
        # The (k + 1)-th smallest distance: the smallest is that of the point to itself.
        radius = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances(sample, sample)]) + slack
        return torch.cat([(d <= radius).any(1) for d in distances(points, sample)]).double().mean().item()

    return PrecisionRecall(precision=share_within(fake, real), recall=share_within(real, fake))


@dataclass(frozen=True)
class ModeCount:
    """Which classes a sample of labels has, and how often.

    Attributes:
        modes: classes that occur.
        kl: KL divergence in nats of the labels' distribution from the reference's, 0 if they agree.
        floor: (K - 1) / 2n, the mean of ``kl`` for n labels drawn from the reference itself, K its classes; to first
            order in 1 / n, so for samples where each class is expected a few times.
    """

    modes: int
    kl: float
    floor: float


def mode_count(labels: Tensor, reference: Tensor) -> ModeCount:
    r"""Count modes by the classes that a classifier sees in generated samples.

    .. math:: \mathrm{KL} = \sum_k q_k \log\frac{q_k}{p_k}, \qquad q_k = \text{share of the labels that are } k

    Many samples find a mode however rare it is, so that counts of modes are comparable at equal n only.

    Args:
        labels: classes 0..K-1 of generated samples, integers (n,).
        reference: frequency p of each class in the data, counts or shares, (K,); divided by its sum.

    Raises:
        ValueError: for other shapes or types, a frequency that is negative, or labels that the reference has not.
    """
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape (n >= 1,), got {labels.dtype} {tuple(labels.shape)}")
    if not isinstance(reference, Tensor):
        raise ValueError(f"reference must be a tensor of frequencies, got {reference!r}")
    p = reference.detach().double().cpu()
    if p.ndim != 1 or not torch.isfinite(p).all() or (p < 0).any() or not p.sum() > 0:
        raise ValueError(f"reference must be finite frequencies of shape (K,), none negative, got {reference}")
    p = p / p.sum()
    labels, n = labels.cpu().long(), len(labels)
    if labels.min() < 0 or labels.max() >= len(p) or (p[labels] == 0).any():
        raise ValueError(f"labels must be classes that the reference has, got {labels.unique().tolist()}")
    q = torch.bincount(labels, minlength=len(p)).double() / n
    seen = q > 0
    return ModeCount(
        modes=int(seen.sum()),
        kl=float((q[seen] * (q[seen] / p[seen]).log()).sum()),
        floor=(int((p > 0).sum()) - 1) / (2 * n),
    )


@dataclass(frozen=True)
class ModeQuality:
    """How a sample lies about the modes of a mixture of equal round Gaussians in the plane.

    Attributes:
        modes: modes with at least one sample of high quality.
        high_quality: share of samples within 3 standard deviations of their nearest mode; for the mixture itself
            1 - exp(-4.5) = 0.989.
        spread: root mean squared distance to the nearest mode per coordinate, in standard deviations; for the mixture
            itself 1. It is of all samples, so that those between modes decide it.
        spread_within: the same of the samples of high quality alone; for the mixture itself 0.974. Points on the modes
            have high quality and no spread. None if there is none.
        kl: KL divergence in nats of the modes' shares of all samples from equal shares, as in :class:`ModeCount`.
    """

    modes: int
    high_quality: float
    spread: float
    spread_within: float | None
    kl: float


def mode_quality(x: Tensor, modes: Tensor, std: float) -> ModeQuality:
    """Count modes found, share of samples of high quality and spread within modes (Lin et al., NeurIPS 2018).

    One sample of high quality finds a mode, so noise that covers the plane finds all of them: look at both.

    Args:
        x: samples, (n, 2).
        modes: centres, (modes, 2).
        std: standard deviation of each component per coordinate.

    Raises:
        ValueError: for other shapes, samples or modes that are not finite, or a ``std`` that is not positive.
    """
    if x.ndim != 2 or x.shape[1] != 2 or len(x) == 0 or modes.shape[1:] != (2,) or len(modes) == 0:
        raise ValueError(f"x and modes must have shapes (n, 2), got {tuple(x.shape)} and {tuple(modes.shape)}")
    for name, value in (("x", x), ("modes", modes)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be a positive number, got {std}")
    distance, nearest = torch.cdist(x.detach().double(), modes.to(x.device).double()).min(1)
    high = distance < 3 * std
    return ModeQuality(
        modes=len(nearest[high].unique()),
        high_quality=float(high.double().mean()),
        spread=float((distance.square().mean() / 2).sqrt() / std),
        spread_within=float((distance[high].square().mean() / 2).sqrt() / std) if high.any() else None,
        kl=mode_count(nearest, torch.ones(len(modes))).kl,
    )


@dataclass(frozen=True)
class Detection:
    """How well a score tells anomalies from the rest.

    Attributes:
        auroc: chance that an anomaly scores higher than another sample, ties counted half; 0.5 for chance.
        auprc: mean of the precision at each anomaly (average precision).
        prevalence: share of anomalies, the ``auprc`` of chance.
        least: the smallest ``auprc`` that there is with these numbers, of all anomalies ranked last.
    """

    auroc: float
    auprc: float
    prevalence: float
    least: float


def detection(scores: Tensor, anomaly: Tensor) -> Detection:
    r"""Areas under the ROC curve and under the curve of precision and recall, with what chance and the worst would get.

    .. math:: \mathrm{AUPRC} = \frac1k\sum_{j=1}^{k} \mathrm{precision\ at\ the\ rank\ of\ anomaly\ } j, \qquad
        \text{least} = \frac1k\sum_{j=1}^{k}\frac{j}{n - k + j} \approx 1 + \frac{1 - \pi}{\pi}\log(1 - \pi)

    Implements ``def-meg-auprc`` and ``eq-meg-least``. Compare figures of the first kind at equal prevalence only.

    Args:
        scores: higher for what looks more anomalous, (n,).
        anomaly: which samples are anomalies, booleans (n,), some and not all.

    Raises:
        ValueError: for other shapes, scores that are not finite, or one kind of sample only.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if scores.ndim != 1 or anomaly.shape != scores.shape or anomaly.dtype != torch.bool:
        raise ValueError(
            f"scores and anomaly must be (n,), the second boolean, got {tuple(scores.shape)} and "
            f"{anomaly.dtype} {tuple(anomaly.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinite ones")
    n, k = len(scores), int(anomaly.sum())
    if not 0 < k < n:
        raise ValueError(f"anomaly must have both kinds, got {k} anomalies of {n}")
    truth, found = anomaly.cpu().numpy(), scores.detach().cpu().double().numpy()
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    return Detection(
        auroc=float(roc_auc_score(truth, found)),
        auprc=float(average_precision_score(truth, found)),
        prevalence=k / n,
        least=float((ranks / (n - k + ranks)).mean()),
    )


@torch.no_grad()
def parzen_log_likelihood(samples: Tensor, x: Tensor, *, width: float, chunk_size: int = 500) -> Tensor:
    r"""Log-likelihood of x under Gaussians of standard deviation ``width`` on the samples. A poor measure.

    It prefers samplers with too little variance (``eq-denoising-parzen``), and averages of data to data. Here to be
    shown beside others, never alone.

    Args:
        samples: of the model, (n, ...).
        x: test data, (m, ...), of the same shape a row.
        width: of the Gaussians; published figures choose it on validation data.
        chunk_size: rows of x at a time.

    Returns:
        Log-densities in nats, (m,), float64.

    Raises:
        ValueError: if ``width`` is not positive, the shapes differ, or an entry is not finite.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width must be positive, got {width}")
    if samples.shape[1:] != x.shape[1:] or not len(samples):
        raise ValueError(f"samples and x must have rows of the same shape, got {samples.shape} and {x.shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    centres, x = (to_unit(v).flatten(1).double() for v in (samples, x))
    for name, value in (("samples", centres), ("x", x)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    constant = 0.5 * x.shape[1] * math.log(2 * math.pi * width**2) + math.log(len(centres))
    parts = [(-torch.cdist(rows, centres).square() / (2 * width**2)).logsumexp(1) for rows in x.split(chunk_size)]
    return torch.cat(parts) - constant
