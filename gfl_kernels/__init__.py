"""Fused losses of the Generalized Focal Loss family for PyTorch."""

from ._version import __version__
from .dispatch import backends, use_backend
from .functional import (
    distribution_focal_loss,
    distribution_moments,
    distribution_statistics,
    integral,
    quality_focal_loss,
)
from .head import GFLLossOutput, gfl_loss, task_aligned_loss
from .modules import DistributionFocalLoss, GFLLoss, Integral, QualityFocalLoss
from .reference import DistributionMoments

__all__ = [
    "DistributionFocalLoss",
    "DistributionMoments",
    "GFLLoss",
    "GFLLossOutput",
    "Integral",
    "QualityFocalLoss",
    "__version__",
    "backends",
    "distribution_focal_loss",
    "distribution_moments",
    "distribution_statistics",
    "gfl_loss",
    "integral",
    "quality_focal_loss",
    "task_aligned_loss",
    "use_backend",
]
