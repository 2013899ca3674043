"""What output containers can hold, where FFmpeg's muxers do not say it themselves."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.error
import av.stream

from vidpipe.errors import OutputError


@dataclass(frozen=True, slots=True)
class Container:
    """A file format to write.

    Attributes:
        name: as users know it.
        muxer: FFmpeg's name.
        codec: the friendly name of the default video codec.
        rotation: a display matrix survives.
        chapters: chapters survive.
        subtitle: codec that text subtitles are turned into where theirs is not taken.
        codecs: the codecs that are taken, where the muxer takes all without a word.
        hdr: static HDR metadata can be put into the header.
        aspect: the muxer needs help to write a sample aspect ratio.
        options: of the muxer.
    """

    name: str
    muxer: str
    codec: str = "h264"
    rotation: bool = True
    chapters: bool = True
    subtitle: str | None = None
    codecs: frozenset[str] | None = None
    hdr: bool = False
    aspect: bool = False
    options: tuple[tuple[str, str], ...] = ()


_TS_CODECS = frozenset(
    {
        *("h264", "hevc", "vvc", "av1", "mpeg1video", "mpeg2video", "mpeg4", "dirac", "cavs"),
        *("vc1", "jpeg2000", "aac", "aac_latm", "mp1", "mp2", "mp3", "ac3", "eac3", "ac4"),
        *("dts", "truehd", "opus", "s302m", "pcm_bluray", "dvb_subtitle", "dvb_teletext"),
        *("hdmv_pgs_subtitle", "arib_caption", "klv", "timed_id3", "scte_35"),
    }
)

# A first audio packet before zero, the decoder's warm-up, is stored as it is. Shifting all
# streams to make it zero, FFmpeg's default, would change every timestamp of the file.
_KEEP_TIMES = (("avoid_negative_ts", "disabled"),)

CONTAINERS = {
    ".mp4": Container("MP4", "mp4", subtitle="mov_text", hdr=True),
    ".m4v": Container("MP4", "mp4", subtitle="mov_text", hdr=True),
    ".mov": Container("QuickTime", "mov", subtitle="mov_text", hdr=True),
    ".mkv": Container(
        "Matroska", "matroska", subtitle="subrip", hdr=True, aspect=True, options=_KEEP_TIMES
    ),
    ".webm": Container(
        "WebM", "webm", codec="vp9", subtitle="webvtt", hdr=True, aspect=True, options=_KEEP_TIMES
    ),
    ".ts": Container(
        "MPEG-TS",
        "mpegts",
        rotation=False,
        chapters=False,
        codecs=_TS_CODECS,
        options=(("mpegts_copyts", "1"),),
    ),
}


def container_for(path: Path) -> Container:
    """Return the container that a file name asks for.

    Raises:
        OutputError: its suffix is not one that can be written.
    """
    try:
        return CONTAINERS[path.suffix.lower()]
    except KeyError:
        what = f"suffix '{path.suffix}'" if path.suffix else "no suffix"
        raise OutputError(
            f"'{path.name}' has {what}, so its container is not known",
            hint="Supported: " + " ".join(sorted(CONTAINERS)),
        ) from None


def takes_copy(container: Container, stream: av.stream.Stream, codec: str) -> bool:
    """Say whether a stream can be copied as it is, by writing a header with only it."""
    if container.codecs is not None and codec not in container.codecs:
        return False
    out = av.open(io.BytesIO(), "w", format=container.muxer)
    try:
        copy_stream(out, stream)
        out.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    finally:
        with suppress(av.error.FFmpegError):
            out.close()
    return True


def copy_stream(out: av.container.OutputContainer, stream: av.stream.Stream) -> av.stream.Stream:
    """Add a stream like `stream`, with its tags, to an output.

    Raises:
        ValueError: the container does not take its codec.
    """
    copy = out.add_stream_from_template(stream, opaque=True)
    copy.metadata.update(stream.metadata)
    copy.disposition = stream.disposition
    return copy
