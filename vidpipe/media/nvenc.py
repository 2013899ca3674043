"""NVENC, the GPU's encoder, fed from the GPU's memory.

FFmpeg tells NVENC only the address and the pitch of the first plane, so chroma has to follow
the luma in one allocation. Frames that lie so in their ring are encoded where they are; others
are packed into a ring of this module's own. NVENC reads a picture until its packet is out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import av.error

from vidpipe.device import CPU, Device, Ring, import_cupy, new_stream
from vidpipe.frame import PIXEL_FORMATS, Array, Frame, FrameSpec, PixelFormat

PIX_FMT = "cuda"
"""The pixel format that an encoder is opened with to read from a GPU's memory."""

_PACKED = {"yuv420p": "nv12", "yuv420p10le": "p010le"}
_LAYOUTS = ("nv12", "p010le", "p016le")


def layout_for(format: PixelFormat, wanted: str | None) -> str | None:
    """Return how NVENC gets frames of a format from a GPU's memory, or None if it cannot.

    Args:
        format: of the frames.
        wanted: pixel format to encode in, or None for one that loses nothing.
    """
    name = _PACKED.get(format.name, format.name)
    if name not in _LAYOUTS:
        return None
    if name == "p016le":  # of 16 bits NVENC keeps 10
        return name if wanted in ("p010le", "p016le") else None
    return name if wanted in (None, name, format.name) else None


def held(options: dict[str, str]) -> int:
    """Return how many pictures FFmpeg keeps before the first packet comes, at most.

    Args:
        options: of the encoder; its surfaces, lookahead, B-frames and delay count.
    """

    def number(name: str, default: int) -> int:
        try:
            return int(float(options.get(name, default)))
        except ValueError:
            return default

    interval = number("bf", 3) + 1
    ahead = number("rc-lookahead", 0)
    surfaces = max(4, 4 * interval)
    if ahead > 0:
        surfaces = max(surfaces, ahead + interval + 5, number("surfaces", 0))
    elif number("surfaces", 0) > 0:
        surfaces = max(number("surfaces", 0), surfaces if interval > 1 else 1)
    surfaces = min(surfaces, 64)
    return min(surfaces, number("delay", surfaces) + 1)


def variants(options: dict[str, str], fixed: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield options to try, best first: not every chip has B-frames, or refers to them.

    Args:
        options: all that are wanted.
        fixed: those that the user set, which stay.
    """
    yield options
    for names in (("b_ref_mode",), ("b_ref_mode", "bf")):
        if not any(name in options and name not in fixed for name in names):
            continue
        less = {k: v for k, v in options.items() if k not in names or k in fixed}
        if "bf" in names and "bf" not in fixed:
            less["bf"] = "0"
        yield less


def with_profile(name: str, options: dict[str, str], layout: str) -> dict[str, str]:
    """Return the options with the profile that 10 bits need."""
    if name == "hevc_nvenc" and layout != "nv12":
        return {"profile": "main10", **options}
    return options


def attempt(name: str, options: dict[str, str], spec: FrameSpec, layout: str) -> str | None:
    """Encode one grey picture; return why that fails, or None.

    Args:
        name: FFmpeg's name of the encoder.
        options: to open it with.
        spec: of the frames to come, on the GPU.
        layout: see `layout_for`.

    Raises:
        MissingExtraError, DeviceError: there is no CuPy, no such device or no memory.
    """
    context: Any = av.CodecContext.create(name, "w")
    context.width, context.height = spec.width, spec.height
    context.pix_fmt = PIX_FMT
    context.framerate = spec.rate or Fraction(25)
    context.time_base = spec.time_base
    context.options = dict(options)
    feeder = Feeder(spec, layout, 1)
    try:
        picture = feeder.blank()
        picture.pts = 0
        picture.time_base = spec.time_base
        packets = [*context.encode(picture), *context.encode(None)]
    except ENCODE_ERRORS as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    return None if packets else "it gives no packet"


class Feeder:
    """Shows planes in a GPU's memory to NVENC, as PyAV's frames.

    It belongs to the thread that makes it.

    Args:
        spec: of the frames to come, on the GPU.
        layout: "nv12", "p010le" or "p016le".
        depth: pictures that the encoder holds; for frames that have to be packed.

    Raises:
        MissingExtraError, DeviceError: there is no CuPy, no such device or no memory.
    """

    def __init__(self, spec: FrameSpec, layout: str, depth: int) -> None:
        self.spec = spec
        self.layout = PIXEL_FORMATS[layout]
        self._cupy = import_cupy(spec.device)
        self._cupy.cuda.runtime.free(0)  # makes the context, which FFmpeg takes as the current
        self._stream = _stream(self._cupy, spec.device)
        self._context = _context(spec.device, self._stream)
        self._depth = depth + 1
        self._ring: Ring | None = None
        if spec.format.name in _PACKED:
            self._ring = self._new_ring()

    def _new_ring(self) -> Ring:
        shapes = self.layout.plane_shapes(self.spec.width, self.spec.height)
        return Ring([(s, self.layout.dtype) for s in shapes], self._depth, self.spec.device)

    def picture(self, frame: Frame) -> tuple[av.VideoFrame, tuple[Array, ...]]:
        """Return a frame as NVENC takes it, and what must live until its packet is out.

        Args:
            frame: of `spec`, on the GPU; ready or not.
        """
        frame.wait(self._stream)
        planes = tuple(frame.planes)
        if not self._in_place(planes, frame.spec.format):
            planes = self._packed(planes, frame.spec.format)
            frame.read_by(self._stream)
        return self._shown(planes), planes

    def upload(self, planes: tuple[Array, ...]) -> tuple[av.VideoFrame, tuple[Array, ...]]:
        """Do as `picture` does for planes in host memory, in the layout and size of NVENC's."""
        self._ring = self._ring or self._new_ring()
        _, targets = self._ring.lease()
        for source, target in zip(planes, targets, strict=True):
            target.set(source, stream=self._stream)
        self._stream.synchronize()
        return self._shown(targets), targets

    def download(self, frame: Frame) -> Frame:
        """Return a copy of a frame in host memory."""
        frame.synchronize()
        planes = [self._cupy.asnumpy(plane) for plane in frame.planes]
        return frame.replace(planes, replace(frame.spec, device=CPU))

    def blank(self) -> av.VideoFrame:
        """Return a picture of some one colour, for a trial."""
        _, planes = self._new_ring().lease()
        with self._stream:
            for plane in planes:
                plane.fill(1 << (8 * plane.itemsize - 1))
        return self._shown(planes)

    def _in_place(self, planes: tuple[Array, ...], format: PixelFormat) -> bool:
        """Say whether chroma follows luma in memory as NVENC takes it."""
        if format != self.layout:
            return False
        luma, chroma = planes
        pitch = luma.strides[0]
        return bool(
            luma.strides[1] == luma.itemsize
            and chroma.strides == (pitch, 2 * luma.itemsize, luma.itemsize)
            and _address(chroma) == _address(luma) + luma.shape[0] * pitch
        )

    def _packed(self, planes: tuple[Array, ...], format: PixelFormat) -> tuple[Array, ...]:
        self._ring = self._ring or self._new_ring()
        _, (luma, chroma) = self._ring.lease()
        shift = self.layout.shift - format.shift if format.name in _PACKED else 0
        with self._stream:
            luma[...] = planes[0] << shift if shift else planes[0]
            if len(planes) == 2:
                chroma[...] = planes[1]
            else:
                for i, plane in enumerate(planes[1:]):
                    chroma[..., i] = plane << shift if shift else plane
        return luma, chroma

    def _shown(self, planes: tuple[Array, ...]) -> av.VideoFrame:
        with self._stream:  # CuPy would make the stream wait for its current one
            return _imported(planes, self.layout.name, self._stream, self._context)


def _stream(cupy: Any, device: Device) -> Any:
    # FFmpeg can be given a stream on the first GPU only; elsewhere it uses the legacy one.
    return new_stream(device) if device.index == 0 else cupy.cuda.Stream.null


def _context(device: Device, stream: Any) -> Any:
    from av.video.frame import CudaContext

    return CudaContext(
        device_id=device.index,
        primary_ctx=False,
        current_ctx=True,
        cuda_stream=stream.ptr or None,
    )


def _imported(planes: tuple[Array, ...], layout: str, stream: Any, context: Any) -> av.VideoFrame:
    height, width = planes[0].shape
    # In DLPack 1 is the legacy stream.
    return av.VideoFrame.from_dlpack(
        planes, layout, width, height, stream=stream.ptr or 1, cuda_context=context
    )


def _address(array: Array) -> int:
    return int(array.data.ptr)


ENCODE_ERRORS = (av.error.FFmpegError, RuntimeError, NotImplementedError, ValueError)
"""What PyAV raises where a codec, size or option is beyond the chip."""
