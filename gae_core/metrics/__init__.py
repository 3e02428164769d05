"""What is measured: of samples, of codes, of chains, of likelihoods, and what a model makes of many rows at a time."""

from gae_core.metrics.batches import in_batches, squared_error
from gae_core.metrics.chains import Mixing, mixing
from gae_core.metrics.codes import (
    EncoderInformation,
    Gaussianity,
    active_units,
    encoder_information,
    gaussianity,
    trustworthiness,
)
from gae_core.metrics.likelihood import PROPOSALS, WIDTHS, ImportanceWeighted, importance_weighted_nll
from gae_core.metrics.samples import (
    Detection,
    ModeCount,
    ModeQuality,
    PrecisionRecall,
    detection,
    frechet_distance,
    mode_count,
    mode_quality,
    parzen_log_likelihood,
    precision_recall,
)

__all__ = [
    "PROPOSALS",
    "WIDTHS",
    "Detection",
    "EncoderInformation",
    "Gaussianity",
    "ImportanceWeighted",
    "Mixing",
    "ModeCount",
    "ModeQuality",
    "PrecisionRecall",
    "active_units",
    "detection",
    "encoder_information",
    "frechet_distance",
    "gaussianity",
    "importance_weighted_nll",
    "in_batches",
    "mixing",
    "mode_count",
    "mode_quality",
    "parzen_log_likelihood",
    "precision_recall",
    "squared_error",
    "trustworthiness",
]
