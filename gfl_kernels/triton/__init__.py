"""The Triton backend: a function per op, with the op's schema. Imported at its first use."""

from __future__ import annotations

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
