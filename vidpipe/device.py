"""Where frames live: devices, memory rings and the order of work on them.

Frames on the CPU are NumPy arrays, frames on a GPU are CuPy arrays. Both are leased from
rings that are allocated before the first frame, so a stage always writes to the same few
addresses. Work on a GPU is ordered by events; work on the CPU is done when a call returns,
so its events are None.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vidpipe.errors import DeviceError


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


class Event(Protocol):
    """A point in a device's stream of work, such as `cupy.cuda.Event`."""

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

    Args:
        shapes: shape and dtype of each plane, in elements.
        depth: number of slots. The pipeline gives a stage as many as its links can hold,
            plus one in each reader's hands and one to write to.
        device: only the CPU for now; a CUDA ring differs in `_allocate` and `_view`.

    A host ring that runs out, because a user keeps frames, grows by a slot; `grown` counts
    how often.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[tuple[int, ...], Any]],
        depth: int,
        device: Device = CPU,
    ) -> None:
        if device.kind != "cpu":
            raise DeviceError(f"no ring can be made on '{device}'", hint="Use --device cpu")
        self.shapes = tuple((tuple(shape), np.dtype(dtype)) for shape, dtype in shapes)
        self.device = device
        self.grown = 0
        # A lease can end inside `lease`, when the garbage collector runs there.
        self._lock = threading.RLock()
        self._slots = [Slot(i, self._allocate()) for i in range(depth)]
        self._free = list(reversed(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    def _allocate(self) -> tuple[Any, ...]:
        return tuple(np.empty(shape, dtype) for shape, dtype in self.shapes)

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
                slot = self._free.pop()
            else:
                slot = Slot(len(self._slots), self._allocate())
                self._slots.append(slot)
                self.grown += 1
        lease = Lease(self, slot)
        return slot, tuple(np.asarray(_HostView(lease, buffer)) for buffer in slot.buffers)
