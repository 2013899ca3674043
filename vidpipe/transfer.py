"""Frames from one device to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from vidpipe.device import CPU, Device, Ring, Slot, import_cupy, new_stream
from vidpipe.errors import SpecError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.link import Policy
from vidpipe.stage import Stage, register


class Mover:
    """Copies frames to another device, without waiting for the copy.

    To the CPU: into page-locked memory; the frame's `ready` says when the copy is over.
    From the CPU: through page-locked memory, since only from there a GPU copies by itself.

    Args:
        spec: what comes in.
        target: where it goes.
        depth: slots of the ring that it is copied to.
        stream: what to queue the copies on; its own if not given.

    Raises:
        DeviceError: the device is not there, or its memory does not suffice.
    """

    def __init__(self, spec: FrameSpec, target: Device, depth: int, stream: Any = None) -> None:
        self.spec = replace(spec, device=target)
        gpu = target if target.kind == "cuda" else spec.device
        self._cupy = import_cupy(gpu)
        self._stream = stream or new_stream(gpu)
        shapes = [(shape, spec.format.dtype) for shape in spec.plane_shapes()]
        to_host = target == CPU
        self.ring = Ring(shapes, depth, target, pinned=to_host)
        self._staging = None if to_host else Ring(shapes, depth, CPU, pinned=True)

    def move(self, frame: Frame) -> Frame:
        """Return the frame on the target device."""
        slot, planes = self.ring.lease()
        return (
            self._download(frame, slot, planes)
            if self._staging is None
            else self._upload(frame, slot, planes)
        )

    def _download(self, frame: Frame, slot: Slot, planes: tuple[Any, ...]) -> Frame:
        stream = self._stream
        frame.wait(stream)
        with stream:
            for source, target in zip(frame.planes, planes, strict=True):
                source = self._cupy.ascontiguousarray(source)
                source.get(stream=stream, out=target, blocking=False)
        ready = stream.record()
        frame.read_by(stream, ready)
        return frame.replace(planes, self.spec, slot=slot, ready=ready)

    def _upload(self, frame: Frame, slot: Slot, planes: tuple[Any, ...]) -> Frame:
        assert self._staging is not None
        stream = self._stream
        passing, pages = self._staging.lease()
        for event in passing.readers:  # the copy of an earlier frame out of these pages
            event.synchronize()
        passing.readers.clear()
        slot.write_by(stream)
        for source, page, target in zip(frame.planes, pages, planes, strict=True):
            np.copyto(page, source)
            target.set(page, stream=stream)
        ready = stream.record()
        passing.readers.append(ready)
        return frame.replace(planes, self.spec, slot=slot, ready=ready)


@register("transfer")
class Transfer(Stage):
    """Moves frames to another device; the pipeline puts it where it is needed.

    Args:
        device: "cpu", "cuda" or "cuda:N".
    """

    policy: Policy = Policy.BLOCK
    """What the links behind it do when they are full: what those behind a source before it do."""

    def __init__(self, *, device: str) -> None:
        self.target = Device.parse(device)
        self._spec: FrameSpec | None = None
        self._mover: Mover | None = None

    def device_for(self, spec: FrameSpec) -> Device:
        """Take frames where they are."""
        return spec.device

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return the spec on the target device.

        Raises:
            SpecError: the frames would go from one GPU to another.
        """
        if "cpu" not in (spec.device.kind, self.target.kind) and spec.device != self.target:
            raise SpecError(
                f"frames on {spec.device} cannot go to {self.target}",
                hint="Use the same GPU for all stages of one branch",
            )
        self._spec = spec
        return replace(spec, device=self.target)

    def open(self) -> None:
        """Allocate the ring.

        Raises:
            DeviceError: the device is not there, or its memory does not suffice.
        """
        assert self._spec is not None
        if self._spec.device != self.target:
            # A copy is under way while the reader waits for the one before.
            self._mover = Mover(self._spec, self.target, self.ring_depth + 1)

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Give the frame on the target device."""
        return (frame if self._mover is None else self._mover.move(frame),)

    def close(self) -> None:
        """Let go of the ring; planes that somebody holds stay valid."""
        self._mover = None

    def report(self) -> dict[str, Any]:
        """Return where the frames went. Keys: "summary", "device"."""
        return {"summary": f"to {self.target}", "device": str(self.target)}
