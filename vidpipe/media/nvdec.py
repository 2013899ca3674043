"""Pictures from NVDEC, the GPU's decoder, as CuPy arrays.

FFmpeg decodes on CUDA's legacy default stream and no other can be set. So each picture is
copied on the device into a ring of ours, by a stream that first waits for the legacy one;
and the legacy stream waits for that copy before it may decode into the same surface again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import av
import av.error
from av.codec.hwaccel import HWAccel

from vidpipe.device import CPU, Device, Ring, import_cupy, new_stream
from vidpipe.frame import PIXEL_FORMATS, Frame, FrameSpec, PixelFormat
from vidpipe.transfer import Mover

SURFACE_FORMATS = {"nv12": PIXEL_FORMATS["nv12"], "p010le": PIXEL_FORMATS["p010le"]}
"""Formats of decoded surfaces that links can carry, by FFmpeg's name."""


THREADS = 1
"""Of FFmpeg's decoder, which only parses the stream: the chip decodes."""


def hardware(device: Device) -> HWAccel:
    """Return what makes `av.open` decode on a GPU, in the calling thread's CUDA context.

    Raises:
        MissingExtraError, DeviceError: there is no CuPy, or no such device.
    """
    cupy = import_cupy(device)
    cupy.cuda.runtime.free(0)  # makes the context, which FFmpeg takes as the current one
    return HWAccel(
        "cuda",
        allow_software_fallback=False,
        is_hw_owned=True,
        options={"primary_ctx": "0", "current_ctx": "1"},
    )


def surface_format(picture: av.VideoFrame) -> PixelFormat | None:
    """Return how the samples of a decoded surface lie, or None if links do not carry it."""
    if picture.format.name != "cuda":
        return None
    return SURFACE_FORMATS.get(picture.sw_format.name if picture.sw_format else "")


class Surfaces:
    """Copies decoded surfaces into a ring.

    Args:
        spec: of the frames, on the GPU.
        depth: slots of the ring.

    Raises:
        DeviceError: the device is not there, or its memory does not suffice.
    """

    def __init__(self, spec: FrameSpec, depth: int) -> None:
        cupy = import_cupy(spec.device)
        self._runtime = cupy.cuda.runtime
        self._spec = spec
        self._stream = new_stream(spec.device)
        self._legacy = cupy.cuda.Stream.null
        # Of one thread, and recorded again for each picture: a wait is for what it was then.
        self._decoded = cupy.cuda.Event(disable_timing=True)
        shapes = [(shape, spec.format.dtype) for shape in spec.plane_shapes()]
        self.ring = Ring(shapes, depth, spec.device)

    def frames(self, shown: list[tuple[av.VideoFrame, Frame]]) -> list[Frame]:
        """Return frames of the ring that show surfaces.

        Args:
            shown: surfaces in `spec`'s size and format, each with a frame that has its time and
                side data.
        """
        stream = self._stream
        stream.wait_event(self._legacy.record(self._decoded))
        frames = [self._copy(picture, like) for picture, like in shown]
        # One event for them all, in either direction, instead of one for each.
        ready = stream.record()
        self._legacy.wait_event(ready)
        for frame in frames:
            frame.ready = ready
        return frames

    def _copy(self, picture: av.VideoFrame, like: Frame) -> Frame:
        runtime, stream = self._runtime, self._stream
        slot, planes = self.ring.lease()
        slot.write_by(stream)
        plane: Any
        for plane, target in zip(picture.planes, planes, strict=True):
            row = target.strides[0]
            runtime.memcpy2DAsync(
                target.data.ptr,
                row,
                plane.buffer_ptr,
                plane.line_size,
                row,
                target.shape[0],
                runtime.memcpyDeviceToDevice,
                stream.ptr,
            )
        return like.replace(planes, self._spec, slot=slot)

    def close(self) -> None:
        """Wait until the last surface is copied."""
        self._stream.synchronize()


class Outlet:
    """Brings pictures to the GPU: surfaces by a copy there, others by an upload.

    Args:
        spec: of the first frame, on the GPU.
        depth: slots of the ring.
        hardware: whether surfaces come first.

    Raises:
        DeviceError: the device is not there, or its memory does not suffice.
    """

    def __init__(self, spec: FrameSpec, depth: int, hardware: bool) -> None:
        self.format = spec.format
        self._depth = depth
        self._surfaces: Surfaces | None = None
        self._mover: Mover | None = None
        self._given: FrameSpec | None = None  # of the last frame that came; mostly the same object
        self._make(spec, hardware)

    def _make(self, spec: FrameSpec, hardware: bool) -> None:
        self.close()
        self.spec = spec
        if hardware:
            self._surfaces = Surfaces(spec, self._depth)
        else:
            self._mover = Mover(replace(spec, device=CPU), spec.device, self._depth)

    def from_surfaces(self, shown: list[tuple[av.VideoFrame, Frame]]) -> list[Frame]:
        """Return frames with the planes of surfaces.

        Args:
            shown: surfaces, each with a frame that has everything else; all of one spec.
        """
        spec = shown[0][1].spec
        if self._surfaces is None or spec is not self._given:
            if self._surfaces is None or spec != self.spec:
                self._make(spec, True)
            self._given = spec
        assert self._surfaces is not None
        return self._surfaces.frames(shown)

    def from_host(self, frame: Frame) -> Frame:
        """Return the frame uploaded."""
        if self._mover is None or frame.spec is not self._given:
            spec = replace(frame.spec, device=self.spec.device)
            if self._mover is None or spec != self.spec:
                self._make(spec, False)
            self._given = frame.spec
        assert self._mover is not None
        return self._mover.move(frame)

    def close(self) -> None:
        """Let go of the rings."""
        if self._surfaces is not None:
            self._surfaces.close()
        self._surfaces = None
        self._mover = None


def why_not(error: Exception) -> str:
    """Return in a few words why a file cannot be decoded on the GPU."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


DECODE_ERRORS = (av.error.FFmpegError, RuntimeError, NotImplementedError, ValueError)
"""What PyAV raises where a codec, profile or size is beyond the chip."""
