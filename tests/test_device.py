"""Devices and memory rings."""

from __future__ import annotations

import numpy as np
import pytest

from vidpipe.device import CPU, Device, Ring
from vidpipe.errors import DeviceError


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


def test_no_ring_on_a_device_that_is_not_supported() -> None:
    with pytest.raises(DeviceError, match="cuda:0"):
        Ring([((2, 2), np.uint8)], 1, Device("cuda"))
