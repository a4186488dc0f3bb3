"""Fused losses of the Generalized Focal Loss family for PyTorch."""

from ._version import __version__
from .decode import DecodedBoxes, decode_boxes
from .dispatch import backends, use_backend
from .functional import (
    bin_weights,
    distribution_focal_loss,
    distribution_moments,
    distribution_statistics,
    integral,
    localization_distillation_loss,
    quality_focal_loss,
)
from .head import GFLLossOutput, gfl_loss, task_aligned_loss
from .modules import DistributionFocalLoss, GFLLoss, Integral, QualityFocalLoss
from .reference import DistributionMoments

__all__ = [
    "DecodedBoxes",
    "DistributionFocalLoss",
    "DistributionMoments",
    "GFLLoss",
    "GFLLossOutput",
    "Integral",
    "QualityFocalLoss",
    "__version__",
    "backends",
    "bin_weights",
    "decode_boxes",
    "distribution_focal_loss",
    "distribution_moments",
    "distribution_statistics",
    "gfl_loss",
    "integral",
    "localization_distillation_loss",
    "quality_focal_loss",
    "task_aligned_loss",
    "use_backend",
]
