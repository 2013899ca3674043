"""Between PyAV's frames and planes, and between pixel formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vidpipe.errors import MediaError, SpecError
from vidpipe.frame import PIXEL_FORMATS, Array, Color, Matrix, PixelFormat, Range

_SWS_MATRIX: dict[int, int] = {
    Matrix.BT709: 1,
    Matrix.FCC: 4,
    Matrix.BT470BG: 5,
    Matrix.SMPTE170M: 5,
    Matrix.SMPTE240M: 7,
    Matrix.BT2020_NCL: 9,
    Matrix.BT2020_CL: 9,
}
"""Matrix coefficients of H.273 -> libswscale's SWS_CS numbers."""

# Chroma and rounding as exact as libswscale can; no shortcuts for speed.
_EXACT = (
    int(Interpolation.ACCURATE_RND)
    | int(Interpolation.BITEXACT)
    | int(Interpolation.FULL_CHR_H_INT)
    | int(Interpolation.FULL_CHR_H_INP)
)


def planes_of(frame: av.VideoFrame, format: PixelFormat) -> tuple[Array, ...]:
    """Return NumPy views of a frame's planes.

    Args:
        frame: a frame in host memory whose samples lie as `format` says.
        format: how to read them.

    Returns:
        Read-only arrays of shape (h, w) or (h, w, 2), uint8 or uint16, full code values.
        They keep the frame's memory alive. Rows may be further apart than the width.
    """
    dtype = format.dtype
    planes = []
    shapes = format.plane_shapes(frame.width, frame.height)
    plane: Any  # PyAV's type stubs do not say that planes are buffers
    for plane, shape in zip(frame.planes, shapes, strict=True):
        pitch = abs(plane.line_size)
        strides = (pitch, *(dtype.itemsize * n for n in ((2, 1) if len(shape) == 3 else (1,))))
        array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, plane, strides=strides)
        # A negative pitch: stored bottom up, and the buffer begins at the last row.
        view = array[::-1] if plane.line_size < 0 else array.view()
        view.flags.writeable = False
        planes.append(view)
    return tuple(planes)


def frame_from(planes: Sequence[Array], format: PixelFormat, share: bool = False) -> av.VideoFrame:
    """Return a PyAV frame that shows the planes.

    Args:
        planes: NumPy arrays as `planes_of` returns them; only rows may be apart.
        format: their pixel format.
        share: do not copy, where PyAV allows it. The frame then holds on to the arrays'
            memory until its last user, an encoder with lookahead included, lets go of it.
            Not for users that read past the end of a row in vectors, as libswscale may, or
            that free frames on threads of their own, which would need the interpreter.
    """
    height, width = planes[0].shape[:2]
    x, y = format.subsampling
    even = width % (1 << x) == 0 and height % (1 << y) == 0
    if share and even and (not format.interleaved or format.name in _SEMI_PLANAR):
        exports = [_export(p) for p in planes]
        if all(e is not None for e in exports):
            return av.VideoFrame.from_dlpack(tuple(exports), format.name, width, height)
    frame = av.VideoFrame(width, height, format.name)
    fill(frame, planes)
    return frame


_SEMI_PLANAR = ("nv12", "p010le", "p016le")  # those that PyAV imports


def _export(array: Array) -> Array | None:
    """Return an array of the same memory that DLPack and FFmpeg can both describe, or None."""
    row = array.strides[0]
    # Encoders read rows in vectors; a row that does not begin on one is slower than a copy.
    if not array[0].flags.c_contiguous or row <= 0 or row % 16 or array.ctypes.data % 16:
        return None
    if array.flags.writeable:
        return array
    # NumPy exports nothing read-only to the unversioned DLPack of PyAV. FFmpeg only reads,
    # so the writable array behind a view of a decoder's plane will do.
    base = array.base
    if (
        isinstance(base, np.ndarray)
        and base.flags.writeable
        and (base.shape, base.strides) == (array.shape, array.strides)
        and base.ctypes.data == array.ctypes.data
    ):
        return base
    return None


def fill(frame: av.VideoFrame, planes: Sequence[Array]) -> None:
    """Copy planes into a frame of the same size and format."""
    plane: Any
    for plane, source in zip(frame.planes, planes, strict=True):
        itemsize = source.dtype.itemsize
        inner = (2 * itemsize, itemsize) if source.ndim == 3 else (itemsize,)
        strides = (plane.line_size, *inner)
        target: np.ndarray[Any, Any] = np.ndarray(
            source.shape, source.dtype, plane, strides=strides
        )
        np.copyto(target, source)


def nearest_format(name: str, allow_alpha_loss: bool = False) -> tuple[PixelFormat, bool]:
    """Return the link format for a decoder's pixel format.

    Args:
        name: FFmpeg's name.
        allow_alpha_loss: take formats with transparency too, and lose it.

    Returns:
        (format, same): the link format that loses nothing, and whether the samples
        already lie in memory as it says.

    Raises:
        MediaError: no link format holds such samples.
    """
    if name.startswith("yuvj") and f"yuv{name[4:]}" in PIXEL_FORMATS:
        return PIXEL_FORMATS[f"yuv{name[4:]}"], True
    if name in PIXEL_FORMATS:
        return PIXEL_FORMATS[name], True
    video_format = av.VideoFormat(name, 64, 64)
    components = list(video_format.components)
    alpha = any(c.is_alpha for c in components) and name != "pal8"
    if alpha and not allow_alpha_loss:
        raise MediaError(
            f"the picture has transparency (pixel format {name}), which vidpipe does not carry",
            hint="Use --drop alpha to go on without it",
        )
    if not components or name.startswith(("xyz", "bayer")) or "f16" in name or "f32" in name:
        raise MediaError(
            f"pixel format {name} has no lossless equal among the supported ones",
            hint="Convert the file first, for example to yuv444p16le or gbrp16le",
        )
    colours = [c for c in components if not c.is_alpha]
    depth = 8 if name == "pal8" else max(c.bits for c in colours)
    bits = next(b for b in (8, 10, 12, 16) if b >= depth)
    suffix = "" if bits == 8 else f"{bits}le"
    if video_format.is_rgb or name == "pal8":
        return PIXEL_FORMATS[f"gbrp{suffix}"], False
    if len(colours) == 1:
        return PIXEL_FORMATS[f"gray{suffix}"], False
    size = (video_format.chroma_width(), video_format.chroma_height())
    layout = {(32, 32): "420", (32, 64): "422"}.get(size, "444")
    return PIXEL_FORMATS[f"yuv{layout}p{suffix}"], False


class Converter:
    """Turns frames into another pixel format or size with libswscale.

    Args:
        width, height, format: what comes out.
        kernel: how planes are resized, a name of `KERNELS`.

    Matrix and range stay what they are, unless the call names others.
    """

    def __init__(
        self, width: int, height: int, format: str, kernel: str = "bicubic", threads: int = 0
    ) -> None:
        self.width = width
        self.height = height
        self.format = format
        self.threads = threads
        self._flags: Any = KERNELS[kernel] | _EXACT
        self._reformatter = VideoReformatter()

    def __call__(
        self, frame: av.VideoFrame, color: Color, target: Color | None = None
    ) -> av.VideoFrame:
        """Convert one frame.

        Args:
            frame: on the CPU.
            color: of the frame, resolved (see `FrameSpec.resolved_color`).
            target: of the result, resolved; by default the same.
        """
        target = target or color
        return self._reformatter.reformat(
            frame,
            self.width,
            self.height,
            self.format,
            src_colorspace=_SWS_MATRIX.get(color.matrix, 5),
            dst_colorspace=_SWS_MATRIX.get(target.matrix, 5),
            src_color_range=2 if color.range == Range.FULL else 1,
            dst_color_range=2 if target.range == Range.FULL else 1,
            interpolation=self._flags,
            threads=self.threads,
        )


KERNELS = {
    "bilinear": int(Interpolation.BILINEAR),
    "bicubic": int(Interpolation.BICUBIC),
    "lanczos": int(Interpolation.LANCZOS),
    "spline": int(Interpolation.SPLINE),
    "area": int(Interpolation.AREA),
    "nearest": int(Interpolation.POINT),
}
"""Resampling kernels by name, as libswscale's flags."""


def kernel_flags(name: str) -> int:
    """Return libswscale's flag for a kernel.

    Raises:
        SpecError: no kernel has that name.
    """
    try:
        return KERNELS[name]
    except KeyError:
        raise SpecError(
            f"no kernel is called '{name}'", hint="Known: " + ", ".join(sorted(KERNELS))
        ) from None
