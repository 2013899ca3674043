"""A clip to measure with, made on the spot."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidpipe.frame import PIXEL_FORMATS
from vidpipe.media.convert import frame_from

RATE = 60
_VERSION = 2
_DRAWN, _ROUNDS = 240, 8
_GOP = 60


def clip_folder() -> Path:
    """Return the folder of made clips, of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"vidpipe-bench-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def synthetic_clip(width: int, height: int, *, drawn: int = _DRAWN, rounds: int = _ROUNDS) -> Path:
    """Return an H.264 clip: a textured picture that moves, with a little noise; made once.

    Args:
        width, height: pixels, even.
        drawn: frames that are drawn and encoded, whole groups of 60.
        rounds: how often the encoded frames stand in the file, one after the other. Each
            group of pictures begins anew, so decoders do not notice.
    """
    path = clip_folder() / f"{width}x{height}-{drawn}x{rounds}-v{_VERSION}.mp4"
    if path.is_file():
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with av.open(str(part), "w", format="mp4") as out:
            stream = _stream(out, width, height)
            packets: list[Any] = []
            for picture in pictures(width, height, drawn):
                packets += stream.encode(picture)
            packets += stream.encode(None)
            for number in range(rounds):
                for packet in packets:
                    out.mux(_shifted(packet, stream, number * drawn))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _stream(out: Any, width: int, height: int) -> Any:
    # A closed group of pictures each, so that the frames can be repeated as they are.
    options = {"preset": "veryfast", "crf": "18", "x264-params": "open-gop=0:scenecut=0"}
    stream = out.add_stream("libx264", rate=RATE, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.gop_size = _GOP
    context.time_base = Fraction(1, RATE)
    context.colorspace = context.color_trc = context.color_primaries = 1
    context.color_range = 1
    return stream


def _shifted(packet: Any, stream: Any, frames: int) -> Any:
    copy = av.Packet(bytes(packet))
    copy.stream = stream
    copy.time_base = packet.time_base
    shift = round(Fraction(frames, RATE) / packet.time_base)
    copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
    copy.duration = packet.duration
    copy.is_keyframe = packet.is_keyframe
    return copy


def pictures(width: int, height: int, count: int) -> Iterator[av.VideoFrame]:
    """Yield pictures of a texture with edges that moves across, with noise, limited range."""
    random = np.random.default_rng(7)
    margin = 2 * count
    y, x = np.mgrid[: height + margin, : width + margin].astype(np.float32)
    waves = np.sin(x / 23) + np.cos(y / 17) + np.sin((x + 2 * y) / 7) + np.sin(x * y / 9000)
    blocks = random.uniform(-2, 2, ((height + margin) // 24 + 1, (width + margin) // 24 + 1))
    edges = np.kron(blocks, np.ones((24, 24)))[: height + margin, : width + margin]
    luma = np.clip(126 + 18 * waves + 14 * edges, 16, 235).astype(np.int16)
    noise = np.rint(random.normal(0, 2.5, (height + 64, width + 64))).astype(np.int16)
    chroma_y, chroma_x = np.mgrid[: height // 2, : width // 2].astype(np.float32)
    for number in range(count):
        dx, dy = 2 * number % margin, number % margin
        jx, jy = random.integers(0, 64, 2)
        plane = luma[dy : dy + height, dx : dx + width] + noise[jy : jy + height, jx : jx + width]
        u = 128 + 40 * np.sin((chroma_x + number) / 61)
        v = 128 + 40 * np.cos((chroma_y - number) / 47)
        planes = [np.clip(plane, 16, 235).astype(np.uint8), u.astype(np.uint8), v.astype(np.uint8)]
        frame = frame_from(planes, PIXEL_FORMATS["yuv420p"])
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        yield frame
