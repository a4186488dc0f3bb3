"""What the tests share: backends, the tolerance table, "no worse than eager", and layouts.

Truth is `gfl_kernels.reference` in float64 on the same (already rounded) inputs; eager is the same
reference in the tested dtype. The reference itself is judged in test_reference.py against scalar
loops over mpmath.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forks
import pytest
import torch

import gfl_kernels
from gfl_kernels import dispatch, reference

# Whether Triton interprets its kernels is settled once per process: `make test` runs the suite a
# second time, with TRITON_INTERPRET=1 and for this backend alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Interpreted, a launch takes a tenth of a second, and under compute-sanitizer (`make sanitize-gpu`)
# everything takes long: loops within a test take fewer of their values there.
THINNED = INTERPRETED or os.environ.get("GFL_TEST_THINNED") == "1"

# Backend name -> device its tensors live on. A new backend joins the whole suite by one line here.
BACKENDS = {"reference": "cpu", "cpu": "cpu"}
if INTERPRETED or torch.cuda.is_available():
    BACKENDS["triton"] = "cpu" if INTERPRETED else "cuda"
if torch.cuda.is_available():
    BACKENDS["cuda"] = "cuda"
FUSED = tuple(name for name in BACKENDS if name != "reference")

# The one tolerance table, by the dtype of the value that is compared (a loss of half logits is
# float32). RTOL of the half types is half a unit in the last place, the best any rounding can
# promise; float32's is what a product of three factors gets from an exp and a log1p that are each
# good to 3e-7.
ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
RTOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)

INF = float("inf")
NAN = float("nan")


def stacked_moments(pred, **kwargs):
    """The three of distribution_moments as one tensor [..., 3]."""
    return torch.stack(gfl_kernels.distribution_moments(pred, **kwargs), dim=-1)


def stacked_reference_moments(pred, **kwargs):
    return torch.stack(reference.distribution_moments(pred, **kwargs), dim=-1)


def on_reference(function):
    def call(*args, **kwargs):
        with gfl_kernels.use_backend("reference"):
            return function(*args, **kwargs)

    return call


PUBLIC = {
    "quality": gfl_kernels.quality_focal_loss,
    "varifocal": gfl_kernels.varifocal_loss,
    "matchability": gfl_kernels.matchability_aware_loss,
    "ia_bce": gfl_kernels.ia_bce_loss,
    "focal": gfl_kernels.sigmoid_focal_loss,
    "distribution": gfl_kernels.distribution_focal_loss,
    "integral": gfl_kernels.integral,
    "statistics": gfl_kernels.distribution_statistics,
    "moments": stacked_moments,
    "distillation": gfl_kernels.localization_distillation_loss,
}
ORACLE = {
    **{name: on_reference(function) for name, function in PUBLIC.items()},
    "quality": reference.quality_focal_loss,
    "distribution": reference.distribution_focal_loss,
    "integral": reference.integral,
    "statistics": reference.distribution_statistics,
    "moments": stacked_reference_moments,
    "distillation": reference.localization_distillation_loss,
}

# The rest of the quality family: name -> (op, keyword arguments), every form and flag once.
FAMILY = {
    "varifocal": ("varifocal", {}),
    "varifocal_detached": ("varifocal", {"alpha": 0.2, "detach_weight": True}),
    "varifocal_unit": ("varifocal", {"iou_weighted": False, "gamma": 1.5}),
    "varifocal_probability": ("varifocal", {"activated": True}),
    "focal": ("focal", {}),
    "focal_plain": ("focal", {"alpha": -1, "gamma": 1.5}),
    "focal_probability": ("focal", {"activated": True}),
    "matchability": ("matchability", {}),
    "ia_bce": ("ia_bce", {}),
    "position_supervised": ("balanced", {"alpha": 0.3}),
}
PUBLIC["balanced"] = gfl_kernels.quality_focal_loss
ORACLE["balanced"] = on_reference(gfl_kernels.quality_focal_loss)


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def fused(self) -> bool:
        return self.name != "reference"


def why_not(name: str) -> str | None:
    """None if the backend is usable, else the reason backends() gives."""
    reason = gfl_kernels.backends()[name]
    return None if reason == "ok" else reason


def expected(name: str) -> bool:
    """Whether the backend has to be usable, so that its absence is a failure, not a skip: CI says
    so where the library has been built, and `make test-gpu` where there is a GPU.
    """
    if name in ("triton", "cuda") and torch.cuda.is_available():
        return os.environ.get("GFL_TEST_EXPECT_GPU") == "1" and not (
            name == "cuda" and torch.version.hip
        )
    return name == "cpu" and os.environ.get("GFL_TEST_EXPECT_NATIVE") == "1"


def need(name):
    """Skip where a backend is not usable, fail where it has to be."""
    reason = why_not(name)
    if reason is None:
        return
    if expected(name):
        pytest.fail(f"backend {name!r} is expected here, but not usable: {reason}")
    pytest.skip(f"backend {name!r} is not usable: {reason}")


def force(name):
    """A backend by name; "cpu-python" is "cpu" where gfl_kernels._autograd does not fit torch."""
    name, _, in_python = name.partition("-")
    need(name)
    here = Backend(name, BACKENDS[name])
    # Tensors that a test makes without saying where lie where the backend wants them.
    place = contextlib.nullcontext() if here.device == "cpu" else torch.device(here.device)
    with pytest.MonkeyPatch.context() as patch, gfl_kernels.use_backend(name), place:
        if in_python:
            patch.setattr(dispatch, "_autograd", None)
        yield here


def to_double(value):
    """Float tensors (also inside tuples and dicts) to float64; labels, numbers and None as they
    are.
    """
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(to_double(item) for item in value)
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return value


def on_cpu(function):
    """A maker of inputs (a tensor, a tuple of them, or what has a method to convert its own) whose
    random numbers come of the CPU's generators: the same wherever they go, which is the default
    device or the one it is told."""

    @functools.wraps(function)
    def call(*args, device=None, **kwargs):
        device = device or torch.get_default_device()
        with torch.device("cpu"):
            made = function(*args, **kwargs)
        if isinstance(made, tuple):
            return tuple(t.to(device) for t in made)
        return made.to(device if isinstance(made, torch.Tensor) else lambda t: t.to(device))

    return call


def moved(value, device):
    """Tensors (also inside tuples and dicts) on another device as they are: the same strides, and
    around them the same memory, which .to(device) would leave out."""
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.device.type == device:
        return value
    memory = value.untyped_storage().to(device=torch.device(device))
    empty = torch.empty(0, dtype=value.dtype, device=device)
    return empty.set_(memory, value.storage_offset(), value.shape, value.stride())


def evaluate(function, pred, upstream, args, kwargs):
    """(value, gradient of sum(value * upstream) with respect to pred) on a fresh leaf of the same
    strides.
    """
    leaf = pred.detach().requires_grad_()
    value = function(leaf, *args, **kwargs)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


def random_upstream(value, seed=0):
    """Non-uniform upstream gradient of value's shape; never ones, both signs, no zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        size = torch.rand(value.shape, generator=generator) * 1.5 + 0.25
        sign = torch.where(torch.rand(value.shape, generator=generator) < 0.3, -1.0, 1.0)
    return (size * sign).to(value.dtype).to(value.device)


def assert_no_worse(got, truth, eager, *, what, scale=1.0):
    """R15: err <= 2 * eager_err + ATOL * scale + RTOL * |truth|; where truth is NaN or infinite,
    got must be the same.
    """
    assert got.shape == truth.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    dtype = got.dtype
    got, truth, eager = got.double(), truth.double(), eager.double()
    # A value beyond the dtype's range rounds to infinity: compare what the dtype can hold.
    representable = truth.to(dtype).double()
    truth = torch.where(representable.isinf(), representable, truth)
    special = ~truth.isfinite()
    same = torch.where(truth.isnan(), got.isnan(), got == truth)
    err, eager_err = (got - truth).abs(), (eager - truth).abs()
    bound = (
        2 * torch.where(eager_err.isfinite(), eager_err, 0.0)
        + ATOL[dtype] * scale
        + RTOL[dtype] * truth.abs()
    )
    # Where eager itself leaves the range on the way (a spread of 6e38), the same end is no worse.
    like_eager = ~eager.isfinite() & ((got == eager) | (got.isnan() & eager.isnan()))
    good = torch.where(special, same, (err <= bound) | like_eager)
    if not bool(good.all()):
        over = torch.where(
            good, -1.0, torch.where(err.isfinite(), err / bound.clamp(min=1e-300), INF)
        )
        at = int(over.argmax())
        index = (
            tuple(int(i) for i in torch.unravel_index(torch.tensor(at), got.shape))
            if got.dim()
            else ()
        )
        raise AssertionError(
            f"{what} ({dtype}): {int((~good).sum())} of {good.numel()} values out of bounds; "
            f"worst at {index}: "
            f"got {float(got.flatten()[at])!r}, truth {float(truth.flatten()[at])!r}, "
            f"eager {float(eager.flatten()[at])!r}, allowed error {float(bound.flatten()[at]):.3g}"
        )


def gradcheck(function, leaves, **options):
    """torch.autograd.gradcheck; interpreted, along random directions instead of every axis."""
    return torch.autograd.gradcheck(function, leaves, fast_mode=INTERPRETED, **options)


def check_op(op, pred, *args, seed=0, upstream=None, scale=1.0, grad_scale=None, what="", **kwargs):
    """Value and gradient of the public function against truth and eager; returns both."""
    function, oracle = PUBLIC[op], ORACLE[op]
    if upstream is None:
        upstream = random_upstream(oracle(pred.detach(), *args, **kwargs), seed)
    got, got_grad = evaluate(function, pred, upstream, args, kwargs)
    truth, truth_grad = evaluate(
        oracle, pred.double(), upstream.double(), to_double(args), to_double(kwargs)
    )
    eager, eager_grad = evaluate(oracle, pred, upstream, args, kwargs)
    what = f"{op} {what} pred {tuple(pred.shape)} strides {pred.stride()}"
    expected = torch.float64 if pred.dtype == torch.float64 else torch.float32
    assert got.dtype == expected, f"{what}: value is {got.dtype}, expected {expected}"
    assert got_grad.dtype == pred.dtype, (
        f"{what}: gradient is {got_grad.dtype}, expected {pred.dtype}"
    )
    assert_no_worse(got, truth, eager, what=f"{what}: value", scale=scale)
    # ATOL is for gradients of order 1: an upstream gradient of another size moves it (grad_scale).
    grad_scale = scale if grad_scale is None else grad_scale
    assert_no_worse(got_grad, truth_grad, eager_grad, what=f"{what}: gradient", scale=grad_scale)
    return got, got_grad


# ---- inputs


def combinations(*axes):
    """Every combination of the axes' values; THINNED, only so many that every value occurs."""
    return cycled(*axes) if THINNED else list(itertools.product(*axes))


def thinned(values, which, of=3):
    """All values; THINNED, one in so many, from number `which` on."""
    return values[which % of :: of] if THINNED else values


def cycled(*axes):
    """As many combinations as the longest axis has values; the others begin again."""
    longest = max(map(len, axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(longest)]


EXTREME = (
    0.0,
    20.0,
    -20.0,
    33.0,
    -33.0,
    90.0,
    -90.0,
    95.0,
    -95.0,
    1e4,
    -1e4,
    17.0,
    -17.0,
    1e-3,
    -1e-3,
)


@on_cpu
def logits(*shape, dtype=torch.float32, seed=0, spread=3.0, extremes=True):
    """Normal logits with, by default, one element in six replaced by an extreme value (finite in
    every dtype).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    if extremes and x.numel():
        pick = torch.tensor(EXTREME, dtype=torch.float64)[
            torch.randint(len(EXTREME), shape, generator=generator)
        ]
        x = torch.where(torch.rand(shape, generator=generator) < 1 / 6, pick, x)
    return x.to(dtype)


@on_cpu
def sparse_target(
    row_shape, classes, *, seed=0, label_dtype=torch.int64, score_dtype=torch.float32
):
    """(label, score): a third positives, the rest C, -1 and 255 where the dtype holds them; scores
    0, 1 and interior.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    label = torch.randint(classes, row_shape, generator=generator)
    outside = [classes, 255, classes + 1000] + ([-1, -2] if label_dtype != torch.uint8 else [])
    info = (
        torch.iinfo(label_dtype)
        if not (label_dtype.is_floating_point or label_dtype == torch.bool)
        else None
    )
    if info is not None:
        outside = [value for value in outside if info.min <= value <= info.max]
        label = label.clamp(max=info.max)
    if outside:
        background = torch.tensor(outside)[
            torch.randint(len(outside), row_shape, generator=generator)
        ]
        label = torch.where(torch.rand(row_shape, generator=generator) < 2 / 3, background, label)
    flat = label.view(-1)
    if flat.numel() > 1:
        # The first and the last class always occur: these are the ends a masked vector tail gets
        # wrong.
        flat[0], flat[-1] = 0, min(classes - 1, 127)
    score = torch.rand(row_shape, generator=generator)
    which = torch.rand(row_shape, generator=generator)
    score = torch.where(which < 0.1, 0.0, torch.where(which < 0.2, 1.0, score))
    return label.to(label_dtype), score.to(score_dtype)


@on_cpu
def dense_target(row_shape, classes, *, seed=0, dtype=torch.float32):
    """Soft targets [..., C]: mostly 0, some 1, the rest interior."""
    generator = torch.Generator().manual_seed(seed + 2)
    target = torch.rand((*row_shape, classes), generator=generator)
    which = torch.rand(target.shape, generator=generator)
    target = torch.where(which < 0.6, 0.0, torch.where(which < 0.7, 1.0, target))
    return target.to(dtype)


@on_cpu
def row_weight(shape, *, seed=0, dtype=torch.float32):
    """Weights in [0, 2), a quarter of them exactly 0."""
    generator = torch.Generator().manual_seed(seed + 3)
    weight = torch.rand(shape, generator=generator) * 2
    return torch.where(torch.rand(shape, generator=generator) < 0.25, 0.0, weight).to(dtype)


@on_cpu
def bin_target(row_shape, bins, *, seed=0, dtype=torch.float32):
    """DFL targets in bins: interior, integers, both ends, and a little beyond both ends."""
    generator = torch.Generator().manual_seed(seed + 4)
    target = torch.rand(row_shape, generator=generator) * (bins - 1)
    which = torch.rand(row_shape, generator=generator)
    target = torch.where(which < 0.2, target.floor(), target)
    target = torch.where((which >= 0.2) & (which < 0.3), float(bins - 1), target)
    target = torch.where((which >= 0.3) & (which < 0.35), bins - 1 + 0.6, target)
    target = torch.where((which >= 0.35) & (which < 0.4), -0.4, target)
    return target.to(dtype)


@on_cpu
def explicit_target(row_shape, bins, *, seed=0):
    """(left, weight_left, weight_right) with weights that do not sum to 1, as non-uniform bins
    need.
    """
    generator = torch.Generator().manual_seed(seed + 5)
    left = torch.randint(bins - 1, row_shape, generator=generator)
    weights = torch.rand((2, *row_shape), generator=generator)
    return left, weights[0], weights[1]


# ---- layouts. Each takes the logical values [B, H, W, C] and lays them out; `back` undoes it to
# rows [B*H*W, C].


@dataclasses.dataclass(frozen=True)
class Laid:
    pred: torch.Tensor
    dim: int
    row_shape: tuple[int, ...]

    def back(self, tensor):
        """A tensor of pred's shape as rows [R, C] in the logical order."""
        return tensor.movedim(self.dim, -1).reshape(-1, tensor.shape[self.dim])


def _into(view, values):
    view.copy_(values)
    return view


def poison(*shapes_and_dtypes):
    """Leave NaN in the allocator's free blocks of these sizes, so that an output never written is
    not 0 by luck.
    """
    for _ in range(3):
        blocks = [
            torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in shapes_and_dtypes
        ]
        del blocks


def _poisoned(*shape, like):
    """Storage around a view is NaN: a kernel that reads outside the view shows it."""
    return torch.full(shape, NAN, dtype=like.dtype, device=like.device)


def lay_out(name, x):
    batch, height, width, classes = x.shape
    rows = batch * height * width
    flat = x.reshape(rows, classes)
    if name == "contiguous":
        return Laid(flat.contiguous(), -1, (rows,))
    if name == "transposed":
        return Laid(flat.t().contiguous().t(), -1, (rows,))
    if name == "column_slice":
        return Laid(
            _into(_poisoned(rows, classes + 5, like=x)[:, 3 : 3 + classes], flat), -1, (rows,)
        )
    if name == "misaligned":
        return Laid(
            _into(_poisoned(rows * classes + 1, like=x)[1:].view(rows, classes), flat), -1, (rows,)
        )
    if name == "every_second_row":
        return Laid(_into(_poisoned(2 * rows, classes, like=x)[::2], flat), -1, (rows,))
    if name == "every_second_column":
        return Laid(_into(_poisoned(rows, 2 * classes + 1, like=x)[:, 1::2], flat), -1, (rows,))
    if name == "four_dim":
        return Laid(x.contiguous(), -1, (batch, height, width))
    if name == "nchw":
        return Laid(x.permute(0, 3, 1, 2).contiguous(), 1, (batch, height, width))
    if name == "channels_last":
        nchw = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return Laid(nchw, 1, (batch, height, width))
    if name == "nchw_permuted":
        return Laid(
            x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), -1, (batch, height, width)
        )
    if name == "nchw_channel_slice":
        wide = _poisoned(batch, classes + 4, height, width, like=x)
        return Laid(_into(wide[:, 4:], x.permute(0, 3, 1, 2)), 1, (batch, height, width))
    if name == "middle":
        middle = flat.view(batch, height * width, classes).transpose(1, 2).contiguous()
        return Laid(middle, 1, (batch, height * width))
    if name == "middle_of_rows":
        return Laid(
            flat.contiguous().view(batch, height * width, classes).transpose(1, 2),
            1,
            (batch, height * width),
        )
    if name == "first":
        return Laid(flat.t().contiguous(), 0, (rows,))
    if name == "negative_dim":
        return Laid(x.permute(0, 3, 1, 2).contiguous(), -3, (batch, height, width))
    if name == "width_cropped":
        wide = _poisoned(batch, height, width + 3, classes, like=x)
        return Laid(_into(wide[:, :, 2 : 2 + width], x), -1, (batch, height, width))
    raise KeyError(name)


LAYOUTS = (
    "contiguous transposed column_slice misaligned every_second_row every_second_column four_dim "
    "nchw channels_last nchw_permuted nchw_channel_slice middle middle_of_rows first negative_dim "
    "width_cropped"
).split()
DENSE_LAYOUTS = (
    "contiguous transposed misaligned four_dim nchw channels_last nchw_permuted middle "
    "middle_of_rows first negative_dim"
).split()


# ---- subprocesses


_forks = forks.Server()


def run_python(code_or_args, *, timeout=300, fresh=False, **env):
    """Another interpreter on this one's gfl_kernels: what is read once at import needs it.

    env values of None remove the variable. The working folder holds no package of that name. It has
    torch imported and nothing else, unless it is a fresh one.
    """
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else list(code_or_args)
    merged = {key: value for key, value in {**os.environ, **env}.items() if value is not None}
    found_in = str(Path(gfl_kernels.__file__).resolve().parent.parent)
    folder = Path(__file__).resolve().parent
    if not fresh and hasattr(os, "fork"):
        with tempfile.TemporaryDirectory() as scratch:
            return _forks.run(args, merged, [found_in], folder, Path(scratch), timeout)
    merged["PYTHONPATH"] = os.pathsep.join(filter(None, (found_in, merged.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *args],
        env=merged,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
