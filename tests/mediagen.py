"""Media files for tests, made with PyAV, and a minimal stand-in for the pipeline."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidpipe.frame import PIXEL_FORMATS, Color, Frame, FrameSpec, PixelFormat
from vidpipe.media.convert import fill
from vidpipe.stage import Sink, Source, Stage

SAMPLE_RATE = 48000

KEYS_X264 = {"preset": "ultrafast", "g": "20", "keyint_min": "20", "bf": "3", "sc_threshold": "0"}
"""A key frame every 20 frames, and B-frames."""


def copy(source: Source, sink: Sink, *stages: Stage) -> FrameSpec:
    """Run a source into a sink on one thread; returns the first spec that the sink got."""
    spec = first = source.plan()
    for stage in stages:
        first = stage.plan(first)
    sink.attach(source)
    sink.plan(first)
    for actor in (source, *stages, sink):
        actor.open()

    def push(frames: Iterable[Frame], at: int) -> None:
        for frame in frames:
            if at == len(stages):
                sink.write(frame)
            else:
                push(stages[at].process(frame), at + 1)

    try:
        for frame in source.frames():
            if frame.spec != spec:
                spec = out = frame.spec
                for i, stage in enumerate(stages):
                    push(stage.flush(), i + 1)
                    out = stage.replan(out)
                sink.replan(out)
            push([frame], 0)
        for i, stage in enumerate(stages):
            push(stage.flush(), i + 1)
        sink.finish()
    finally:
        for actor in (source, *stages, sink):
            actor.close()
    return first


def pattern(format: PixelFormat, width: int, height: int, seed: int) -> tuple[Any, ...]:
    """Return planes with structure and noise over the whole code range."""
    random = np.random.default_rng(seed)
    planes = []
    for shape in format.plane_shapes(width, height):
        top = (1 << format.bits) - 1
        y, x = np.mgrid[: shape[0], : shape[1]]
        wave = (np.sin(x / 9 + seed / 3) + np.cos(y / 7 + seed / 5)) / 4 + 0.5
        values = wave * top * 0.9 + random.integers(0, max(top // 16, 2), shape[:2])
        values = np.clip(values, 0, top).astype(format.dtype)
        if len(shape) == 3:
            values = np.stack([values, values[::-1]], axis=-1)
        planes.append(np.left_shift(values, format.shift).astype(format.dtype))
    return tuple(planes)


def flat(format: PixelFormat, width: int, height: int, level: float) -> tuple[Any, ...]:
    """Return planes of one grey (0..1 of the code range)."""
    top = (1 << format.bits) - 1
    planes = []
    for i, shape in enumerate(format.plane_shapes(width, height)):
        value = level * top if i == 0 else (1 << (format.bits - 1))
        planes.append(np.full(shape, int(value) << format.shift, format.dtype))
    return tuple(planes)


@dataclass
class Audio:
    """An audio track: silence with clicks at `clicks_s`, padded by `late_s` at the start."""

    codec: str = "aac"
    language: str | None = None
    title: str | None = None
    disposition: int = 0
    clicks_s: Sequence[float] = ()
    channels: int = 2
    late_s: float = 0.0


@dataclass
class Subtitles:
    """A text track: (start_s, end_s, text) each."""

    codec: str = "subrip"
    language: str | None = None
    lines: Sequence[tuple[float, float, str]] = ((0.2, 0.6, "One"), (0.8, 1.2, "Two"))
    disposition: int = 0


@dataclass
class Clip:
    """A file to make; see `make`."""

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (160, 96)
    rate: Fraction | int = 25
    frames: int = 40
    time_base: Fraction | None = None
    pts: Sequence[int] | None = None
    options: dict[str, str] = field(default_factory=dict)
    color: Color = field(default_factory=Color)
    sample_aspect_ratio: Fraction | None = None
    rotation: int | None = None
    audio: Sequence[Audio] = ()
    subtitles: Sequence[Subtitles] = ()
    chapters: Sequence[tuple[float, float, str]] = ()
    attachments: Sequence[tuple[str, str, bytes]] = ()
    cover: bool = False
    data: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    video_metadata: dict[str, str] = field(default_factory=dict)
    picture: Callable[[PixelFormat, int, int, int], tuple[Any, ...]] = pattern
    video: bool = True
    interlaced: bool = False
    container_options: dict[str, str] = field(default_factory=dict)
    container: str | None = None


def jpeg(width: int = 32, height: int = 32) -> bytes:
    """Return a small JPEG file."""
    context: Any = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuvj420p"
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame(width, height, "yuvj420p")
    fill(frame, flat(PIXEL_FORMATS["yuv420p"], width, height, 0.5))
    frame.pts = 0
    return b"".join(bytes(p) for p in [*context.encode(frame), *context.encode(None)])


def make(path: Path, clip: Clip | None = None, **changes: Any) -> Path:
    """Write a clip and return its path."""
    clip = clip or Clip()
    for name, value in changes.items():
        assert hasattr(clip, name), name
        setattr(clip, name, value)
    with av.open(
        str(path), "w", format=clip.container, container_options=clip.container_options
    ) as out:
        _write(out, clip)
    return path


def _write(out: av.container.OutputContainer, clip: Clip) -> None:
    rate = Fraction(clip.rate)
    base = clip.time_base or 1 / rate
    packets: list[tuple[Fraction, Any]] = []
    video = _video(out, clip, base) if clip.video else None
    tracks = [(_audio(out, a), a) for a in clip.audio]
    texts = [(_text(out, s), s) for s in clip.subtitles]
    cover = _cover(out) if clip.cover else None
    data = out.add_data_stream("klv") if clip.data else None
    for name, mime, content in clip.attachments:
        out.add_attachment(name, mime, content)
    out.metadata.update(clip.metadata)
    if clip.chapters:
        out.set_chapters(
            [
                {
                    "id": i + 1,
                    "start": round(start * 1000),
                    "end": round(end * 1000),
                    "time_base": Fraction(1, 1000),
                    "metadata": {"title": title},
                }
                for i, (start, end, title) in enumerate(clip.chapters)
            ]
        )
    out.start_encoding()
    if video is not None:
        packets += [(p.dts * base, p) for p in _encode_video(video, clip, base)]
    for stream, track in tracks:
        packets += [(p.pts * p.time_base, p) for p in _encode_audio(stream, track, clip)]
    for stream, text in texts:
        packets += _encode_text(stream, text)
    if data is not None:
        for i in range(3):
            packet = av.Packet(bytes([i] * 16))
            packet.time_base = Fraction(1, 1000)
            packet.pts = packet.dts = 100 + i * 300
            packet.stream = data
            packets.append((packet.pts * Fraction(1, 1000), packet))
    if cover is not None:
        packet = av.Packet(jpeg())
        packet.stream, packet.is_keyframe = cover, True
        packet.pts = packet.dts = 0
        packet.time_base = Fraction(1, 90000)
        packets.append((Fraction(-1), packet))
    for _, packet in sorted(packets, key=lambda item: Fraction(item[0])):
        out.mux(packet)


def _video(out: Any, clip: Clip, base: Fraction) -> Any:
    stream = out.add_stream(clip.codec, rate=Fraction(clip.rate))
    stream.width, stream.height = clip.size
    stream.pix_fmt = clip.pix_fmt
    context = stream.codec_context
    context.time_base = stream.time_base = base
    context.thread_count = 1
    context.options = dict(clip.options)
    color = clip.color
    context.color_range, context.colorspace = color.range, color.matrix
    context.color_trc, context.color_primaries = color.transfer, color.primaries
    if color.site:
        context.options["chroma_sample_location"] = str(int(color.site))
    if clip.sample_aspect_ratio is not None:
        context.sample_aspect_ratio = clip.sample_aspect_ratio
    if clip.rotation is not None:
        stream.set_display_rotation(clip.rotation)
    if clip.interlaced:
        context.flags |= (1 << 18) | (1 << 29)  # interlaced DCT and motion estimation
    stream.metadata.update(clip.video_metadata)
    return stream


def _encode_video(stream: Any, clip: Clip, base: Fraction) -> Iterable[Any]:
    format = PIXEL_FORMATS.get(clip.pix_fmt.replace("yuvj", "yuv"))
    step = round(1 / (Fraction(clip.rate) * base))
    pts = clip.pts if clip.pts is not None else [i * step for i in range(clip.frames)]
    for i, at in enumerate(pts):
        frame = av.VideoFrame(*clip.size, clip.pix_fmt)
        if format is not None:
            fill(frame, clip.picture(format, *clip.size, i))
        else:
            for plane in frame.planes:
                np.frombuffer(plane, np.uint8)[:] = (i * 5 + 40) % 256
        frame.pts, frame.time_base = at, base
        frame.color_range, frame.colorspace = clip.color.range, clip.color.matrix
        frame.color_trc, frame.color_primaries = clip.color.transfer, clip.color.primaries
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _audio(out: Any, track: Audio) -> Any:
    stream = out.add_stream(track.codec, rate=SAMPLE_RATE)
    stream.codec_context.layout = "stereo" if track.channels == 2 else "mono"
    _tag(stream, track.language, track.title, track.disposition)
    return stream


def _tag(stream: Any, language: str | None, title: str | None, disposition: int) -> None:
    if language:
        stream.metadata["language"] = language
    if title:
        stream.metadata["title"] = title
    if disposition:
        stream.disposition = disposition


def _encode_audio(stream: Any, track: Audio, clip: Clip) -> Iterable[Any]:
    length_s = float(clip.frames / Fraction(clip.rate))
    if clip.pts is not None and clip.time_base is not None:
        length_s = float(max(clip.pts) * clip.time_base)
    start = round(track.late_s * SAMPLE_RATE)
    samples = np.zeros((track.channels, round(length_s * SAMPLE_RATE)), np.float32)
    for click in track.clicks_s:
        at = round(click * SAMPLE_RATE)
        wave = 0.8 * np.sin(np.arange(240) * 2 * np.pi * 1000 / SAMPLE_RATE)
        samples[:, at : at + 240] += wave[: samples.shape[1] - at]
    context = stream.codec_context
    resampler = av.AudioResampler(format=context.format, layout=context.layout, rate=SAMPLE_RATE)
    block = context.frame_size or 1024
    for at in range(start, samples.shape[1], block):
        part = np.ascontiguousarray(samples[:, at : at + block])
        frame = av.AudioFrame.from_ndarray(
            part, "fltp", "stereo" if track.channels == 2 else "mono"
        )
        frame.rate, frame.pts, frame.time_base = SAMPLE_RATE, at, Fraction(1, SAMPLE_RATE)
        for ready in resampler.resample(frame):
            ready.pts, ready.time_base = at, Fraction(1, SAMPLE_RATE)
            yield from stream.encode(ready)
    yield from stream.encode(None)


_ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def _text(out: Any, track: Subtitles) -> Any:
    stream = out.add_stream(track.codec)
    stream.codec_context.subtitle_header = _ASS_HEADER
    stream.time_base = Fraction(1, 1000)
    _tag(stream, track.language, None, track.disposition)
    return stream


def _encode_text(stream: Any, track: Subtitles) -> list[tuple[Fraction, Any]]:
    from av.subtitles.subtitle import SubtitleSet

    packets = []
    for i, (start, end, text) in enumerate(track.lines):
        dialogue = f"{i},0,Default,,0,0,0,,{text}".encode()
        subtitle = SubtitleSet.create(dialogue, 0, round((end - start) * 1000))
        packet = stream.codec_context.encode_subtitle(subtitle)
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = round(start * 1000)
        packet.duration = round((end - start) * 1000)
        packet.stream = stream
        packets.append((packet.pts * Fraction(1, 1000), packet))
    return packets


def _cover(out: Any) -> Any:
    stream = out.add_stream("mjpeg", rate=25)
    stream.width = stream.height = 32
    stream.pix_fmt = "yuvj420p"
    stream.disposition = 1 << 10
    return stream


def video_frames(path: Path) -> list[tuple[Fraction, tuple[Any, ...]]]:
    """Decode all pictures with PyAV alone: (time in seconds, planes)."""
    result = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            base = Fraction(frame.time_base.numerator, frame.time_base.denominator)
            planes = []
            for plane in frame.planes:
                rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
                planes.append(rows.copy())
            result.append((frame.pts * base, tuple(planes)))
    return result


def times(path: Path, kind: str = "video", index: int = 0) -> list[Fraction]:
    """Return the presentation times of a stream's packets in seconds, sorted."""
    result = []
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[index]
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                base = packet.time_base
                result.append(packet.pts * Fraction(base.numerator, base.denominator))
    return sorted(result)


def payloads(path: Path, kind: str, index: int = 0) -> list[bytes]:
    """Return the bytes of every packet of a stream."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[index]
        return [bytes(p) for p in container.demux(stream) if p.size]


def samples(path: Path, index: int = 0) -> tuple[float, Any]:
    """Decode an audio stream: (time of the first sample in seconds, mono samples)."""
    parts, start = [], None
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
        for frame in container.decode(container.streams.audio[index]):
            if start is None:
                base = frame.time_base
                start = float(frame.pts * Fraction(base.numerator, base.denominator))
            frame.pts = None
            parts += [f.to_ndarray()[0] for f in resampler.resample(frame)]
    return start or 0.0, np.concatenate(parts)


def raw_video(codec: str, size: tuple[int, int], frames: int, **options: str) -> bytes:
    """Encode a pattern to a bare elementary stream, every frame a key frame."""
    buffer = io.BytesIO()
    muxer = {"libx264": "h264", "libx265": "hevc"}[codec]
    with av.open(buffer, "w", format=muxer) as out:
        clip = Clip(codec=codec, size=size, frames=frames, options={"g": "1", **options})
        stream = _video(out, clip, Fraction(1, 25))
        out.start_encoding()
        for packet in _encode_video(stream, clip, Fraction(1, 25)):
            out.mux(packet)
    return buffer.getvalue()


def remux(raw: bytes, path: Path, rate: int = 25, codec: str = "h264") -> Path:
    """Put an elementary stream of key frames into a container, at a constant rate."""
    with (
        av.open(io.BytesIO(raw), format=codec) as source,
        av.open(str(path), "w") as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        count = 0
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            packet.time_base = Fraction(1, 90000)
            packet.pts = packet.dts = 90000 * count // rate
            packet.duration = 90000 // rate
            packet.stream = stream
            out.mux(packet)
            count += 1
    return path


def with_captions(raw: bytes, texts: Sequence[bytes]) -> bytes:
    """Put CEA-708 captions (ATSC A/53 part 4) into an H.264 stream, one pair a picture."""
    result, count = b"", 0
    for unit in raw.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]:
        if unit[0] & 31 in (1, 5):
            pair = texts[count % len(texts)]
            body = b"\xb5\x00\x31GA94\x03\x41\xff" + b"\xfc" + pair + b"\xff"
            result += b"\0\0\0\1\x06\x04" + bytes([len(body)]) + body + b"\x80"
            count += 1
        result += b"\0\0\0\1" + unit
    return result


def captions(path: Path) -> list[bytes]:
    """Return the caption bytes of every picture that has some."""
    from av.sidedata.sidedata import Type

    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if Type.A53_CC in frame.side_data:
                found.append(bytes(frame.side_data[Type.A53_CC]))
    return found
