"""The CUDA C++ backend without a GPU: the plans of the compiled library, run on ptxsim.

The library computes each launch (kernel, grid, block, arguments) as it would on a GPU; the kernels
are the PTX in it or, if that is of other GPUs, what nvcc makes of the sources. Tensors are CPU
tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from pathlib import Path
from unittest import mock

import ptxsim
import torch

import gfl_kernels
from gfl_kernels import dispatch, native, ops

CSRC = Path(__file__).resolve().parent.parent / "csrc"
WORKSPACE = 4096  # doubles
OPTIONS = ("-std=c++17",)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int32),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    ]


def _struct(views, *others):
    fields = [(name, ctypes.POINTER(_View)) for name in views.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, *others]})


HEAD_LISTS = ("cls", "box", "points", "labels", "box_targets", "targets", "label_weights")
_SCALE = ("scale", ctypes.c_double)
ARGUMENTS = {  # as in gfl_kernels.h
    "quality": _struct(
        "pred target score weight avg_factor grad_loss loss grad",
        ("form", ctypes.c_int),
        ("beta", ctypes.c_double),
        _SCALE,
        ("alpha", ctypes.c_double),
        ("flags", ctypes.c_int32),
    ),
    "distribution": _struct(
        "pred target weight_left weight_right weight avg_factor grad_loss loss grad", _SCALE
    ),
    "integral": _struct(
        "pred bins grad_out out grad saved", ("mode", ctypes.c_int32), ("window", ctypes.c_int32)
    ),
    "statistics": _struct(
        "pred grad_out out grad", ("topk", ctypes.c_int32), ("add_mean", ctypes.c_int32)
    ),
    "moments": _struct("pred bins grad_out out grad"),
    "distillation": _struct(
        "pred teacher weight avg_factor grad_loss loss grad",
        ("temperature", ctypes.c_double),
        _SCALE,
    ),
    "decode": _struct(
        "pred points strides bins cls limits boxes deviation score label",
        *((name, ctypes.c_double) for name in ("stride", "height", "width")),
        ("window", ctypes.c_int64),
    ),
}
_VIEWS = ctypes.POINTER(_View)


class _HeadArguments(ctypes.Structure):
    _fields_ = [
        ("levels", ctypes.c_int32),
        *((name, _VIEWS) for name in HEAD_LISTS),
        ("strides", ctypes.POINTER(ctypes.c_double)),
        ("iou", ctypes.c_int),
        ("iou_eps", ctypes.c_double),
        ("limit", ctypes.c_double),
        *((name, _VIEWS) for name in ("quality", "weight", "sums", "normalisers", "boxes")),
        ("form", ctypes.c_int),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("loss_weights", ctypes.c_double * 3),
        ("losses", _VIEWS * 6),
        ("grad_losses", _VIEWS * 6),
        ("grad_cls", _VIEWS),
        ("grad_box", _VIEWS),
    ]


class _Argument(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("offset", "size", "is_pointer")]


class _Launch(ctypes.Structure):  # as in csrc/cuda/plan.h
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("family", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("variant", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("arguments", _Argument * 16),
        ("_padding", ctypes.c_int32),
        ("bytes", ctypes.c_ubyte * 4096),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("launches", _Launch * 4)]


def view(tensor):
    if tensor is None:
        return None
    dims = tensor.dim()
    sizes, strides = (
        (ctypes.c_int64 * dims)(*tensor.shape),
        (ctypes.c_int64 * dims)(*tensor.stride()),
    )
    return ctypes.pointer(
        _View(tensor.data_ptr(), DTYPES.index(tensor.dtype), dims, sizes, strides)
    )


def plan(family, workspace, numbers=None, **tensors):
    """The launches the library computes for a call."""
    arguments = ARGUMENTS[family](
        **{name: view(tensor) for name, tensor in tensors.items() if tensor is not None},
        **(numbers or {}),
    )
    sums = family in ("quality", "distribution", "distillation")
    address = [ctypes.c_void_p(workspace.data_ptr())] if sums else []
    return _launches(f"gfl_{family}_cuda_plan", arguments, *address)


def _launches(function, arguments, *others):
    library = native.library()
    library.gfl_cuda_plan_bytes.restype = ctypes.c_int64
    assert library.gfl_cuda_plan_bytes() == ctypes.sizeof(_Plan)
    result = _Plan()
    if getattr(library, function)(ctypes.byref(arguments), *others, ctypes.byref(result)):
        raise ValueError(library.gfl_last_error().decode())
    return list(result.launches[: result.count])


def head_arguments(lists, box_options, **others):
    """gfl_head_args. lists: those of the schemas, in their order; others: members of the struct by
    name, tensors, sequences of six losses, and lists of gradients."""
    strides, iou, iou_eps, limit = box_options

    def views(tensors):
        tensors = list(tensors or ())
        return (_View * len(tensors))(*(view(t).contents for t in tensors)) if tensors else None

    arguments = _HeadArguments(
        levels=len(lists[0]),
        strides=(ctypes.c_double * len(strides))(*strides),
        iou=iou,
        iou_eps=iou_eps,
        limit=limit,
        **{name: views(tensors) for name, tensors in zip(HEAD_LISTS, lists, strict=True)},
    )
    for name, value in others.items():
        if name in ("losses", "grad_losses"):
            value = (_VIEWS * 6)(*(view(t) for t in value))
        elif name in ("grad_cls", "grad_box"):
            value = views(value)
        elif name == "loss_weights":
            value = (ctypes.c_double * 3)(*value)
        elif not isinstance(value, (int, float)):
            value = view(value)
        setattr(arguments, name, value)
    return arguments


def plan_head(function, arguments, workspace):
    return _launches(f"{function}_plan", arguments, ctypes.c_void_p(workspace.data_ptr()))


def head_workspace(arguments):
    library = native.library()
    library.gfl_head_cuda_workspace_bytes.restype = ctypes.c_int64
    size = library.gfl_head_cuda_workspace_bytes(ctypes.byref(arguments))
    if size < 0:
        raise ValueError(library.gfl_last_error().decode())
    return torch.full((size // 8,), float("nan"), dtype=torch.float64)


@functools.cache
def _entries(file, arch):
    """What nvcc makes of a source, see _split."""
    # The cache of ptxsim does not see headers in other folders than the source's.
    above = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(CSRC.glob("*.h"))))
    text = ptxsim.compile_ptx(
        file, f"sm_{arch}", [CSRC / "include"], {"GFL_HEADERS": above.hexdigest()}, OPTIONS
    )
    return _split(text)


def _split(text):
    """Demangled name -> PTX with this kernel alone: to parse them all takes 15 seconds."""
    # Into which function a line was inlined stands in a table that is left out here.
    text = re.sub(r"^(\s*\.loc\s[^,\n]*),.*", r"\1", text, flags=re.M)
    head, *entries = re.split(r"^(?=(?:\.visible )?\.entry )", text, flags=re.M)
    entries[-1], end, _ = entries[-1].partition("\n}\n")
    entries[-1] += end
    files = "".join(re.findall(r"^\.file.*\n|^\t\.file.*\n", text, re.M))
    names = ptxsim.demangle_all([re.search(r"\.entry (\w+)", entry)[1] for entry in entries])
    return {name: f"{head}{entry}{files}\n" for name, entry in zip(names, entries, strict=True)}


def _objdump(option):
    """(arch, text) of each part of the library that cuobjdump finds."""
    library = Path(gfl_kernels.__file__).parent / "lib" / "libgfl_native.so"
    text = ptxsim.run_tool("cuobjdump", option, library)
    parts = re.split(r"^Fatbin (?:elf|ptx) code:\n=+\n", text, flags=re.M)[1:]
    return [(int(re.match(r"arch = sm_(\d+)", part)[1]), part) for part in parts]


@functools.cache
def _shipped(arch):
    """As _entries, of the library; empty if it has no PTX of that arch."""
    try:
        parts = [text for which, text in _objdump("-ptx") if which == arch and ".entry" in text]
    except ptxsim.PtxSimError:
        return {}
    found = {}
    for text in parts:
        found |= _split(text[text.index(".version") :])
    return found


@functools.cache
def _resources(arch):
    usage = [
        found
        for which, text in _objdump("-res-usage")
        if which == arch
        for found in re.findall(r"Function (\w+):\n(.*)", text)
    ]
    names = ptxsim.demangle_all([name for name, _ in usage])
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, (_, line) in zip(names, usage, strict=True)
    }


def resources(name, arch=90):
    """REG, STACK, LOCAL, ... of a kernel in the library; PtxSimError if that is not known."""
    if not _resources(arch):
        raise ptxsim.PtxSimError(f"the library has no SASS for sm_{arch}")
    return _of(_resources(arch), name)


def _of(entries, name):
    found = [value for full, value in entries.items() if f"::{name}(" in full]
    assert len(found) == 1, (name, list(entries))
    return found[0]


def ptx(name, arch=90):
    """Of the source, with its lines."""
    defined = re.compile(rf"^ +{name.partition('<')[0]}\(", re.M)  # below its __global__
    (file,) = (f for f in sorted((CSRC / "cuda").glob("*.cu")) if defined.search(f.read_text()))
    return _of(_entries(file, arch), name)


@functools.cache
def kernel(name, arch=90):
    shipped = _shipped(arch)
    text = _of(shipped, name) if shipped else ptx(name, arch)
    (result,) = ptxsim.parse(text).kernels.values()
    return result


def why_not():
    """Why the kernels cannot be run here; None if they can."""
    if not native.build_info().get("cuda_architectures"):
        return f"the library has no CUDA part: {native.cuda_why_not()}"
    try:
        ptxsim.nvcc("\n__global__ void nothing() {}\n")
    except ptxsim.CompileError as error:
        return str(error)
    return None


class SimulatedCuda:
    """As a context manager: the forced backend "cuda" serves CPU tensors.

    `launches` and `reports` hold one entry per launch."""

    def __init__(self, arch=90, **options):
        self.arch, self.launch_options = arch, {"isolate": True, "check_races": True, **options}
        self.reports, self.launches = [], []

    def __enter__(self):
        why_not, obstacle, implementation = (
            dispatch._why_not,
            dispatch._obstacle,
            dispatch.implementation,
        )
        self._patches = [
            mock.patch.object(
                dispatch, "_why_not", lambda name: None if name == "cuda" else why_not(name)
            ),
            mock.patch.object(
                dispatch,
                "_obstacle",
                lambda name, *args, **kwargs: obstacle(
                    "cpu" if name == "cuda" else name, *args, **kwargs
                ),
            ),
            mock.patch.object(
                dispatch,
                "implementation",
                lambda backend, name: (
                    getattr(self, name) if backend == "cuda" else implementation(backend, name)
                ),
            ),
        ]
        for patch in self._patches:
            patch.start()
        self._forced = gfl_kernels.use_backend("cuda")
        return self

    def __exit__(self, *exception):
        self._forced.__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def launch(self, name, *arguments, **options):
        return kernel(name, self.arch).launch(*arguments, **options)

    def run(self, family, numbers=None, **tensors):
        workspace = torch.full((WORKSPACE,), float("nan"), dtype=torch.float64)
        launches = plan(family, workspace, numbers, **tensors)
        if not launches and tensors.get("loss") is not None:
            tensors["loss"].zero_()  # csrc/cuda/launch.cpp
        self._launch_all(launches, {**tensors, "workspace": workspace})

    def _launch_all(self, launches, tensors):
        at = {t.data_ptr(): (name, t) for name, t in tensors.items() if t is not None}
        at.pop(0, None)  # of what is empty
        for launch in launches:
            names, values = [], []
            data = bytes(launch.bytes)
            for i, argument in enumerate(launch.arguments[: launch.count]):
                value = data[argument.offset : argument.offset + argument.size]
                name = f"argument{i}"
                if argument.is_pointer:
                    address = int.from_bytes(value, "little")
                    name, value = at[address] if address else (name, None)
                else:
                    words = enumerate(memoryview(value[: len(value) // 8 * 8]).cast("Q"))
                    value = ptxsim.Packed(value, [(8 * w, *at[x]) for w, x in words if x in at])
                names.append(name)
                values.append(value)
            self.launches.append(launch)
            size = (launch.grid, launch.block, values, launch.shared_bytes)
            self.reports.append(
                self.launch(launch.name.decode(), *size, names=names, **self.launch_options)
            )

    def run_head(self, function, arguments, tensors):
        """tensors: those that arguments were made of; lists have an entry per level."""
        workspace = head_workspace(arguments)
        named = {"workspace": workspace}
        for name, value in tensors.items():
            if isinstance(value, (list, tuple)):
                named |= {f"{name}.{i}": t for i, t in enumerate(value)}
            else:
                named[name] = value
        self._launch_all(plan_head(function, arguments, workspace), named)

    # The ops, as csrc/ops.h implements them.

    def quality_forward(
        self, pred, target, score, weight, avg, form, flags, alpha, beta, scale, reduction,
        write_grad
    ):  # fmt: skip
        loss, grad = _outputs(pred, reduction, write_grad)
        tensors = {"pred": pred, "target": target, "score": score, "weight": weight}
        numbers = {"form": form, "flags": flags, "alpha": alpha, "beta": beta}
        numbers["scale"] = _scale(pred, scale, reduction)
        grad_ = grad if write_grad else None
        self.run("quality", numbers, **tensors, avg_factor=avg, loss=loss, grad=grad_)
        return loss, grad

    def quality_backward(
        self, upstream, pred, target, score, weight, avg, form, flags, alpha, beta, scale,
        reduction
    ):  # fmt: skip
        grad = torch.empty_like(pred)
        tensors = {"pred": pred, "target": target, "score": score, "weight": weight}
        numbers = {"form": form, "flags": flags, "alpha": alpha, "beta": beta}
        numbers["scale"] = _scale(pred, scale, reduction)
        self.run("quality", numbers, **tensors, avg_factor=avg, grad_loss=upstream, grad=grad)
        return grad

    def distribution_forward(
        self, pred, target, left, right, weight, avg, scale, reduction, write_grad
    ):
        loss, grad = _outputs(pred, reduction, write_grad)
        tensors = {"pred": pred, "target": target, "weight_left": left, "weight_right": right}
        numbers = {"scale": _scale(pred, scale, reduction)}
        tensors |= {"weight": weight, "avg_factor": avg}
        grad_ = grad if write_grad else None
        self.run("distribution", numbers, **tensors, loss=loss, grad=grad_)
        return loss, grad

    def distribution_backward(
        self, upstream, pred, target, left, right, weight, avg, scale, reduction
    ):
        grad = torch.empty_like(pred)
        tensors = {"pred": pred, "target": target, "weight_left": left, "weight_right": right}
        numbers = {"scale": _scale(pred, scale, reduction)}
        tensors |= {"weight": weight, "avg_factor": avg}
        self.run("distribution", numbers, **tensors, grad_loss=upstream, grad=grad)
        return grad

    def integral_forward(self, pred, bins, window=-1, save=False):
        out = self._summary("integral", ops.new_integral(pred), _peak(window), pred, bins=bins)
        return out, ops.new_saved(pred, save).zero_()

    def integral_backward(self, upstream, pred, bins, window=-1, saved=None):
        return self._gradient("integral", upstream, _peak(window), pred, bins=bins)

    def statistics_forward(self, pred, topk, add_mean):
        numbers = {"topk": topk, "add_mean": add_mean}
        out = ops.new_statistics(pred, topk, add_mean)
        return self._summary("statistics", out, numbers, pred)

    def statistics_backward(self, upstream, pred, topk, add_mean):
        numbers = {"topk": topk, "add_mean": add_mean}
        return self._gradient("statistics", upstream, numbers, pred)

    def moments_forward(self, pred, bins):
        return self._summary("moments", ops.new_moments(pred), {}, pred, bins=bins)

    def moments_backward(self, upstream, pred, bins):
        return self._gradient("moments", upstream, {}, pred, bins=bins)

    def _summary(self, family, out, numbers, pred, **tensors):
        self.run(family, numbers, pred=pred, out=out.fill_(float("nan")), **tensors)
        return out

    def _gradient(self, family, upstream, numbers, pred, **tensors):
        grad = torch.empty_like(pred)
        self.run(family, numbers, pred=pred, grad_out=upstream, grad=grad, **tensors)
        return grad

    def distillation_forward(
        self, pred, teacher, weight, avg, temperature, scale, reduction, write_grad
    ):
        loss, grad = _outputs(pred, reduction, write_grad)
        tensors = {"pred": pred, "teacher": teacher, "weight": weight, "avg_factor": avg}
        numbers = {"temperature": temperature, "scale": _scale(pred, scale, reduction)}
        self.run("distillation", numbers, **tensors, loss=loss, grad=grad if write_grad else None)
        return loss, grad

    def distillation_backward(
        self, upstream, pred, teacher, weight, avg, temperature, scale, reduction
    ):
        grad = torch.empty_like(pred)
        tensors = {"pred": pred, "teacher": teacher, "weight": weight, "avg_factor": avg}
        numbers = {"temperature": temperature, "scale": _scale(pred, scale, reduction)}
        self.run("distillation", numbers, **tensors, grad_loss=upstream, grad=grad)
        return grad

    def decode_boxes(self, *args):
        pred, points, strides, bins, cls, limits, stride, size, window, write_deviation = args
        boxes, score, label, deviation = ops._fake_decode_boxes(*args)
        for t in (boxes, score, deviation):
            t.fill_(float("nan"))
        height, width = size or (-1.0, -1.0)
        tensors = {"pred": pred, "points": points, "strides": strides, "bins": bins, "cls": cls}
        tensors |= {"limits": limits, "boxes": boxes}
        if write_deviation:
            tensors["deviation"] = deviation
        if cls is not None:
            tensors |= {"score": score, "label": label}
        numbers = {"stride": stride, "height": height, "width": width, "window": window}
        self.run("decode", numbers, **tensors)
        return boxes, score, label, deviation

    def head_boxes(self, *args):
        lists, (strides, iou, eps, limit, write_boxes) = args[:7], args[7:]
        results = [t.fill_(float("nan")) for t in ops._fake_head_boxes(*args)]
        names = ("quality", "weight", "sums", "normalisers", "boxes")
        tensors = dict(zip(names, results, strict=True))
        if not write_boxes:
            del tensors["boxes"]
        arguments = head_arguments(lists, (strides, iou, eps, limit), **tensors)
        tensors |= dict(zip(HEAD_LISTS, lists, strict=True))
        self.run_head("gfl_head_boxes_cuda", arguments, tensors)
        return tuple(results)

    def head_forward(self, *args):
        *args, write_grad = args
        *losses, grads = ops._fake_head_forward(*args, write_grad)
        for t in (*losses, *grads):
            t.fill_(float("nan"))
        self._head(args, losses=losses, grads=grads)
        return *losses, grads

    def head_backward(self, *args):
        grads = [t.fill_(float("nan")) for t in ops._fake_head_backward(*args)]
        self._head(args[6:], grad_losses=args[:6], grads=grads)
        return grads

    def _head(self, args, grads, **losses):
        lists, assessed, options, rest = args[:7], args[7:11], args[11:15], args[15:]
        tensors = dict(zip(("quality", "weight", "sums", "normalisers"), assessed, strict=True))
        tensors |= losses
        if grads:
            half = len(grads) // 2
            tensors |= {"grad_cls": grads[:half], "grad_box": grads[half:]}
        numbers = dict(zip(("form", "alpha", "beta", "loss_weights"), rest, strict=True))
        arguments = head_arguments(lists, options, **tensors, **numbers)
        tensors |= dict(zip(HEAD_LISTS, lists, strict=True))
        self.run_head("gfl_head_cuda", arguments, tensors)


def _outputs(pred, reduction, write_grad):
    loss, grad = ops._fake_loss_grad(pred, reduction, write_grad)
    return loss.fill_(float("nan")), grad


def _peak(window):
    return {"mode": int(window >= 0), "window": max(window, 0)}


def _scale(pred, scale, reduction):
    rows = pred.numel() // max(1, pred.shape[-1])
    return scale / max(1, rows) if reduction == ops.MEAN else scale
