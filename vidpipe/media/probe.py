"""What is in a media file, found without changing anything."""

from __future__ import annotations

import errno
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import av.stream
import av.video.stream
from av.sidedata.sidedata import Type as SideDataType

from vidpipe.errors import MediaError
from vidpipe.frame import ChromaSite, Color, Range

SIDE_DATA_KINDS = {
    "A53_CC": "captions",
    "DYNAMIC_HDR_PLUS": "dynamic-hdr",
    "DOVI_METADATA": "dynamic-hdr",
    "DOVI_RPU_BUFFER": "dynamic-hdr",
    "DYNAMIC_HDR_VIVID": "dynamic-hdr",
    "SPHERICAL": "side-data",
    "STEREO3D": "side-data",
    "ICC_PROFILE": "side-data",
    "AMBIENT_VIEWING_ENVIRONMENT": "side-data",
}
"""Side data of frames that somebody would miss, and the word that `drop` takes for it."""


@dataclass(frozen=True, slots=True)
class MasteringDisplay:
    """SMPTE ST 2086 metadata.

    Attributes:
        primaries: CIE 1931 (x, y) of red, green and blue.
        white: (x, y) of the white point.
        luminance: (lowest, highest) in cd/m2.
    """

    primaries: tuple[tuple[Fraction, Fraction], ...]
    white: tuple[Fraction, Fraction]
    luminance: tuple[Fraction, Fraction]


@dataclass(frozen=True, slots=True)
class ContentLight:
    """CTA-861.3 content light level, both in cd/m2."""

    max_cll: int
    max_fall: int


@dataclass(frozen=True, slots=True)
class Chapter:
    """A chapter; times in seconds."""

    start_s: float
    end_s: float
    title: str


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The picture of a video stream.

    Attributes:
        width, height: pixels of a decoded frame, before any rotation.
        pixel_format: FFmpeg's name for the decoder's own format.
        rate: mean frames per second, or None where it is not known.
        rate_mode: "constant", "variable" or "unknown", from what the file declares.
        sample_aspect_ratio: width over height of a sample; 1 where none is given.
        rotation: degrees counter-clockwise that a player turns the picture by.
        display_matrix: the nine integers behind `rotation`, or None.
        color: colour tags.
        interlaced: the first frame is interlaced, or the stream says so.
        mastering_display, content_light: HDR metadata, or None.
        side_data: FFmpeg's names of the first frame's side data.
    """

    width: int
    height: int
    pixel_format: str
    rate: Fraction | None
    rate_mode: str
    sample_aspect_ratio: Fraction
    rotation: int
    display_matrix: tuple[int, ...] | None
    color: Color
    interlaced: bool
    mastering_display: MasteringDisplay | None
    content_light: ContentLight | None
    side_data: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One stream of a file.

    Attributes:
        index: position in the file.
        kind: video, audio, subtitle, data, attachment or cover (an attached picture).
        codec: FFmpeg's name, "unknown" where there is none.
        language: ISO 639-2 code as tagged, or None.
        disposition: names such as "default" or "forced".
        time_base: seconds per tick.
        start_s, duration_s: seconds, or None where the file does not say.
        frames: number of frames that the file declares; 0 where it does not say.
        metadata: tags of the stream.
        details: facts of the kind, such as sample rate and channels.
    """

    index: int
    kind: str
    codec: str
    language: str | None
    disposition: tuple[str, ...]
    time_base: Fraction
    start_s: float | None
    duration_s: float | None
    frames: int
    metadata: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        language = f" ({self.language})" if self.language else ""
        return f"{self.kind} stream {self.index}{language}"


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What is in a file.

    Attributes:
        path: the file.
        container: FFmpeg's name of the format.
        size: bytes.
        start_s, duration_s: seconds, or None where the file does not say.
        streams: all of them, attachments and cover pictures included.
        video_index: index of the stream that would be enhanced.
        video: the picture of that stream.
        chapters, metadata: of the file as a whole.
    """

    path: Path
    container: str
    size: int
    start_s: float | None
    duration_s: float | None
    streams: tuple[StreamInfo, ...]
    video_index: int
    video: VideoInfo
    chapters: tuple[Chapter, ...]
    metadata: dict[str, str]

    @property
    def video_stream(self) -> StreamInfo:
        """The stream that would be enhanced."""
        return self.streams[self.video_index]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-compatible copy; fractions become strings such as "30000/1001"."""
        result: dict[str, Any] = _plain(asdict(self))
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (Fraction, Path)):
        return str(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def fraction(value: Any) -> Fraction | None:
    """Turn one of PyAV's rationals into a Fraction; None for "unknown" (0/1 or 0/0)."""
    if value is None or not value.denominator or not value.numerator:
        return None
    return Fraction(int(value.numerator), int(value.denominator))


def probe(path: str | os.PathLike[str], stream: int | None = None) -> MediaInfo:
    """Read the headers and the first frame of a file.

    Args:
        path: a media file.
        stream: index of the video stream to describe; by default the best one.

    Raises:
        MediaError: the file cannot be read as video; the message says why.
    """
    info, _ = probe_first_frame(path, stream)
    return info


def probe_first_frame(
    path: str | os.PathLike[str], stream: int | None = None
) -> tuple[MediaInfo, av.VideoFrame]:
    """Like `probe`, but return the first decoded frame as well."""
    path = Path(path)
    with open_input(path) as container:
        video = pick_video(container, path, stream)
        for other in container.streams:
            if other.index != video.index:
                other.discard = av.stream.Discard.all
        first = _first_frame(container, video, path)
        streams = tuple(_stream_info(s) for s in container.streams)
        start, duration = container.start_time, container.duration
        info = MediaInfo(
            path=path,
            container=container.format.name,
            size=path.stat().st_size,
            start_s=None if start is None else start / av.time_base,
            duration_s=None if duration is None else duration / av.time_base,
            streams=streams,
            video_index=video.index,
            video=_video_info(video, first),
            chapters=tuple(_chapter(c) for c in container.chapters()),
            metadata=dict(container.metadata),
        )
    return info, first


@contextmanager
def open_input(path: Path, hwaccel: Any = None) -> Iterator[av.container.InputContainer]:
    """Open a file for reading.

    Args:
        path: the file.
        hwaccel: PyAV's `HWAccel` for its decoders, or None.

    Raises:
        MediaError: it is not there, not readable or not media.
    """
    container = _open_checked(path, hwaccel)
    try:
        yield container
    finally:
        container.close()


def _open_checked(path: Path, hwaccel: Any = None) -> av.container.InputContainer:
    try:
        if path.is_dir():
            raise MediaError(f"'{path}' is a directory, expected a video file")
        with path.open("rb") as file:
            if not file.read(1):
                raise MediaError(f"'{path}' is empty, expected a video file")
    except FileNotFoundError:
        raise MediaError(f"'{path}' does not exist", hint="Check the path") from None
    except PermissionError:
        raise MediaError(
            f"'{path}' cannot be read: permission denied", hint="Check who may read the file"
        ) from None
    except OSError as error:
        raise MediaError(f"'{path}' cannot be read: {error.strerror or error}") from error
    try:
        # The prefix keeps names such as "a:b.mp4" from being taken as a protocol.
        return av.open(f"file:{path}", hwaccel=hwaccel)
    except av.error.InvalidDataError:
        hint = "Expected a video file that FFmpeg can read"
        if _index_is_cut_off(path):
            hint = _CUT_OFF
        raise MediaError(f"'{path}' is not a readable media file", hint=hint) from None
    except av.error.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise MediaError(f"'{path}' cannot be opened: {error.strerror}") from error


_CUT_OFF = "Its index (moov) is missing: the recording or download is not complete"


def _index_is_cut_off(path: Path) -> bool:
    """Say whether an MP4 or MOV file ends before its index does."""
    found: set[bytes] = set()
    with suppress(OSError, struct.error), path.open("rb") as file:
        end = path.stat().st_size
        while file.tell() + 8 <= end and len(found) < 64:
            at = file.tell()
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:
                (size,) = struct.unpack(">Q", file.read(8))
            if size < 8:
                break
            if at + size <= end or kind != b"moov":
                found.add(kind)
            file.seek(at + size)
    return b"ftyp" in found and b"moov" not in found


def is_cover(stream: av.stream.Stream) -> bool:
    """Say whether a stream is an attached picture, such as the cover of an album."""
    return stream.type == "video" and bool(stream.disposition & av.stream.Disposition.attached_pic)


def pick_video(
    container: av.container.InputContainer, path: Path, index: int | None = None
) -> av.video.stream.VideoStream:
    """Return the video stream to enhance.

    Raises:
        MediaError: there is none, or no decoder for it.
    """
    videos = [s for s in container.streams.video if not is_cover(s)]
    if index is not None:
        chosen = [s for s in videos if s.index == index]
        if not chosen:
            known = ", ".join(str(s.index) for s in videos) or "none"
            raise MediaError(
                f"stream {index} of '{path}' is not a video stream",
                hint=f"Video streams of the file: {known}",
            )
        video = chosen[0]
    elif videos:
        best = container.streams.best("video")
        video = next((s for s in videos if best is not None and s.index == best.index), videos[0])
    else:
        kinds = sorted({_kind(s) for s in container.streams})
        what = " and ".join(kinds) if kinds else "no streams at all"
        raise MediaError(
            f"'{path}' has no video stream, only {what}" if kinds else f"'{path}' has {what}",
            hint="Expected a file with moving pictures",
        )
    context: Any = video.codec_context
    if context is None:
        raise MediaError(
            f"no decoder for stream {video.index} of '{path}': this FFmpeg does not know its codec",
            hint="Convert the file with a tool that knows it, for example to H.264",
        )
    return video


def seek(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, start: Fraction
) -> None:
    """Go to a key frame at or before `start` seconds.

    Formats without an index land anywhere, so it is looked whether a key frame that is
    early enough follows; if not, further back, at last from the beginning.
    """
    base = fraction(stream.time_base) or Fraction(1, 1000)
    for back_s in (0, 2, 10, 60):
        try:
            container.seek(int((start - back_s) / base), stream=stream)
            key = next((p for p in container.demux(stream) if p.is_keyframe), None)
            time = key.pts if key is not None else None
            if time is not None and time * base <= start:
                container.seek(int((start - back_s) / base), stream=stream)
                return
        except av.error.FFmpegError:
            break
    try:
        container.seek(0)
    except av.error.FFmpegError as error:
        raise MediaError(
            f"'{container.name}' cannot be searched for a start time", hint="Leave --start out"
        ) from error


def _first_frame(
    container: av.container.InputContainer, video: av.video.stream.VideoStream, path: Path
) -> av.VideoFrame:
    video.thread_type = "SLICE"  # frame threads would read far ahead for one frame
    for packet in container.demux(video):
        with suppress(av.error.FFmpegError):
            for frame in packet.decode():
                return frame
    raise MediaError(
        f"no frame of '{path}' can be decoded ({video.codec_context.name}, stream {video.index})",
        hint=_CUT_OFF if _index_is_cut_off(path) else "The file is damaged or ends too early",
    )


def _kind(stream: av.stream.Stream) -> str:
    return "cover" if is_cover(stream) else str(stream.type)


def _stream_info(stream: av.stream.Stream) -> StreamInfo:
    time_base = fraction(stream.time_base) or Fraction(1, 1)
    context: Any = stream.codec_context
    details: dict[str, Any] = {}
    if stream.type == "audio" and context is not None:
        details = {
            "sample_rate": context.sample_rate,
            "channels": context.channels,
            "layout": context.layout.name,
        }
    elif stream.type == "video" and context is not None:
        details = {"width": context.width, "height": context.height}
    elif stream.type == "attachment":
        details = {"name": stream.metadata.get("filename"), "bytes": _size(stream)}
    return StreamInfo(
        index=stream.index,
        kind=_kind(stream),
        codec=codec_name(stream),
        language=stream.metadata.get("language"),
        disposition=tuple(d.name or "" for d in av.stream.Disposition if d & stream.disposition),
        time_base=time_base,
        start_s=None if stream.start_time is None else float(stream.start_time * time_base),
        duration_s=None if not stream.duration else float(stream.duration * time_base),
        frames=stream.frames,
        metadata=dict(stream.metadata),
        details=details,
    )


def _size(attachment: Any) -> int:
    return len(attachment.data)


def codec_name(stream: av.stream.Stream) -> str:
    """Return FFmpeg's name for the codec of a stream, "unknown" where it has none."""
    context: Any = stream.codec_context  # None where there is no decoder
    if context is not None:
        return str(context.codec.canonical_name)
    if stream.type == "data":
        return str(stream.name or "unknown")
    return "unknown"


def _chapter(chapter: Any) -> Chapter:
    base = fraction(chapter["time_base"]) or Fraction(1)
    return Chapter(
        float(chapter["start"] * base),
        float(chapter["end"] * base),
        chapter["metadata"].get("title", ""),
    )


def _video_info(stream: av.video.stream.VideoStream, first: av.VideoFrame) -> VideoInfo:
    # PyAV 18 iterates over the entries, later ones over their types.
    entries: Any = first.side_data
    names = tuple(getattr(t, "type", t).name for t in entries)
    matrix = side_data(first, "DISPLAYMATRIX")
    mastering = side_data(first, "MASTERING_DISPLAY_METADATA")
    light = side_data(first, "CONTENT_LIGHT_LEVEL")
    rate, mode = _rate(stream)
    return VideoInfo(
        width=first.width,
        height=first.height,
        pixel_format=first.format.name,
        rate=rate,
        rate_mode=mode,
        sample_aspect_ratio=fraction(stream.sample_aspect_ratio) or Fraction(1),
        rotation=first.rotation,
        display_matrix=struct.unpack("=9i", matrix[:36]) if matrix else None,
        color=color_of(first, stream),
        interlaced=bool(first.interlaced_frame) or stream.codec_context.field_order > 1,
        mastering_display=_mastering(mastering) if mastering else None,
        content_light=ContentLight(*struct.unpack("=II", light[:8])) if light else None,
        side_data=names,
    )


def side_data(frame: av.VideoFrame, name: str) -> bytes | None:
    """Return the bytes of a frame's side data of that type, or None."""
    kind = SideDataType[name]
    return bytes(frame.side_data[kind]) if kind in frame.side_data else None


def _mastering(data: bytes) -> MasteringDisplay | None:
    """Read FFmpeg's AVMasteringDisplayMetadata: 10 rationals and two flags, native ints."""
    numbers = struct.unpack("=22i", data[:88])
    has_primaries, has_luminance = numbers[20:]
    if not has_primaries or not has_luminance:
        return None
    values = [Fraction(n, d or 1) for n, d in zip(numbers[0:20:2], numbers[1:20:2], strict=True)]
    return MasteringDisplay(
        primaries=((values[0], values[1]), (values[2], values[3]), (values[4], values[5])),
        white=(values[6], values[7]),
        luminance=(values[8], values[9]),
    )


def _rate(stream: av.video.stream.VideoStream) -> tuple[Fraction | None, str]:
    average, base = fraction(stream.average_rate), fraction(stream.base_rate)
    if average is None:
        return base, "unknown"
    if base is None:
        return average, "unknown"
    # The base rate is the smallest in which all timestamps fit; of a constant rate it is
    # the rate itself, or twice that where fields are counted. Containers round both.
    for candidate in (base, base / 2):
        usual = _usual_rate(candidate)
        if usual is not None and abs(average / usual - 1) < Fraction(1, 500):
            return usual, "constant"
    return average, "variable"


def _usual_rate(rate: Fraction) -> Fraction | None:
    """Return the rate that is meant: halves of frames a second, or those over 1.001."""
    for scale in (Fraction(1), Fraction(1000, 1001)):
        near = Fraction(round(2 * rate / scale), 2) * scale
        if near and abs(rate / near - 1) < Fraction(1, 5000):
            return near
    return None


def color_of(frame: av.VideoFrame, stream: av.video.stream.VideoStream | None) -> Color:
    """Return the colour tags of a decoded frame.

    The stream, where given, helps a PyAV that does not tell a frame's chroma site.
    """
    full = frame.format.name.startswith("yuvj")
    return Color(
        matrix=int(frame.colorspace),
        transfer=int(frame.color_trc),
        primaries=int(frame.color_primaries),
        range=Range.FULL if full else int(frame.color_range),
        site=chroma_site(frame, stream),
    )


def chroma_site(frame: av.VideoFrame, stream: av.video.stream.VideoStream | None) -> int:
    """Return where the chroma samples of a frame sit, a `ChromaSite`."""
    if hasattr(frame, "chroma_location"):
        return int(frame.chroma_location)
    if stream is None:
        return ChromaSite.UNSPECIFIED
    return _chroma_site_by_header(stream)


def _chroma_site_by_header(stream: av.video.stream.VideoStream) -> int:
    """Find the chroma site with a PyAV that does not tell it.

    A Matroska header states the site, so one is written for the stream, without frames,
    and read back (elements ChromaSitingHorz 0x55B7 and ChromaSitingVert 0x55B8).
    """
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="matroska") as out:
            out.add_stream_from_template(stream, opaque=True)
            out.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return ChromaSite.UNSPECIFIED
    header = buffer.getvalue()
    found = []
    for element in (b"\x55\xb7\x81", b"\x55\xb8\x81"):
        at = header.find(element)
        if at < 0:
            return ChromaSite.UNSPECIFIED
        found.append(header[at + 3] - 1)
    sites = {
        (0, 1): ChromaSite.LEFT,
        (1, 1): ChromaSite.CENTER,
        (0, 0): ChromaSite.TOPLEFT,
        (1, 0): ChromaSite.TOP,
        (0, 2): ChromaSite.BOTTOMLEFT,
        (1, 2): ChromaSite.BOTTOM,
    }
    return sites.get((found[0], found[1]), ChromaSite.UNSPECIFIED)
