"""What conftest.py changes in Triton's interpreter, with TRITON_INTERPRET=1.

It rounds as compilers do, and does not do again what has the same result every time.
"""

import dataclasses
import functools

import numpy as np
from triton.runtime import interpreter

_tl = interpreter.tl
_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def install():
    _round_as_compilers_do()
    _do_once()


def _round_as_compilers_do():
    # In Triton 3.6 a tensor is no index: NumPy 2.4 takes no array of one element as a number.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor

    # float32 is cut off to bfloat16, which every compiler rounds to nearest even.
    cast = _Builder.cast_impl

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (_tl.float32, _tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            nan = np.isnan(src.data)
            data = np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
            return _Handle(data.reshape(np.shape(src.data)), target)
        if (source, target) == (_tl.bfloat16, _tl.float32):
            data = (np.asarray(src.data).astype(np.uint32) << 16).view(np.float32)
            return _Handle(data, target)
        return cast(self, src, dst_type)

    _Builder.cast_impl = cast_impl

    # The product of an fma is rounded. That of two float32 is exact in float64.
    fma = _Builder.create_fma

    def create_fma(self, x, y, z):
        if x.dtype.scalar is not _tl.float32:
            return fma(self, x, y, z)
        wide = x.data.astype(np.float64) * y.data + z.data
        return _Handle(wide.astype(np.float32), _tl.float32)

    _Builder.create_fma = create_fma
    np.seterr(all="ignore")  # overflow and NaN are what the tests are about


def _do_once():
    # triton.language is scanned for builtins at every call of a kernel or a device function, and
    # restored after a kernel's. Nothing is compiled in this process: once for each module will do.
    scan = interpreter._patch_lang
    scanned = {}

    def patch_lang(fn):
        if fn.__module__ not in scanned:
            scanned[fn.__module__] = scan(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang

    # Each int32 sum is computed again in int64 for an assertion, which is dropped without `debug`.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # A table of eighteen types is built at every look-up.
    np_dtype = interpreter._get_np_dtype
    scalar_np_dtype = functools.cache(np_dtype)

    def get_np_dtype(tt_dtype):
        scalar = tt_dtype.scalar
        return np_dtype(tt_dtype) if scalar.is_ptr() else scalar_np_dtype(scalar)

    interpreter._get_np_dtype = get_np_dtype

    equal = _tl.dtype.__eq__
    _tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)

    # Two blocks of one type differ in nothing, two tensors of it in their handle alone.
    init_block, blocks = _tl.block_type.__init__, {}

    def init_block_type(self, element_ty, shape):
        key = element_ty.name, tuple(shape)
        if element_ty.is_ptr():
            init_block(self, element_ty, shape)
        elif key in blocks:
            self.__dict__.update(blocks[key])
        else:
            init_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    _tl.block_type.__init__ = init_block_type

    init, tensors = _tl.tensor.__init__, {}

    def init_tensor(self, handle, type):
        made = tensors.get(type.name)
        if made is None:
            init(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        else:
            self.__dict__.update(made)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    _tl.tensor.__init__ = init_tensor
