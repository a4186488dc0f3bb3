"""The Triton backend: a function per op, with the op's schema. Imported at its first use."""

from __future__ import annotations

from .decode import decode_boxes
from .distillation import distillation_backward, distillation_forward
from .distribution import distribution_backward, distribution_forward
from .head import head_backward, head_boxes, head_forward
from .quality import quality_backward, quality_forward
from .statistics import (
    integral_backward,
    integral_forward,
    moments_backward,
    moments_forward,
    statistics_backward,
    statistics_forward,
)

__all__ = [
    "decode_boxes",
    "distillation_backward",
    "distillation_forward",
    "distribution_backward",
    "distribution_forward",
    "head_backward",
    "head_boxes",
    "head_forward",
    "integral_backward",
    "integral_forward",
    "moments_backward",
    "moments_forward",
    "quality_backward",
    "quality_forward",
    "statistics_backward",
    "statistics_forward",
]
