"""Fused losses of the Generalized Focal Loss family for PyTorch."""

from ._version import __version__
from .decode import DecodedBoxes, decode_boxes
from .dispatch import backends, use_backend
from .functional import (
    bin_weights,
    distribution_focal_loss,
    distribution_moments,
    distribution_statistics,
    ia_bce_loss,
    integral,
    localization_distillation_loss,
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from .head import GFLLossOutput, gfl_loss, task_aligned_loss
from .modules import (
    DistributionFocalLoss,
    FocalLoss,
    GFLLoss,
    Integral,
    QualityFocalLoss,
    VarifocalLoss,
)
from .reference import DistributionMoments

__all__ = [
    "DecodedBoxes",
    "DistributionFocalLoss",
    "DistributionMoments",
    "FocalLoss",
    "GFLLoss",
    "GFLLossOutput",
    "Integral",
    "QualityFocalLoss",
    "VarifocalLoss",
    "__version__",
    "backends",
    "bin_weights",
    "decode_boxes",
    "distribution_focal_loss",
    "distribution_moments",
    "distribution_statistics",
    "gfl_loss",
    "ia_bce_loss",
    "integral",
    "localization_distillation_loss",
    "matchability_aware_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "task_aligned_loss",
    "use_backend",
    "varifocal_loss",
]
