"""Everything of a file that is not the picture, copied beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import av.container
import av.error
import av.packet
import av.stream

from vidpipe.errors import OutputError
from vidpipe.media.containers import Container, copy_stream, takes_copy
from vidpipe.media.probe import MediaInfo, StreamInfo, fraction, open_input

KINDS = {
    "audio": "audio",
    "subtitle": "subtitles",
    "data": "data",
    "attachment": "attachments",
    "cover": "covers",
    "video": "video",
    "unknown": "data",
}
"""Kind of a stream -> the word that `drop` takes for it."""

TEXT_SUBTITLES = frozenset({"subrip", "ass", "ssa", "webvtt", "mov_text", "text"})

# QuickTime's own codes; of these languages it knows only the other ISO 639-2 code.
_MOV_LANGUAGES = {
    "deu": "ger",
    "nld": "dut",
    "ell": "gre",
    "isl": "ice",
    "zho": "chi",
    "sqi": "alb",
    "mkd": "mac",
    "cze": "ces",
    "slo": "slk",
}

_SEEK_MARGIN_S = 5

# Tags that describe the old file, not what is in it.
_STALE_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
_STALE_STREAM_TAGS = frozenset(
    {"encoder", "duration", "bps", "number_of_frames", "number_of_bytes"}
)


@dataclass(slots=True)
class Route:
    """What happens to one stream.

    Attributes:
        info: the stream.
        action: "copy", "transcode", "rewrite" (the muxer makes its own) or "drop".
        codec: the codec in the output.
        packets: packets written.
        begin_s, end_s: times of what was written, in seconds, or None.
        attach: (name, MIME type, content) of a cover that becomes an attachment.
        out: the stream in the output.
    """

    info: StreamInfo
    action: str
    codec: str
    packets: int = 0
    begin_s: float | None = None
    end_s: float | None = None
    attach: tuple[str, str, bytes] | None = field(default=None, repr=False)
    out: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "index": self.info.index,
            "kind": self.info.kind,
            "language": self.info.language,
            "action": self.action,
            "codec": self.codec,
            "packets": self.packets,
            "begin_s": self.begin_s,
            "end_s": self.end_s,
            "source_duration_s": self.info.duration_s,
        }


def stream_tags(tags: dict[str, str], container: Container) -> dict[str, str]:
    """Return the tags to write for a stream, named as the container names them."""
    result = {
        k: v
        for k, v in tags.items()
        if k.lower().split("-")[0] not in _STALE_STREAM_TAGS and not k.startswith("_STATISTICS")
    }
    if container.muxer in ("matroska", "webm"):
        for name in ("handler_name", "vendor_id"):  # boxes of MP4, not words of the author
            result.pop(name, None)
        if "name" in result and "title" not in result:
            result["title"] = result.pop("name")
    if container.muxer == "mov" and "language" in result:
        result["language"] = _MOV_LANGUAGES.get(result["language"], result["language"])
    return result


def dropped(info: StreamInfo, drop: set[str]) -> bool:
    """Say whether `drop` names a stream, by kind or by index."""
    return bool({KINDS.get(info.kind, "data"), info.kind, str(info.index)} & drop)


class Passthrough:
    """Copies the other streams of a source file, a little at a time.

    The file is opened a second time, so no packet waits in memory for a picture.

    Args:
        info: the source file.
        container: what is written.
        drop: kinds and stream indices to leave out.
        window: (start, end) in seconds of the source's time to keep; end may be None.
        jumps: gives the shifts, in seconds, that the picture's reader found necessary where
            the file's timestamps start again.

    Raises:
        OutputError: the container cannot hold a stream; the message names it.
    """

    def __init__(
        self,
        info: MediaInfo,
        container: Container,
        drop: set[str],
        window: tuple[Fraction, Fraction | None] | None = None,
        jumps: Callable[[], Sequence[Fraction]] = tuple,
    ) -> None:
        self.info = info
        self.container = container
        self.window = window
        self._stack = ExitStack()
        self._input: av.container.InputContainer | None = None
        self._packets: Iterator[av.packet.Packet[Any]] = iter(())
        self._held: av.packet.Packet[Any] | None = None
        self._offset = Fraction(0)
        self._jumps = jumps
        self._lines: dict[int, _Line] = {}
        with open_input(info.path) as source:
            self.routes = [
                self._route(source.streams[s.index], s, drop)
                for s in info.streams
                if s.index != info.video_index
            ]

    def _route(self, stream: av.stream.Stream, info: StreamInfo, drop: set[str]) -> Route:
        if dropped(info, drop):
            return Route(info, "drop", info.codec)
        if self._is_chapter_track(stream) or (
            info.kind == "data"
            and "timecode" in info.metadata
            and self.container.muxer in ("mp4", "mov", "matroska")
        ):  # Matroska keeps a time code as a tag of the picture, the others make a track of it
            return Route(info, "rewrite", info.codec)
        if info.kind == "cover" and self.container.muxer == "matroska":
            attach = _cover_file(stream, info)
            if attach is not None:
                return Route(info, "copy", info.codec, packets=1, attach=attach)
        elif info.kind == "cover" and self.container.muxer != "mp4":
            pass  # the other muxers would make it a second picture track, or drop it
        elif takes_copy(self.container, stream, info.codec):
            return Route(info, "copy", info.codec)
        target = self.container.subtitle
        if info.codec in TEXT_SUBTITLES and target is not None:
            return Route(info, "transcode", target)
        kind = KINDS.get(info.kind, "data")
        raise OutputError(
            f"{self.container.name} cannot hold {info}, codec {info.codec}",
            hint=f"Use --drop {info.index} or --drop {kind} to leave it out, or write to .mkv",
        )

    def _is_chapter_track(self, stream: av.stream.Stream) -> bool:
        """Say whether a data stream is the chapters once more, as in QuickTime files.

        FFmpeg reads them as chapters and marks the track as not to be read.
        """
        discarded = stream.discard == av.stream.Discard.all
        return stream.type == "data" and discarded and bool(self.info.chapters)

    def metadata(self) -> dict[str, str]:
        """Return the global tags to write."""
        return {k: v for k, v in self.info.metadata.items() if k.lower() not in _STALE_TAGS}

    def video_metadata(self) -> dict[str, str]:
        """Return the tags of the picture's stream to write."""
        tags = stream_tags(self.info.video_stream.metadata, self.container)
        tags.pop("alpha_mode", None)
        for route in self.routes:
            if route.action == "rewrite" and "timecode" in route.info.metadata:
                tags.setdefault("timecode", route.info.metadata["timecode"])
        return tags

    def open(self) -> None:
        """Open the source file.

        Raises:
            MediaError: it cannot be read any more.
        """
        self._input = self._stack.enter_context(open_input(self.info.path))
        kept = []
        for route in self.routes:
            if (
                route.action in ("copy", "transcode")
                and route.info.kind != "attachment"
                and route.attach is None
            ):
                kept.append(self._input.streams[route.info.index])
        wanted = {s.index for s in kept}
        for stream in self._input.streams:
            if stream.index not in wanted:
                stream.discard = av.stream.Discard.all
        if self.window is not None and self.window[0] > 0 and kept:
            with suppress(av.error.FFmpegError):
                # Streams lie apart in a file, and a subtitle may begin before the excerpt.
                early = self.window[0] - _SEEK_MARGIN_S
                self._input.seek(max(int(early * av.time_base), 0))
        self._packets = self._input.demux(kept) if kept else iter(())
        self._lines = {s.index: _Line() for s in kept}

    def add_streams(self, out: av.container.OutputContainer, index: int) -> None:
        """Add to the output the streams that come before or after the picture's.

        Args:
            out: the output.
            index: add the stream with this index of the source.
        """
        assert self._input is not None
        for route in self.routes:
            if route.info.index != index or route.action not in ("copy", "transcode"):
                continue
            stream = self._input.streams[index]
            if route.attach is not None:
                route.out = out.add_attachment(*route.attach)
            elif route.action == "copy":
                route.out = copy_stream(out, stream)
                route.out.metadata.clear()
                route.out.metadata.update(stream_tags(route.info.metadata, self.container))
            else:
                route.out = _add_subtitle(out, stream, route.codec)
                route.out.metadata.update(stream_tags(route.info.metadata, self.container))

    def chapters(self, offset: Fraction, end: Fraction | None) -> list[Any]:
        """Return the chapters to write, moved by `offset` seconds and cut to the excerpt."""
        assert self._input is not None
        result = []
        for chapter in self._input.chapters():
            base = fraction(chapter["time_base"]) or Fraction(1)
            start, stop = chapter["start"] * base, chapter["end"] * base
            if self.window is not None and (stop <= offset or (end is not None and start >= end)):
                continue
            start = max(start - offset, Fraction(0)) if self.window else start
            stop = (min(stop, end) if end is not None else stop) - offset
            result.append(
                {
                    **chapter,
                    "start": round(start / base),
                    "end": round(stop / base),
                    "time_base": base,
                }
            )
        return result

    def start(self, offset: Fraction) -> None:
        """Set what is taken off every timestamp, in seconds."""
        self._offset = offset

    def pump(self, until: Fraction | None) -> Iterator[av.packet.Packet[Any]]:
        """Yield the packets to write that begin before `until`.

        Args:
            until: seconds of the source's time; None for all that is left.
        """
        while True:
            packet = self._held
            self._held = None
            if packet is None:
                packet = self._next()
                if packet is None:
                    return
                self._lines[packet.stream.index].straighten(packet, self._jumps())
            time = _time(packet)
            if until is not None and time is not None and time > until:
                self._held = packet
                return
            yield from self._prepare(packet, time)

    def _next(self) -> av.packet.Packet[Any] | None:
        while True:
            try:
                packet = next(self._packets, None)
            except av.error.FFmpegError:
                return None  # the picture's reader meets the same damage and reports it
            if packet is None or packet.dts is not None or packet.size:
                return packet

    def _prepare(
        self, packet: av.packet.Packet[Any], time: Fraction | None
    ) -> Iterator[av.packet.Packet[Any]]:
        route = next(r for r in self.routes if r.info.index == packet.stream.index)
        base = fraction(packet.time_base) or Fraction(1, 1000)
        if time is not None and self.window is not None and route.info.kind != "cover":
            start, end = self._offset, self.window[1]
            if end is not None and time >= end:
                return
            if time < start and not self._clip_subtitle(packet, route, base, start):
                return
        shift = round(self._offset / base)
        if packet.pts is not None:
            packet.pts -= shift
        if packet.dts is not None:
            packet.dts -= shift
        if route.action == "transcode":
            yield from _transcode(packet, route)
        else:
            packet.stream = route.out
            self._note(route, packet, base)
            yield packet

    def _clip_subtitle(
        self, packet: av.packet.Packet[Any], route: Route, base: Fraction, start: Fraction
    ) -> bool:
        """Shorten a subtitle that is shown when the excerpt starts; say whether to keep it."""
        if route.info.kind != "subtitle" or packet.pts is None or not packet.duration:
            return False
        end = packet.pts + packet.duration
        first = round(start / base)
        if end <= first:
            return False
        packet.pts = packet.dts = first
        packet.duration = end - first
        return True

    @staticmethod
    def _note(route: Route, packet: av.packet.Packet[Any], base: Fraction) -> None:
        route.packets += 1
        if packet.pts is None:
            return
        begin, end = packet.pts * base, (packet.pts + (packet.duration or 0)) * base
        route.begin_s = min(float(begin), route.begin_s if route.begin_s is not None else 1e18)
        route.end_s = max(float(end), route.end_s if route.end_s is not None else -1e18)

    def close(self) -> None:
        """Close the source file."""
        self._packets = iter(())
        self._held = None
        self._stack.close()
        self._input = None


_COVERS = {
    "mjpeg": ("cover.jpg", "image/jpeg"),
    "png": ("cover.png", "image/png"),
    "bmp": ("cover.bmp", "image/bmp"),
    "gif": ("cover.gif", "image/gif"),
    "webp": ("cover.webp", "image/webp"),
}


def _cover_file(stream: av.stream.Stream, info: StreamInfo) -> tuple[str, str, bytes] | None:
    """Return (name, MIME type, content) of an attached picture, or None."""
    if info.codec not in _COVERS:
        return None
    source: Any = stream.container
    content = next((bytes(p) for p in source.demux(stream) if p.size), None)
    if content is None:
        return None
    name, mime = _COVERS[info.codec]
    return info.metadata.get("filename", name), info.metadata.get("mimetype", mime), content


class _Line:
    """Keeps the timestamps of one stream rising, as muxers demand."""

    def __init__(self) -> None:
        self._shift = 0
        self._jumps = 0
        self._last: int | None = None
        self._end = 0

    def straighten(self, packet: av.packet.Packet[Any], jumps: Sequence[Fraction]) -> None:
        """Change a packet's timestamps where they are missing or do not rise."""
        base = fraction(packet.time_base) or Fraction(1, 1000)
        dts = packet.dts if packet.dts is not None else packet.pts
        if dts is None:
            packet.pts = packet.dts = dts = self._end
        else:
            if self._last is not None and (self._last - dts - self._shift) * base > 1:
                # The same shift as the picture's, to stay in sync with it.
                known = jumps[self._jumps] if self._jumps < len(jumps) else None
                self._jumps += 1
                self._shift = self._end - dts if known is None else round(known / base)
            dts += self._shift
            late = 0 if self._last is None else max(0, self._last + 1 - dts)
            dts += late
            packet.pts = dts if packet.pts is None else packet.pts + self._shift + late
            packet.dts = dts
        self._last = dts
        self._end = dts + max(packet.duration or 0, 1)


def _time(packet: av.packet.Packet[Any]) -> Fraction | None:
    """Return when a packet is needed, in seconds."""
    base = fraction(packet.time_base)
    ticks = packet.dts if packet.dts is not None else packet.pts
    return None if ticks is None or base is None else ticks * base


def _add_subtitle(out: av.container.OutputContainer, stream: av.stream.Stream, codec: str) -> Any:
    result: Any = out.add_stream(codec)
    result.disposition = stream.disposition
    result.time_base = Fraction(1, 1000)
    context: Any = stream.codec_context
    if not context.is_open:
        context.open()
    # Plain text takes the words, not the size and font of the old container's default style.
    header = context.subtitle_header if codec == "mov_text" else None
    result.codec_context.subtitle_header = header or _ASS_HEADER
    return result


_ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+
PlayResX: 384
PlayResY: 288

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, \
Bold, Italic, Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, \
Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def _transcode(packet: av.packet.Packet[Any], route: Route) -> Iterator[av.packet.Packet[Any]]:
    """Turn one text subtitle into another codec."""
    subtitle = packet.stream.codec_context.decode2(packet)
    if subtitle is None or not len(subtitle):
        return
    encoded = route.out.codec_context.encode_subtitle(subtitle)
    encoded.time_base = packet.time_base
    encoded.pts = encoded.dts = packet.pts
    encoded.duration = packet.duration
    encoded.stream = route.out
    base = fraction(packet.time_base) or Fraction(1, 1000)
    Passthrough._note(route, encoded, base)
    yield encoded
