"""Where frames live: devices, memory rings and the order of work on them.

Frames on the CPU are NumPy arrays, frames on a GPU are CuPy arrays. Both are leased from
rings that are allocated before the first frame, so a stage always writes to the same few
addresses. Work on a GPU is ordered by events; work on the CPU is done when a call returns,
so its events are None.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vidpipe import trace
from vidpipe.errors import DeviceError, DeviceMemoryError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Device:
    """A place where arrays live and stages run.

    Attributes:
        kind: "cpu" or "cuda".
        index: ordinal among the devices of that kind.
    """

    kind: str = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read "cpu", "cuda" or "cuda:1".

        Raises:
            DeviceError: for anything else.
        """
        kind, _, index = text.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
            raise DeviceError(
                f"device '{text}' is not known", hint="Use cpu, cuda or cuda:N (N from 0)"
            )
        return cls(kind, int(index or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device()

setup_lock = threading.RLock()
"""Held while CUDA memory is taken or a CUDA graph is captured, outside the frame path.

A capture forbids every other thread of the process to allocate on the device.
"""


def import_cupy(device: Device | None = None) -> Any:
    """Return the cupy module.

    Args:
        device: make its context the calling thread's own.

    Raises:
        MissingExtraError: CuPy is not installed.
        DeviceError: there is no such device.
    """
    try:
        import cupy
    except ImportError:
        raise MissingExtraError("cupy", "cuda13") from None
    if device is not None:
        _ignore_captures()
        try:
            cupy.cuda.Device(device.index).use()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"'{device}' cannot be used: {error}",
                hint="See vidpipe devices for what there is",
            ) from None
    return cupy


_thread = threading.local()
_CAPTURE_MODE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def _ignore_captures() -> None:
    """Let the calling thread wait for the GPU while another one captures a CUDA graph.

    ONNX Runtime captures in the mode in which a wait or an allocation of any other thread fails,
    and makes the capture fail too. A thread can opt out of that, once, by the driver's
    `cuThreadExchangeStreamCaptureMode`.
    """
    if getattr(_thread, "ignores_captures", False):
        return
    _thread.ignores_captures = True
    with suppress(OSError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuThreadExchangeStreamCaptureMode(
            ctypes.byref(ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL))
        )


class HostWaits:
    """Counts how often a host thread waited for a GPU, by the thread's name."""

    def __init__(self) -> None:
        self.by_thread: dict[str, int] = {}

    def add(self) -> None:
        """Count one wait of the calling thread."""
        name = threading.current_thread().name
        self.by_thread[name] = self.by_thread.get(name, 0) + 1

    @property
    def total(self) -> int:
        """Waits of all threads."""
        return sum(self.by_thread.values())


host_waits = HostWaits()
"""Waits for the streams of `new_stream`, and for their events where they were not over yet, since
the process began."""


@functools.cache
def _stream_class() -> type:
    import cupy

    class CountedEvent(cupy.cuda.Event):  # type: ignore[misc]
        def __init__(self, stream: CountedStream) -> None:
            super().__init__(disable_timing=True)
            self._stream = stream

        def synchronize(self) -> None:
            _ignore_captures()
            if not self.done:
                host_waits.add()
                self._stream.wait_on_host(self)

    class CountedStream(cupy.cuda.Stream):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(non_blocking=True)
            # An event that can be waited for without spinning interrupts the host each time that
            # it is reached. So such a one is recorded only where somebody waits.
            self._waiting = cupy.cuda.Stream(non_blocking=True)
            self._reached = cupy.cuda.Event(block=True, disable_timing=True)

        def record(self, event: Any = None) -> Any:
            return super().record(event or CountedEvent(self))

        def wait_on_host(self, event: Any) -> None:
            self._waiting.wait_event(event)
            self._waiting.record(self._reached)
            self._reached.synchronize()

        def synchronize(self) -> None:
            host_waits.add()
            _ignore_captures()
            super().synchronize()

    return CountedStream


def new_stream(device: Device) -> Any:
    """Return a `cupy.cuda.Stream` of its own, which does not wait for the legacy stream.

    Raises:
        DeviceError: there is no such device.
    """
    import_cupy(device)
    return trace.follow(_stream_class()())


class Event(Protocol):
    """A point in a device's stream of work, such as `cupy.cuda.Event`."""

    @property
    def done(self) -> bool:
        """Whether the point is reached."""

    def synchronize(self) -> None:
        """Block the calling thread until the point is reached."""


class Stream(Protocol):
    """An ordered queue of device work, such as `cupy.cuda.Stream`."""

    def wait_event(self, event: Any) -> None:
        """Make later work of this stream wait for the event, without blocking the host."""

    def record(self) -> Any:
        """Return an event that is reached when the work queued so far is done."""


class Slot:
    """One entry of a ring: a fixed buffer for each plane.

    Attributes:
        index: position in the ring; a captured CUDA graph belongs to one index.
        buffers: flat arrays on the ring's device that own the memory.
        readers: events of the stages that still read the last contents.
    """

    __slots__ = ("buffers", "index", "readers")

    def __init__(self, index: int, buffers: tuple[Any, ...]) -> None:
        self.index = index
        self.buffers = buffers
        self.readers: list[Event] = []

    def __del__(self) -> None:
        # The memory goes to whoever allocates next, who knows nothing of the readers.
        for event in self.readers:
            event.synchronize()

    def write_by(self, stream: Stream) -> None:
        """Make later work of `stream`, which will overwrite the slot, wait for its readers."""
        for event in self.readers:
            stream.wait_event(event)
        self.readers.clear()


class Lease:
    """The right to a slot, held by the arrays that view its memory.

    When the last of them is gone, also a view that a user kept, the slot returns to its
    ring. Nobody releases anything by hand.
    """

    __slots__ = ("__weakref__", "_ring", "slot")

    def __init__(self, ring: Ring, slot: Slot) -> None:
        self._ring = ring
        self.slot = slot

    def __del__(self) -> None:
        self._ring._give_back(self.slot)


class _HostView:
    """Exposes a slot's host memory to NumPy; NumPy keeps it, and with it the lease."""

    __slots__ = ("__array_interface__", "_lease")

    def __init__(self, lease: Lease, array: np.ndarray[Any, Any]) -> None:
        self._lease = lease
        self.__array_interface__ = array.__array_interface__


class Ring:
    """Buffers for the frames of one stage, allocated before the first frame.

    The planes of a slot lie in one allocation, one behind the other without a gap: NVENC
    takes a picture only so.

    Args:
        shapes: shape and dtype of each plane, in elements.
        depth: number of slots. The pipeline gives a stage as many as its links can hold,
            plus one in each reader's hands and one to write to.
        device: where the memory is.
        pinned: on the CPU, page-locked memory, which a GPU copies to and from by itself.

    A ring that runs out, because a user keeps frames, grows by a slot; `grown` counts how
    often. `slot_bytes` is the size of one slot. Where a GPU reads or writes, the slot that has
    been free for longest is taken, since work on the others may be queued still; else the one
    that became free last, which caches may hold.

    Raises:
        DeviceError: the device is not there, or its memory does not suffice.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[tuple[int, ...], Any]],
        depth: int,
        device: Device = CPU,
        *,
        pinned: bool = False,
    ) -> None:
        self.shapes = tuple((tuple(shape), np.dtype(dtype)) for shape, dtype in shapes)
        self.slot_bytes = slot_bytes(self.shapes)
        self._places = tuple(
            (*self.shapes[n], slot_bytes(self.shapes[:n])) for n in range(len(self.shapes))
        )
        self.device = device
        self.grown = 0
        self._pinned = pinned
        self._cupy = import_cupy(device) if device.kind == "cuda" else None
        # A lease can end inside `lease`, when the garbage collector runs there.
        self._lock = threading.RLock()
        self._slots = [Slot(i, self._allocate()) for i in range(depth)]
        self._free = deque(self._slots)
        gpu = pinned or self._cupy is not None
        self._take = self._free.popleft if gpu else self._free.pop

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, free or not; for binding them before the first frame."""
        return tuple(self._slots)

    def _allocate(self) -> tuple[Any, ...]:
        cupy = self._cupy
        if cupy is not None:
            try:
                with setup_lock:
                    whole = cupy.empty(self.slot_bytes, np.uint8)
            except cupy.cuda.memory.OutOfMemoryError:
                raise DeviceMemoryError(
                    f"{self.device} has no {self.slot_bytes / 2**20:.0f} MiB left for frames",
                    hint="Use a smaller picture, --vram-limit, or --device cpu",
                ) from None
        elif self._pinned:
            import cupyx

            with setup_lock:
                whole = cupyx.empty_pinned(self.slot_bytes, np.uint8)
        else:
            whole = np.empty(self.slot_bytes, np.uint8)
        return tuple(
            whole[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for shape, dtype, at in self._places
        )

    def _give_back(self, slot: Slot) -> None:
        with self._lock:
            self._free.append(slot)

    def lease(self) -> tuple[Slot, tuple[Any, ...]]:
        """Take a free slot.

        Returns:
            The slot and its planes: arrays of the ring's shapes and dtypes, on its device,
            contents undefined. The slot is taken until every view of them is gone.
        """
        with self._lock:
            if self._free:
                slot = self._take()
            else:
                slot = Slot(len(self._slots), self._allocate())
                self._slots.append(slot)
                self.grown += 1
        lease = Lease(self, slot)
        if self._cupy is None:
            return slot, tuple(np.asarray(_HostView(lease, buffer)) for buffer in slot.buffers)
        return slot, self._device_views(slot, lease)

    def _device_views(self, slot: Slot, lease: Lease) -> tuple[Any, ...]:
        cupy = self._cupy
        assert cupy is not None
        array, pointer = cupy.ndarray, cupy.cuda.MemoryPointer
        start = slot.buffers[0].data.ptr
        memory = cupy.cuda.UnownedMemory(start, self.slot_bytes, lease, self.device.index)
        return tuple(
            [array(shape, dtype, pointer(memory, at)) for shape, dtype, at in self._places]
        )


def available_bytes(device: Device = CPU) -> int:
    """Return half of the memory that is free for new work; the rest is left to the codecs."""
    if device != CPU:
        return int(import_cupy(device).cuda.runtime.memGetInfo()[0]) // 2
    import psutil

    free: Any = psutil.virtual_memory().available
    return int(free) // 2


def slot_bytes(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> int:
    """Return the size of planes of these shapes and dtypes."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)
