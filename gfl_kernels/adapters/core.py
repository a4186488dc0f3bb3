"""accelerate() and restore(): what is replaced, remembered, reported and put back."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from .. import dispatch

HOSTS = ("mmdet", "ultralytics", "transformers")
_ABSENT: Any = object()  # an attribute that its owner inherits


@dataclass(eq=False)
class Replacement:
    """An attribute of a class, a Python module or an instance, before and now."""

    owner: Any
    name: str
    before: Any
    now: Any

    def put_back(self) -> None:
        if self.is_in_place():
            if self.before is _ABSENT:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.before)

    def is_in_place(self) -> bool:
        return vars(self.owner).get(self.name, _ABSENT) is self.now


@dataclass
class Report:
    """What accelerate() did. Printable; as a context manager it undoes on leaving what this call
    replaced, and nothing that had been replaced before.

    replaced: qualified names, in order. already: those that were replaced before this call.
    left: name -> why it was left alone. notes: conditions under which the host's code still runs.
    """

    target: str
    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _done: list[Replacement] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Undo this call."""
        for replacement in reversed(self._done):
            replacement.put_back()
            if replacement in _in_place:
                _in_place.remove(replacement)
        self._done.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"gfl_kernels under {self.target}"]
        for title, items in (
            ("replaced", self.replaced),
            ("replaced before", self.already),
            ("left alone", [f"{name}: {why}" for name, why in self.left.items()]),
            ("notes", self.notes),
        ):
            if items:
                lines += [f"  {title}:", *(f"    {item}" for item in items)]
        if not self.replaced and not self.already:
            lines.append("  nothing was replaced")
        return "\n".join(lines)

    # What the hosts' files use

    def replace(self, owner: Any, name: str, function: Callable, label: str | None = None) -> bool:
        """Put function(original, ...) in place of owner.name, if their signatures are the same.

        owner is a class or a Python module. Where a graph is exported, the original runs.
        """
        label = label or qualified(owner, name)
        current = vars(owner).get(name, _ABSENT)
        if getattr(current, "_gfl_kernels_original", None) is not None:
            self.already.append(label)
            return True
        original = getattr(owner, name, None)
        if original is None:
            self.left[label] = "there is none"
            return False
        why = mismatch(function, original)
        if why is not None:
            self.left[label] = why
            return False
        self._set(owner, name, current, fused(function, original), label)
        return True

    def replace_bound(self, instance: Any, name: str, function: Callable, label: str) -> bool:
        """The same for a method of one instance."""
        current = vars(instance).get(name, _ABSENT)
        if isinstance(current, Bound) or hasattr(
            getattr(type(instance), name, None), "_gfl_kernels_original"
        ):
            self.already.append(label)
            return True
        why = (
            "this instance has a method of its own"
            if current is not _ABSENT
            else mismatch(function, getattr(type(instance), name))
        )
        if why is not None:
            self.left[label] = why
            return False
        self._set(instance, name, current, Bound(function, instance, name), label)
        return True

    def stands_for(self, owner: Any, name: str) -> bool:
        """Whether owner.name is a replacement already."""
        current = vars(owner).get(name, getattr(type(owner), name, None))
        return isinstance(current, Bound) or hasattr(current, "_gfl_kernels_original")

    def _set(self, owner, name, before, now, label) -> None:
        replacement = Replacement(owner, name, before, now)
        setattr(owner, name, now)
        self._done.append(replacement)
        self.replaced.append(label)
        if not isinstance(now, Bound):  # an instance carries its own record, and may be collected
            _in_place.append(replacement)


_in_place: list[Replacement] = []


class Bound:
    """A replaced method of one instance. Copies and pickles of the instance keep it, bound to the
    copy."""

    def __init__(self, function: Callable, instance: Any, name: str) -> None:
        self.function, self.instance, self.name = function, instance, name

    def __call__(self, *args, **kwargs):
        original = getattr(type(self.instance), self.name)
        if dispatch.exporting():
            return original(self.instance, *args, **kwargs)
        return self.function(original, self.instance, *args, **kwargs)


def accelerate(target: str | nn.Module | types.ModuleType) -> Report:
    """Let an existing code base compute its GFL losses with gfl_kernels.

    Args:
        target: "mmdet", "ultralytics" or "transformers": the package, for every head in this
            process. A model: its own modules alone. A Python module that defines such functions or
            classes (NanoDet's, GFocalV2's, D-FINE's, DEIM's ...): these, if name, signature and
            numbers are those of mmdetection's functions or RT-DETR's, D-FINE's or DEIM's criteria.

    Returns:
        :class:`Report`: print it, or use it as a context manager. Doing the same again replaces
        nothing. Loss values and gradients stay those of the host within rounding; what is exported
        (ONNX, torch.export, tracing) stays the host's own graph.

    Raises:
        ImportError: the package is not installed.
        RuntimeError: its version is not one that was checked.
        TypeError: target is none of these.
    """
    if isinstance(target, types.ModuleType) and target.__name__ in HOSTS:
        target = target.__name__
    if isinstance(target, str):
        report = Report(target)
        try:
            _host(target).plan(report)
        except BaseException:  # a host without a part that is looked for: nothing stays half done
            report.restore()
            raise
    elif isinstance(target, (nn.Module, types.ModuleType)):
        name = target.__name__ if isinstance(target, types.ModuleType) else type(target).__name__
        report = Report(name)
        import_module(".generic", __package__).plan(report, target)
    else:
        raise TypeError(
            "accelerate: target must be the name of a host "
            f"({', '.join(HOSTS)}), an nn.Module or a Python module, got {type(target).__name__}"
        )
    return report


def restore(target: str | nn.Module | types.ModuleType | None = None) -> list[str]:
    """Put back what :func:`accelerate` replaced, every attribute as the object it was.

    Args:
        target: as given to accelerate (a copy of the model will do); None for everything but
            single models.

    Returns:
        The names that were put back. What somebody else replaced in the meantime stays as it is.
    """
    if isinstance(target, nn.Module):
        from .generic import instances

        found = [
            Replacement(instance, name, _ABSENT, value)
            for _, instance in instances(target)
            for name, value in list(vars(instance).items())
            if isinstance(value, Bound)
        ]
    elif target is None or isinstance(target, (str, types.ModuleType)):
        if isinstance(target, str):
            _host(target)
        found = [r for r in _in_place if target is None or _belongs(r.owner, target)]
    else:
        raise TypeError(
            "restore: target must be None, the name of a host, an nn.Module or a Python module, "
            f"got {type(target).__name__}"
        )
    names = []
    for replacement in reversed(found):
        if replacement.is_in_place():
            names.append(qualified(replacement.owner, replacement.name))
        replacement.put_back()
        if replacement in _in_place:
            _in_place.remove(replacement)
    return names


def _host(name: str):
    if name not in HOSTS:
        raise ValueError(f"the hosts are {', '.join(HOSTS)}, got {name!r}")
    return import_module(f".{name}", __package__)


def _belongs(owner: Any, target: str | types.ModuleType) -> bool:
    home = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    name = target if isinstance(target, str) else target.__name__
    return home == name or home.startswith(f"{name}.")


def qualified(owner: Any, name: str) -> str:
    if isinstance(owner, types.ModuleType):
        return f"{owner.__name__}.{name}"
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}.{name}"


def check_version(report: Report, package: str, *supported: str) -> None:
    """Names the package in the report. supported: a version, or how it begins, with a dot last."""
    found = import_module(package).__version__
    report.target = f"{package} {found}"
    if not any(found.startswith(v) if v.endswith(".") else found == v for v in supported):
        known = " or ".join(f"{v}x" if v.endswith(".") else v for v in supported)
        raise RuntimeError(
            f"accelerate: {package} {found} is not supported, {known} is; its losses may have "
            "changed. accelerate(module) on its Python modules replaces what it can verify."
        )


def mismatch(function: Callable, original: Callable) -> str | None:
    """Why function(original, ...) cannot stand for original: another signature; None if it can."""
    wanted = list(inspect.signature(function).parameters.values())[1:]
    try:
        got = _parameters(original)
    except (TypeError, ValueError):
        return "it has no signature to check"
    # Annotations differ; defaults, order, names and kinds may not.
    if [(p.name, p.default, p.kind) for p in wanted] != [(p.name, p.default, p.kind) for p in got]:
        shown = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in got
        )
        return f"its signature is another: ({shown})"
    return None


def _parameters(original: Callable) -> list[inspect.Parameter]:
    """The parameters of a function; those of the loss inside mmdetection's weighted_loss, whose
    wrapper takes (pred, target, weight, reduction, avg_factor, **kwargs), come after the wrapper's.
    """
    outer = list(inspect.signature(original, follow_wrapped=False).parameters.values())
    if not hasattr(original, "__wrapped__") or outer[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return outer
    inner = list(inspect.signature(original.__wrapped__).parameters.values())
    return [*outer[:-1], *inner[2:]]


def fused(function: Callable, original: Callable) -> Callable:
    """function in place of original, with its name and documentation; original where a graph is
    exported."""
    original = getattr(original, "_gfl_kernels_original", original)

    @functools.wraps(original)
    def run(*args, **kwargs):
        if dispatch.exporting():
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    run._gfl_kernels_original = original
    return run
