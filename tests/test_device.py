"""Devices and memory rings."""

from __future__ import annotations

import numpy as np
import pytest

from vidpipe.device import CPU, Device, Ring
from vidpipe.errors import DeviceError
from vidpipe.testing import pattern, spec


def test_parse() -> None:
    assert Device.parse("cpu") == CPU
    assert Device.parse("cuda:1") == Device("cuda", 1)
    assert str(Device.parse("cuda")) == "cuda:0"
    for wrong in ("gpu", "cuda:x", ""):
        with pytest.raises(DeviceError, match="Use cpu, cuda or cuda:N"):
            Device.parse(wrong)


def test_a_slot_returns_when_the_last_view_is_gone() -> None:
    ring = Ring([((4, 6), np.uint8), ((2, 3, 2), np.uint8)], depth=1)
    slot, planes = ring.lease()
    assert [p.shape for p in planes] == [(4, 6), (2, 3, 2)]
    kept = planes[1][:, :, 0]
    address = planes[0].ctypes.data
    del planes
    other, _ = ring.lease()
    assert other is not slot
    assert ring.grown == 1
    del kept
    again, planes = ring.lease()
    assert again is slot
    assert planes[0].ctypes.data == address


def test_planes_are_writable_and_survive_their_slot() -> None:
    ring = Ring([((2, 2), np.uint16)], depth=2)
    slot, (plane,) = ring.lease()
    plane[:] = 1023
    del slot, ring
    assert (plane == 1023).all()


def test_steady_use_never_grows() -> None:
    ring = Ring([((16, 16), np.uint8)], depth=2)
    held = None
    for value in range(100):
        _, (plane,) = ring.lease()
        plane[:] = value
        held = plane
    assert held is not None
    assert ring.grown == 0
    assert len(ring) == 2


def test_a_ring_on_a_gpu_that_is_not_there_is_refused_in_a_line() -> None:
    with pytest.raises(DeviceError, match=r"'cupy' is not installed|'cuda:99' cannot be used"):
        Ring([((2, 2), np.uint8)], 1, Device("cuda", 99))


def test_planes_of_a_slot_lie_one_behind_the_other() -> None:
    slot, planes = Ring([((4, 6), np.uint16), ((2, 3, 2), np.uint16)], 1).lease()
    assert planes[1].ctypes.data == planes[0].ctypes.data + planes[0].nbytes
    assert len(slot.buffers) == 2


class Event(str):
    """A named point of a stream that was reached long ago."""

    __slots__ = ()

    def synchronize(self) -> None:
        pass


class Stream:
    """A device stream that writes down what it is told to do."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name = name
        self.diary = diary
        self.recorded = 0

    def record(self) -> Event:
        self.recorded += 1
        self.diary.append(f"{self.name} records {self.name}{self.recorded}")
        return Event(f"{self.name}{self.recorded}")

    def wait_event(self, event: str) -> None:
        self.diary.append(f"{self.name} waits for {event}")


def test_order_on_a_device_is_kept_by_events_alone() -> None:
    """A writer and two readers on three streams, over two uses of one slot."""
    diary: list[str] = []
    writer, one, two = (Stream(name, diary) for name in ("w", "a", "b"))
    ring = Ring([((8, 8), np.uint8)], depth=1)
    for _ in range(2):
        slot, planes = ring.lease()
        slot.write_by(writer)
        diary.append("write")
        frame = pattern(spec(8, 8, "gray")).replace(planes, spec(8, 8, "gray"), slot=slot)
        frame.ready = writer.record()
        for reader in (one, two):
            frame.wait(reader)
            diary.append(f"{reader.name} reads")
            frame.read_by(reader)
        del planes, frame
    assert diary == [
        "write", "w records w1",
        "a waits for w1", "a reads", "a records a1",
        "b waits for w1", "b reads", "b records b1",
        "w waits for a1", "w waits for b1", "write", "w records w2",
        "a waits for w2", "a reads", "a records a2",
        "b waits for w2", "b reads", "b records b2",
    ]  # fmt: skip


def test_memory_is_not_given_away_before_its_readers_are_done() -> None:
    waited = []

    class Done:
        def synchronize(self) -> None:
            waited.append(True)

    ring = Ring([((2, 2), np.uint8)], 1)
    slot, planes = ring.lease()
    slot.readers.append(Done())
    del ring, slot
    assert not waited
    del planes
    assert waited
