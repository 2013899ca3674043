"""Which encoder writes which codec, with which options and pixel formats."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import av
import av.codec
import numpy as np

from vidpipe.errors import OutputError, SpecError, did_you_mean
from vidpipe.frame import PIXEL_FORMATS, Color, FrameSpec, Matrix, PixelFormat, Range


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder and what it is given unless told otherwise.

    Attributes:
        name: FFmpeg's name.
        options: defaults; `crf` and `preset` are overridden by the stage's options.
        even: 4:2:0 and 4:2:2 only in sizes that the subsampling divides.
        captions: writes CEA-608/708 captions that frames carry.
        ticks: takes only the time base of a constant rate.
        copies: has read the picture when the call that brings it returns.
        device: takes pictures from the memory of a GPU.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)
    even: bool = False
    captions: bool = False
    ticks: bool = False
    copies: bool = False
    device: bool = False


# CRF 18 is hard to tell from the source in H.264; the fast presets leave the processor to
# the model, and cost file size, not quality, at a constant rate factor.
ENCODERS = {
    "h264": Encoder(
        "libx264", {"crf": "18", "preset": "veryfast"}, even=True, captions=True, copies=True
    ),
    "hevc": Encoder(
        "libx265",
        {"crf": "20", "preset": "fast", "a53cc": "1"},
        even=True,
        captions=True,
        copies=True,
    ),
    "av1": Encoder("libsvtav1", {"crf": "28", "preset": "8"}, copies=True),
    "vp9": Encoder(
        "libvpx-vp9",
        {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
        copies=True,
    ),
    "ffv1": Encoder("ffv1", {"level": "3", "slicecrc": "1"}),
    "prores": Encoder("prores_ks"),
    "mpeg4": Encoder("mpeg4", {"b": "20M"}, ticks=True),
    "mpeg2": Encoder("mpeg2video", {"b": "20M"}, captions=True, ticks=True),
}
"""Encoders by the friendly name of their codec."""


def _nvenc(name: str, quality: int) -> Encoder:
    # Rate control "vbr" with a quality and no bit rate is NVENC's constant quality.
    options = {"preset": "p5", "tune": "hq", "rc": "vbr", "cq": str(quality), "b": "0"}
    options |= {"bf": "3", "b_ref_mode": "middle", "g": "250"}
    return Encoder(name, options, even=True, captions=True, device=True)


NVENC = {
    "h264": _nvenc("h264_nvenc", 19),
    "hevc": _nvenc("hevc_nvenc", 22),
    "av1": _nvenc("av1_nvenc", 28),
}
"""NVIDIA's encoders by the friendly name of their codec."""

_NVENC_PRESETS = {f"p{n}": f"p{n}" for n in range(1, 8)}
_NVENC_PRESETS |= {"ultrafast": "p1", "superfast": "p1", "veryfast": "p2", "faster": "p3"}
_NVENC_PRESETS |= {"fast": "p3", "medium": "p4", "slow": "p5", "slower": "p6"}
_NVENC_PRESETS |= {"veryslow": "p7", "placebo": "p7"}
_NVENC_PRESETS |= {str(n): f"p{max(1, 7 - n // 2)}" for n in range(14)}  # SVT-AV1's
"""What NVENC calls the presets of the other encoders."""

_RATE_CONTROL = ("rc", "cq", "b")


def encoder_for(codec: str) -> Encoder:
    """Return the encoder for a friendly name or for FFmpeg's name of an encoder.

    Raises:
        OutputError: this FFmpeg has no such video encoder.
    """
    table = [*ENCODERS.values(), *NVENC.values()]
    known = ENCODERS.get(codec) or next((e for e in table if e.name == codec), None)
    name = known.name if known else codec
    try:
        found = av.Codec(name, "w")
    except (av.codec.codec.UnknownCodecError, ValueError):
        raise OutputError(
            f"no video encoder is called '{codec}'",
            hint=did_you_mean(codec, [*ENCODERS]) or "Known: " + ", ".join(ENCODERS),
        ) from None
    if found.type != "video":
        raise OutputError(
            f"'{codec}' encodes {found.type}, not video", hint="Known: " + ", ".join(ENCODERS)
        )
    return known or Encoder(found.name)


def encoder_options(
    encoder: Encoder, crf: float | None, preset: str | None, more: dict[str, str]
) -> dict[str, str]:
    """Return the options to open an encoder with.

    Raises:
        OutputError: the encoder has no such option.
    """
    context = av.CodecContext.create(encoder.name, "w")
    supported = context.supported_options
    private = {o.name for o in supported.private}
    known = private | {o.name for o in supported.generic}
    options = dict(encoder.options)
    if encoder.name == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # else it writes to the user's terminal
    if encoder.device:
        options = _nvenc_options(encoder, crf, preset, more)
        crf = preset = None
    for name, value in (("crf", crf), ("preset", preset)):
        if value is None:
            continue
        if name not in private:
            raise OutputError(
                f"encoder {encoder.name} has no {name}",
                hint="Use --encoder-option KEY=VALUE for what it has",
            )
        options[name] = f"{value:g}" if isinstance(value, float) else str(value)
    for name, value in more.items():
        if name not in known:
            raise OutputError(
                f"encoder {encoder.name} has no option '{name}'",
                hint=did_you_mean(name, sorted(private)),
            )
        options[name] = str(value)
    if encoder.name == "libx265":
        given = options.get("x265-params")
        options["x265-params"] = "log-level=error" + (f":{given}" if given else "")
    return options


def _nvenc_options(
    encoder: Encoder, crf: float | None, preset: str | None, more: dict[str, str]
) -> dict[str, str]:
    """Return NVENC's defaults, with a rate factor and a preset in its own terms.

    A rate factor is NVENC's target quality "cq", on the same scale as the other encoder of
    that codec has; 0 is lossless. What the user sets of rate control replaces the defaults.
    """
    options = dict(encoder.options)
    if not {"rc", "b", "qp"}.isdisjoint(more):
        options = {k: v for k, v in options.items() if k not in _RATE_CONTROL}
    if crf is not None and crf > 0:
        options |= {"rc": "vbr", "cq": f"{crf:g}", "b": "0"}
    elif crf is not None:
        options = {k: v for k, v in options.items() if k not in _RATE_CONTROL}
        options["tune"] = "lossless"
    if preset is not None:
        if preset not in _NVENC_PRESETS:
            raise OutputError(
                f"encoder {encoder.name} has no preset '{preset}'",
                hint="Use p1 (fast) to p7 (good)",
            )
        options["preset"] = _NVENC_PRESETS[preset]
    return options


def encoder_format(encoder: Encoder, spec: FrameSpec, wanted: str | None) -> str:
    """Return the pixel format to encode in, FFmpeg's name.

    The link's own if the encoder takes it, else the nearest that loses nothing; for R'G'B',
    which few encoders take, Y'CbCr without subsampling.

    Raises:
        OutputError: there is none, or the encoder does not take the one that is wanted.
    """
    names = [f.name for f in av.Codec(encoder.name, "w").video_formats or ()]
    name = spec.format.name
    if wanted is not None:
        if names and wanted not in names:
            raise OutputError(
                f"encoder {encoder.name} does not take pixel format '{wanted}'",
                hint="It takes: " + ", ".join(names),
            )
        return wanted
    chosen = name if not names or name in names else _lossless(spec.format, names)
    if chosen is None and spec.format.model == "rgb":
        full = PixelFormat("", "yuv", min(spec.format.bits, 10))
        chosen = _lossless(full, names)
    if chosen is None:
        raise OutputError(
            f"encoder {encoder.name} cannot hold pixel format {name} without loss",
            hint=f"Use --pix-fmt with one of {', '.join(_links(names))}, or another --codec",
        )
    return chosen


def is_rgb(pix_fmt: str) -> bool:
    """Say whether a pixel format, by FFmpeg's name, holds R'G'B'."""
    return bool(av.VideoFormat(pix_fmt, 16, 16).is_rgb)


def encoded_color(spec: FrameSpec, pix_fmt: str) -> Color:
    """Return the colour tags of frames of `spec` once they are in `pix_fmt`.

    They are the link's own, unless R'G'B' becomes Y'CbCr, which is then that of BT.709 in
    limited range, or the other way round.
    """
    if spec.format.model == "rgb" and not is_rgb(pix_fmt):
        return replace(spec.color, matrix=Matrix.BT709, range=Range.LIMITED)
    if spec.format.model == "yuv" and is_rgb(pix_fmt):
        return replace(spec.color, matrix=Matrix.RGB, range=Range.FULL)
    return spec.color


def _links(names: list[str]) -> list[str]:
    return [n for n in names if n in PIXEL_FORMATS] or names


def _lossless(format: PixelFormat, names: list[str]) -> str | None:
    """Return the cheapest of `names` that holds every sample of `format`."""
    if format.model == "rgb":
        best = [n for n in (f"gbrp{b}le" for b in (10, 12, 16)) if n in names]
        if format.bits == 8:
            return next((n for n in ("gbrp", "bgr0", "rgb24", "bgra") if n in names), None)
        return next((n for n in best if PIXEL_FORMATS[n].bits >= format.bits), None)

    def cost(name: str) -> tuple[int, int, bool] | None:
        other = PIXEL_FORMATS.get(name)
        if other is None or other.model == "rgb" or other.bits < format.bits:
            return None
        if other.model == "gray" and format.model != "gray":
            return None
        if format.model == "yuv" and any(
            o > f for o, f in zip(other.subsampling, format.subsampling, strict=True)
        ):
            return None
        return other.bits, -sum(other.subsampling), other.interleaved

    costs = [(c, n) for n in names if (c := cost(n)) is not None]
    return min(costs)[1] if costs else None


def check_size(encoder: Encoder, spec: FrameSpec, pix_fmt: str) -> None:
    """Refuse sizes that the encoder would crop or not take.

    Raises:
        SpecError: width or height is odd where it must not be.
    """
    format = PIXEL_FORMATS.get(pix_fmt)
    if format is None or not encoder.even:
        return
    x, y = format.subsampling
    if spec.width % (1 << x) or spec.height % (1 << y):
        raise SpecError(
            f"encoder {encoder.name} takes {pix_fmt} only in even sizes, "
            f"got {spec.width}x{spec.height}",
            hint="Use --pix-fmt yuv444p, or --codec av1, vp9 or ffv1",
        )


def to_yuv(planes: tuple[Any, ...], source: PixelFormat, target: PixelFormat) -> tuple[Any, ...]:
    """Give grey planes neutral chroma, so that an encoder without grey takes them.

    Args:
        planes: one array of shape (h, w).
        source, target: a grey and a planar YUV format of the same depth.

    Returns:
        Arrays of the target's shapes; the first is the one given.
    """
    height, width = planes[0].shape
    middle = 1 << (source.bits - 1)
    shapes = target.plane_shapes(width, height)[1:]
    return (planes[0], *(np.full(s, middle, target.dtype) for s in shapes))
