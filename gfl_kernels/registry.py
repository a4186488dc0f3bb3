"""Imported by mmengine when a config names a type that begins with ``gfl_kernels.``"""

from mmdet.registry import MODELS as _PARENT
from mmengine.registry import Registry

from .adapters import mmdet

MODELS = Registry("model", parent=_PARENT, scope="gfl_kernels")
for _name, _kind in mmdet.registered().items():
    globals()[_name] = MODELS.register_module(name=_name, module=_kind)
