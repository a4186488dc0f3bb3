"""Fused losses under existing heads: one line in, one line out.

from gfl_kernels.adapters import accelerate, restore

print(accelerate("mmdet"))  # from here on, until restore("mmdet")

with accelerate("ultralytics"):  # or for a block
    ...

accelerate(model)  # one model, or a Python module that defines such losses
"""

from .core import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
