"""Fused losses of the Generalized Focal Loss family for PyTorch."""

from ._version import __version__
from .dispatch import backends, use_backend
from .functional import (
    distribution_focal_loss,
    ia_bce_loss,
    integral,
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

__all__ = [
    "DistributionFocalLoss",
    "FocalLoss",
    "GFLLoss",
    "GFLLossOutput",
    "Integral",
    "QualityFocalLoss",
    "VarifocalLoss",
    "__version__",
    "backends",
    "distribution_focal_loss",
    "gfl_loss",
    "ia_bce_loss",
    "integral",
    "matchability_aware_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "task_aligned_loss",
    "use_backend",
    "varifocal_loss",
]
