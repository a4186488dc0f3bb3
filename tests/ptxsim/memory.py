"""Memory of a simulated launch: address spaces, bounds checks and traffic counters.

Global, constant and kernel-parameter memory live at their host addresses (or at
made-up ones with ``isolate``).  Shared memory is one row per CTA and local memory
one row per thread; their generic addresses are tagged in the top byte.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DeviceError, Misaligned, OutOfBounds, Race, UninitializedRead

SHARED_BASE, LOCAL_BASE = 1 << 56, 2 << 56
SECTOR = 32
_NONE = np.iinfo(np.int64).max  # "no lane here" in per-warp matrices

Segment = tuple[np.ndarray, np.ndarray, "np.ndarray | slice", "Races | None"]


class Fault(Exception):
    """Internal: a faulting access; the machine adds the location and raises ``kind``."""

    def __init__(self, kind: type[DeviceError], position: int, address: int | None, message: str):
        self.kind, self.position, self.address, self.message = kind, position, address, message
        self.thread: int | None = None


@dataclass
class Allocation:
    """A range of memory the kernel may touch."""

    name: str
    base: int  # address as the kernel sees it
    host: int  # where the bytes are
    size: int
    writable: bool = True
    counted: bool = True  # appears in traffic reports
    owner: object = None  # keeps the memory alive

    def bytes(self) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.host))


class Arena:
    """Collects the allocations of a launch and hands out pointers to them."""

    def __init__(self, isolate: bool = False):
        self.isolate = isolate
        self.allocations: list[Allocation] = []
        self._bases: dict[int, int] = {}

    def add(self, obj, name: str) -> int:
        """Register the whole storage of an array or tensor; returns its pointer for the kernel."""
        pointer, host, size, writable, owner = _storage(obj, name)
        if not size:
            return pointer
        base = self._bases.setdefault(host, (len(self._bases) + 1) << 40 if self.isolate else host)
        self.allocations.append(Allocation(name, base, host, size, writable, owner=owner))
        return base + pointer - host


def _storage(obj, name: str) -> tuple[int, int, int, bool, object]:
    """(pointer, first byte, size, writable, owner) of a numpy array or torch tensor."""
    if isinstance(obj, np.ndarray):
        owner = obj
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        low, high = np.lib.array_utils.byte_bounds(owner)
        return obj.ctypes.data, low, high - low, obj.flags.writeable, owner
    if not hasattr(obj, "data_ptr"):
        raise TypeError(f"argument '{name}': cannot pass {type(obj).__name__} to a kernel")
    storage = getattr(
        obj, "base", obj
    ).untyped_storage()  # triton's TensorWrapper keeps the tensor in .base
    if storage.device.type != "cpu":
        raise TypeError(f"argument '{name}' is on {storage.device}; ptxsim runs on CPU memory")
    return obj.data_ptr(), storage.data_ptr(), storage.nbytes(), True, storage


def _merge(allocations: Sequence[Allocation]) -> list[Allocation]:
    """Sort by address; join overlapping ranges (tensors that share a storage)."""
    out: list[Allocation] = []
    for a in sorted(allocations, key=lambda a: (a.base, -a.size)):
        if not out or a.base >= out[-1].base + out[-1].size:
            out.append(a)
            continue
        last = out[-1]
        end = max(last.base + last.size, a.base + a.size)
        name = last.name if a.name == last.name else f"{last.name}+{a.name}"
        out[-1] = Allocation(
            name,
            last.base,
            last.host,
            end - last.base,
            last.writable and a.writable,
            last.counted or a.counted,
            (last.owner, a.owner),
        )
    return out


class GlobalMemory:
    """All allocations of a launch."""

    def __init__(self, allocations: Sequence[Allocation]):
        self.allocations = _merge(allocations)
        self.bases = [a.base for a in self.allocations]
        self._bases = np.array(self.bases, np.uint64)
        self._ends = np.array([a.base + a.size for a in self.allocations], np.uint64)
        self._bytes = [a.bytes() for a in self.allocations]
        self._views: dict[tuple, np.ndarray] = {}

    def locate(
        self, address: np.ndarray, width: int, write: bool
    ) -> tuple[np.ndarray | int, np.ndarray]:
        """Allocation index (one int if common to all lanes) and byte offset of each access."""
        k: np.ndarray | int = bisect_right(self.bases, int(address.min())) - 1
        if k < 0 or int(address.max()) + width > int(self._ends[k]):
            k = np.searchsorted(self._bases, address, "right") - 1
            room = self._ends[k] - address
            bad = (k < 0) | (address >= self._ends[k]) | (room < np.uint64(width))
            if np.count_nonzero(bad):
                raise self._out_of_bounds(int(np.argmax(bad)), address, width, write)
        offset = (address - self._bases[k]).view(np.int64)
        _check_alignment(offset, address, width, "global")
        if write:
            for i in np.unique(k):
                if not self.allocations[i].writable:
                    position = int(np.argmax(np.broadcast_to(k == i, address.shape)))
                    raise Fault(
                        OutOfBounds,
                        position,
                        int(address[position]),
                        f"write to read-only allocation '{self.allocations[i].name}'",
                    )
        return k, offset

    def view(self, k: int, dtype: np.dtype, count: int) -> np.ndarray:
        """Allocation ``k`` as an array of elements (or of rows of ``count`` elements)."""
        key = (k, dtype, count)
        if key not in self._views:
            data, width = self._bytes[k], np.dtype(dtype).itemsize * count
            data = data[: data.size // width * width].view(dtype)
            self._views[key] = data if count == 1 else data.reshape(-1, count)
        return self._views[key]

    def _out_of_bounds(self, position: int, address: np.ndarray, width: int, write: bool) -> Fault:
        a = int(address[position])
        message = (
            f"{'write' if write else 'read'} of {width} bytes at {a:#x} is outside every allocation"
        )
        near = min(
            self.allocations, key=lambda x: max(x.base - a, a - x.base - x.size), default=None
        )
        if near:
            past = a - near.base - near.size
            where = (
                f"{past:+d} bytes from the end of"
                if a >= near.base
                else f"{near.base - a} bytes before"
            )
            message += f"; {where} '{near.name}' ({near.size} bytes at {near.base:#x})"
        return Fault(OutOfBounds, position, a, message)


class Window:
    """Memory with one row per CTA (shared) or thread (local), filled with all-ones poison."""

    def __init__(self, space: str, rows: int, size: int, check_uninit: bool = False):
        self.space, self.size = space, size
        self.stride = -(-max(size, 1) // 128) * 128
        self.data = np.full(rows * self.stride, 0xFF, np.uint8)
        self.written = np.zeros(rows * self.stride, bool) if check_uninit else None

    def locate(
        self, address: np.ndarray, row: np.ndarray, width: int, write: bool, read: bool
    ) -> np.ndarray:
        """Byte offsets in ``data``, after all checks."""
        bad = (address >= np.uint64(self.size)) | (
            address + np.uint64(width) > np.uint64(self.size)
        )
        if np.count_nonzero(bad):
            position = int(np.argmax(bad))
            raise Fault(
                OutOfBounds,
                position,
                int(address[position]),
                f"{'write' if write else 'read'} of {width} bytes at {self.space} address "
                f"{int(address[position]):#x}, "
                f"but the {'CTA' if self.space == 'shared' else 'thread'} has "
                f"{self.size} bytes of {self.space} memory",
            )
        _check_alignment(address, address, width, self.space)
        start = row * self.stride + address.astype(np.int64)
        if self.written is not None:
            every = start[:, None] + np.arange(width)
            fresh = ~self.written[every].all(axis=1)
            if read and fresh.any():
                position = int(np.argmax(fresh))
                raise Fault(
                    UninitializedRead,
                    position,
                    int(address[position]),
                    f"read of uninitialised {self.space} memory at address "
                    f"{int(address[position]):#x}",
                )
            self.written[every] |= write
        return start

    def view(self, dtype: np.dtype, count: int) -> np.ndarray:
        data = self.data.view(dtype)
        return data if count == 1 else data.reshape(-1, count)


class Races:
    """Who has read and written each byte of shared memory since the last barrier of its CTA.

    Unlike an order of warps in which a missing barrier happens to show, this finds it in any. A
    barrier counts as one of the whole CTA; warps may write the same value to one place, as programs
    do whose warps hold it in common. An access is a number: 64 * (barriers so far) + warp + 1.
    """

    SEVERAL = 63  # instead of warp + 1: more than one

    def __init__(self, ctas: int, size: int):
        self.epoch = np.ones(ctas, np.int64)
        self.read, self.written = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def _accesses(self, batch, lanes, select, element, width):
        every = element[:, None] * width + np.arange(width)
        lanes = (np.arange(batch.threads) if lanes is None else lanes)[select]
        since = np.broadcast_to(64 * self.epoch[batch.cta[lanes]][:, None], every.shape)
        return every, since, since + (batch.thread_in_cta[lanes][:, None] // 32 + 1), lanes

    def reads(self, batch, lanes, select, element, width) -> None:
        every, since, mine, lanes = self._accesses(batch, lanes, select, element, width)
        last = self.written[every]
        self._judge((last > since) & (last != mine), "read after the write", lanes)
        last = self.read[every]
        self.read[every] = mine
        several = ((last > since) & (last != mine)) | (self.read[every] != mine)
        if np.count_nonzero(several):
            self.read[every[several]] = since[several] + self.SEVERAL

    def writes(self, batch, lanes, select, element, view, values) -> None:
        """Stores values as well."""
        wanted = np.ascontiguousarray(values).reshape(len(element), -1).view(np.uint8)
        every, since, mine, lanes = self._accesses(batch, lanes, select, element, wanted.shape[1])
        data = view.reshape(-1).view(np.uint8)
        last = self.read[every]
        self._judge((last > since) & (last != mine), "write after the read", lanes)
        last = self.written[every]
        changed = (last > since) & (last != mine) & (data[every] != wanted)
        self._judge(changed, "write after the write", lanes)
        self.written[every] = mine
        view[element] = values
        if np.count_nonzero(self.written[every] != mine):
            self._judge(data[every] != wanted, "write at the same time as that", lanes)

    def _judge(self, race: np.ndarray, what: str, lanes: np.ndarray) -> None:
        if np.count_nonzero(race):
            position = int(np.argmax(race.any(axis=1)))
            message = f"{what} of another warp, with no barrier between them, in shared memory"
            fault = Fault(Race, position, None, message)
            fault.thread = int(lanes[position])
            raise fault


def _check_alignment(offset: np.ndarray, address: np.ndarray, width: int, space: str) -> None:
    low = offset.dtype.type(width - 1)
    if np.bitwise_or.reduce(offset) & low:
        position = int(np.argmax((offset & low) != 0))
        raise Fault(
            Misaligned,
            position,
            int(address[position]),
            f"{width}-byte {space} access at address {int(address[position]):#x} is not "
            f"{width}-byte aligned",
        )


def segments(
    batch,
    space: str,
    address: np.ndarray,
    lanes: np.ndarray | None,
    dtype: np.dtype,
    count: int,
    index: int,
    kinds: Sequence[str],
) -> list[Segment]:
    """Resolve an access to (view, element index, selector, races), checking and counting it.

    ``address`` holds one byte address per active lane; ``kinds`` is a subset of
    ('read', 'written').  The selector picks the positions in ``address`` that an entry covers;
    where races are to be looked for, the last item is what does.
    """
    try:
        return list(_segments(batch, space, address, lanes, dtype, count, index, kinds))
    except Fault as fault:
        if fault.thread is None:
            fault.thread = fault.position if lanes is None else int(lanes[fault.position])
        raise


def _segments(batch, space, address, lanes, dtype, count, index, kinds) -> Iterator[Segment]:
    width = np.dtype(dtype).itemsize * count
    if space == "generic":
        tag = address >> np.uint64(56)
        if np.count_nonzero(tag):
            everyone = np.arange(batch.threads) if lanes is None else lanes
            for t in np.unique(tag).tolist():
                pick = np.flatnonzero(tag == t)
                name = {1: "shared", 2: "local"}.get(t, "global")
                base = np.uint64(0 if name == "global" else t << 56)
                for view, element, select, races in segments(
                    batch, name, address[pick] - base, everyone[pick], dtype, count, index, kinds
                ):
                    yield view, element, pick[select], races
            return
    if space in ("generic", "global", "const"):
        k, offset = batch.memory.locate(address, width, "written" in kinds)
        if space != "const" and batch.count_memory:
            batch.counters.global_access(index, batch.threads, lanes, k, offset, width, kinds)
        if np.ndim(k) == 0:
            yield batch.memory.view(k, dtype, count), offset // width, slice(None), None
            return
        for i in np.unique(k).tolist():
            pick = np.flatnonzero(k == i)
            yield batch.memory.view(i, dtype, count), offset[pick] // width, pick, None
        return
    window: Window = batch.windows[space]
    row = batch.row[space] if lanes is None else batch.row[space][lanes]
    start = window.locate(address, row, width, "written" in kinds, "read" in kinds)
    if space == "shared" and batch.count_memory:
        batch.counters.shared_access(index, batch.threads, lanes, address, width)
    races = batch.races if space == "shared" else None
    yield window.view(dtype, count), start // width, slice(None), races


def read(
    batch,
    space: str,
    address: np.ndarray,
    lanes: np.ndarray | None,
    dtype: np.dtype,
    count: int,
    index: int,
) -> np.ndarray:
    """Load ``count`` elements per active lane: shape (n,) or (n, count)."""
    found = segments(batch, space, address, lanes, dtype, count, index, ("read",))
    for view, element, select, races in found:
        if races is not None:
            races.reads(batch, lanes, select, element, np.dtype(dtype).itemsize * count)
        if len(found) == 1:
            return view[element]
    out = np.empty(address.shape if count == 1 else (address.size, count), dtype)
    for view, element, select, _ in found:
        out[select] = view[element]
    return out


def write(
    batch,
    space: str,
    address: np.ndarray,
    lanes: np.ndarray | None,
    values: np.ndarray,
    count: int,
    index: int,
) -> None:
    """Store ``values`` of shape (n,) or (n, count); of lanes that collide the last one wins."""
    for view, element, select, races in segments(
        batch, space, address, lanes, values.dtype, count, index, ("written",)
    ):
        if races is None:
            view[element] = values[select]
        else:
            races.writes(batch, lanes, select, element, view, values[select])


def by_rounds(
    view: np.ndarray, element: np.ndarray, update: Callable, *operands: np.ndarray
) -> np.ndarray:
    """Apply ``view[e] = update(view[e], ...)`` lane by lane in order; return the old values.

    Lanes are processed in rounds in which every address occurs once.
    """
    order = np.argsort(element, kind="stable")
    ordered = element[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    schedule = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[schedule], np.arange(rank.max() + 2))
    old = np.empty((len(element), *view.shape[1:]), view.dtype)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        pick = order[schedule[first:last]]
        old[pick] = view[element[pick]]
        view[element[pick]] = update(old[pick], *(o[pick] for o in operands))
    return old


class Counters:
    """Dynamic counts per static instruction, and traffic per allocation."""

    def __init__(self, instructions: int, allocations: Sequence[Allocation]):
        def zeros():
            return np.zeros(instructions, np.int64)

        self.issued, self.threads = zeros(), zeros()  # warp instructions, active lanes
        self.requests, self.bytes = zeros(), zeros()
        self.sectors, self.ideal_sectors = zeros(), zeros()
        self.wavefronts, self.ideal_wavefronts = zeros(), zeros()
        sizes = [-(-a.size // SECTOR) for a in allocations]
        self.first_sector = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.allocations = len(allocations)
        self.touched, self.alloc_sectors = {}, {}
        self.alloc_bytes: dict[str, dict[int, np.ndarray]] = {}  # by bytes per lane
        for kind in ("read", "written"):
            self.touched[kind] = np.zeros(int(self.first_sector[-1]), bool)
            self.alloc_bytes[kind] = {}
            self.alloc_sectors[kind] = np.zeros(len(allocations), np.int64)

    def global_access(
        self,
        index: int,
        threads: int,
        lanes: np.ndarray | None,
        alloc: np.ndarray | int,
        offset: np.ndarray,
        width: int,
        kinds: Sequence[str],
    ) -> None:
        """Account one request per active warp; sectors count from the start of each allocation."""
        sector = self.first_sector[alloc] + (offset >> 5)
        rows, valid = _per_warp(sector, lanes, threads)
        if np.count_nonzero(rows[:, 1:] < rows[:, :-1]):
            rows = np.sort(rows, axis=1)
            valid = rows != _NONE
        fresh = _distinct(rows) & valid
        per_warp, active = np.count_nonzero(fresh, axis=1), np.count_nonzero(valid, axis=1)
        self.requests[index] += np.count_nonzero(active)
        self.bytes[index] += offset.size * width
        self.sectors[index] += per_warp.sum()
        self.ideal_sectors[index] += (-(-active * width // SECTOR)).sum()
        self.wavefronts[index] += (-(-per_warp // 4)).sum()
        alloc = np.broadcast_to(alloc, offset.shape)
        owner = (
            alloc[:1]
            if alloc[0] == alloc[-1] and (alloc == alloc[0]).all()
            else np.searchsorted(self.first_sector, rows[fresh], "right") - 1
        )
        for kind in kinds:
            self.touched[kind][sector] = True
            moved = self.alloc_bytes[kind].setdefault(width, np.zeros(self.allocations, np.int64))
            if len(owner) == 1:
                moved[owner] += offset.size * width
                self.alloc_sectors[kind][owner] += per_warp.sum()
            else:
                np.add.at(moved, alloc, width)
                np.add.at(self.alloc_sectors[kind], owner, 1)

    def shared_access(
        self, index: int, threads: int, lanes: np.ndarray | None, address: np.ndarray, width: int
    ) -> None:
        """Account passes of 32 4-byte banks; 8 (16) byte accesses go by half (quarter) warps."""
        words = max(1, width // 4)
        rows, valid = _per_warp(address.astype(np.int64) >> 2, lanes, threads)
        self.requests[index] += np.count_nonzero(valid.any(axis=1))
        self.bytes[index] += address.size * width
        rows, valid = rows.reshape(-1, 32 // words), valid.reshape(-1, 32 // words)
        some = valid.any(axis=1)
        rows, valid = rows[some], valid[some]
        spread = np.where(valid, rows, 0).max(axis=1) - rows.min(axis=1) + words
        crowded = spread > 32  # otherwise different words lie in different banks
        self.ideal_wavefronts[index] += len(rows)
        self.wavefronts[index] += len(rows) - np.count_nonzero(crowded)
        if np.count_nonzero(crowded):
            word = np.where(valid[crowded], rows[crowded], -64)[:, :, None] + np.arange(words)
            word = np.sort(word.reshape(len(word), -1), axis=1)
            fresh = _distinct(word) & (word >= 0)
            row = np.broadcast_to(np.arange(len(word))[:, None], word.shape)[fresh]
            per_bank = np.bincount(row * 32 + word[fresh] % 32, minlength=32 * len(word)).reshape(
                -1, 32
            )
            self.wavefronts[index] += per_bank.max(axis=1).sum()


def _distinct(rows: np.ndarray) -> np.ndarray:
    """True where a sorted row has a new value."""
    out = np.ones(rows.shape, bool)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=out[:, 1:])
    return out


def _per_warp(
    keys: np.ndarray, lanes: np.ndarray | None, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys as a (warps, 32) matrix, _NONE where a lane is inactive; the mask of active lanes."""
    if lanes is None:
        rows = keys.reshape(-1, 32)
        return rows, np.ones(rows.shape, bool)
    rows = np.full(threads, _NONE)
    rows[lanes] = keys
    rows = rows.reshape(-1, 32)
    return rows, rows != _NONE
