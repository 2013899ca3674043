"""One output file while it is being written."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import av.packet
import av.stream

from vidpipe.device import CPU
from vidpipe.errors import OutputError
from vidpipe.frame import PIXEL_FORMATS, Frame, FrameSpec
from vidpipe.media import nvenc
from vidpipe.media.containers import Container
from vidpipe.media.convert import Converter, fill, frame_from, planes_of
from vidpipe.media.decode import Decode
from vidpipe.media.encoders import Encoder, check_size, encoded_color, to_yuv
from vidpipe.media.hdr import hdr_options
from vidpipe.media.headers import PADDING, patch_matroska, patch_mp4
from vidpipe.media.passthrough import Passthrough
from vidpipe.media.probe import ContentLight, MasteringDisplay, MediaInfo

_FRAME_DURATION = 1 << 8  # AV_CODEC_FLAG_FRAME_DURATION: the durations of frames are right

# What iTunes knows. Other keys make the muxer write all of them as QuickTime's free-form
# metadata, which keeps them but is read by fewer players.
_MP4_TAGS = frozenset(
    {
        *("title", "artist", "album_artist", "composer", "album", "date", "comment", "genre"),
        *("copyright", "description", "synopsis", "lyrics", "grouping", "show", "episode_id"),
        *("network", "keywords", "track", "disc", "compilation", "gapless_playback"),
        *("hd_video", "media_type", "season_number", "episode_sort", "creation_time"),
        *("timecode", "language", "location", "location-eng"),
    }
)


class Writer:
    """Encodes frames into one file, and copies the source's other streams beside them.

    Args:
        file: where to write: a path, or memory for a rehearsal.
        path: the name that messages use.
        container, encoder, options, pix_fmt: what to write.
        spec: the frames to come; others are converted to it. Frames on a GPU go to the
            encoder from there, in the layout that `pix_fmt` names.
        source: where the frames come from, or None.
        passthrough: the source's other streams, or None.
        drop: what to leave out.
        threads: of the encoder.

    Raises:
        SpecError, OutputError: such frames cannot be written so.
    """

    def __init__(
        self,
        file: Path | io.BytesIO,
        *,
        path: Path,
        container: Container,
        encoder: Encoder,
        options: dict[str, str],
        pix_fmt: str,
        spec: FrameSpec,
        source: Decode | None,
        passthrough: Passthrough | None,
        drop: set[str],
        threads: int,
    ) -> None:
        check_size(encoder, spec, pix_fmt)
        self._file = file
        self._path = path
        self._container = container
        self._encoder = encoder
        self._spec = spec
        self._pix_fmt = pix_fmt
        self._color = encoded_color(spec, pix_fmt)
        self._source = source
        self._passthrough = passthrough
        self._drop = drop
        self._threads = threads
        self._info: MediaInfo | None = source.info if source is not None else None
        self._mastering: MasteringDisplay | None = None
        self._light: ContentLight | None = None
        if self._info is not None and "hdr" not in drop:
            self._mastering = self._info.video.mastering_display
            self._light = self._info.video.content_light
        self._options = hdr_options(encoder.name, options, self._mastering, self._light)
        self._offset = Fraction(0)  # seconds taken off every timestamp
        self._shift = 0  # the same in ticks of the picture
        self._frames = self._resized = self._packets = 0
        self._first_pts: int | None = None
        self._last_pts = self._end_pts = 0
        self._title: str | None = None
        self._chapters = 0
        self._times: dict[int, tuple[int, int]] = {}
        self._converters: dict[FrameSpec, Converter] = {}
        self._video: Any = None
        self._feeder: nvenc.Feeder | None = None
        if spec.device != CPU:
            self._feeder = self._new_feeder(nvenc.held(options))
        self._held: dict[int, Any] = {}  # what the encoder still reads, by timestamp
        self._early: list[av.packet.Packet[Any]] | None = None
        self._out = self._open()

    def _new_feeder(self, depth: int) -> nvenc.Feeder:
        return nvenc.Feeder(self._spec, self._pix_fmt, depth)

    @property
    def _patches_matroska(self) -> bool:
        if not self._container.aspect:
            return False
        hdr = self._mastering is not None or self._light is not None
        return hdr or self._aspect() != 1

    def _aspect(self) -> Fraction:
        return self._info.video.sample_aspect_ratio if self._info is not None else Fraction(1)

    def _open(self) -> av.container.OutputContainer:
        options = dict(self._container.options)
        if self._container.muxer in ("mp4", "mov") and self._info is not None:
            passing = self._passthrough
            tags = passing.metadata() if passing is not None else {}
            covers = passing is not None and any(
                r.info.kind == "cover" and r.action == "copy" for r in passing.routes
            )
            # Free-form metadata has no place for covers; a picture counts more than a word.
            if not covers and not _MP4_TAGS.issuperset(k.lower() for k in tags):
                options["movflags"] = "use_metadata_tags"
        target: Any = self._file if isinstance(self._file, io.BytesIO) else f"file:{self._file}"
        return av.open(target, "w", format=self._container.muxer, container_options=options)

    def start(self, first: Frame | None) -> None:
        """Add all streams and write the header.

        Args:
            first: the first frame to come, or None in a rehearsal.

        Raises:
            OutputError: the encoder or the container refuses something.
        """
        passing = self._passthrough
        try:
            if passing is None:
                self._video = self._add_video()
            else:
                passing.open()
                if passing.window is not None and first is not None:
                    self._shift = first.pts
                    self._offset = first.pts * self._spec.time_base
                passing.start(self._offset)
                for info in passing.info.streams:
                    if info.index == passing.info.video_index:
                        self._video = self._add_video()
                    else:
                        passing.add_streams(self._out, info.index)
                self._describe(passing)
            if self._patches_matroska:
                self._title = self._video.metadata.get("title")
                self._video.metadata["title"] = PADDING
            if self._feeder is not None:
                self._open_on_gpu(first, self._feeder)
            self._out.start_encoding()
        except (av.error.FFmpegError, OSError) as error:
            raise output_error(self._path, error) from error

    def _open_on_gpu(self, first: Frame | None, feeder: nvenc.Feeder) -> None:
        """Open the encoder; it takes the GPU's context from the first picture."""
        if first is None:
            picture = feeder.blank()
            picture.pts = 0
            picture.time_base = self._spec.time_base
        else:
            picture = self._timed(first)
        try:
            self._early = self._video.encode(picture)
        except nvenc.ENCODE_ERRORS as error:
            raise self._not_started(error) from error

    def _describe(self, passing: Passthrough) -> None:
        if "metadata" not in self._drop:
            self._out.metadata.update(passing.metadata())
            self._video.metadata.update(passing.video_metadata())
        if "chapters" not in self._drop:
            end = passing.window[1] if passing.window else None
            chapters = passing.chapters(self._offset, end)
            if chapters:
                self._out.set_chapters(chapters)
            self._chapters = len(chapters)

    def _add_video(self) -> Any:
        spec = self._spec
        rate = spec.rate or (self._info.video.rate if self._info is not None else None)
        rate = rate or Fraction(25)
        taken = self._container.codecs
        if taken is not None and av.Codec(self._encoder.name, "w").canonical_name not in taken:
            raise self._not_held()
        try:
            # The rate given here lands in the container as the stream's. A variable rate
            # has none; one frame a tick is so short that the muxers do not write it.
            stream: Any = self._out.add_stream(
                self._encoder.name, rate=spec.rate or 1 / spec.time_base
            )
        except ValueError:
            raise self._not_held() from None
        context = stream.codec_context
        context.width, context.height = spec.width, spec.height
        context.pix_fmt = self._pix_fmt if self._feeder is None else nvenc.PIX_FMT
        context.framerate = rate
        context.time_base = 1 / rate if self._encoder.ticks else spec.time_base
        stream.time_base = spec.time_base
        context.thread_count = self._threads
        # PyAV's default, slice threads alone, makes libx264 cut pictures into slices.
        context.thread_type = "AUTO"
        context.flags |= _FRAME_DURATION
        color = self._color
        context.color_range = color.range
        context.colorspace = color.matrix
        context.color_trc = color.transfer
        context.color_primaries = color.primaries
        context.options = dict(self._options)
        if color.site:
            context.options["chroma_sample_location"] = str(int(color.site))
        if self._info is not None:
            context.sample_aspect_ratio = self._aspect()
            names = self._info.video_stream.disposition
            stream.disposition = sum(int(av.stream.Disposition[n]) for n in names)
            matrix = self._info.video.display_matrix
            if matrix is not None and self._container.rotation and "rotation" not in self._drop:
                stream.set_display_matrix(matrix)
        if self._feeder is None:
            try:
                context.open()
            except (av.error.FFmpegError, ValueError) as error:
                raise self._not_started(error) from error
        return stream

    def _not_started(self, error: Exception) -> OutputError:
        hint = "Check --codec, --preset, --crf, --pix-fmt and --encoder-option"
        if self._encoder.device:
            hint = "Is there an NVIDIA GPU with NVENC? Else use --codec h264, hevc or av1"
        why = getattr(error, "strerror", None) or error
        return OutputError(f"encoder {self._encoder.name} cannot be started: {why}", hint=hint)

    def _not_held(self) -> OutputError:
        return OutputError(
            f"{self._container.name} cannot hold what encoder {self._encoder.name} makes",
            hint="Write to .mkv, or use another --codec",
        )

    def write(self, frame: Frame) -> None:
        """Encode a frame, and write what is ready.

        Raises:
            OutputError: the file cannot be written.
        """
        pts = frame.pts - self._shift
        early, self._early = self._early, None
        if early is None:
            self._mux_video(self._timed(frame))
        else:
            self._mux_encoded(early)
        if self._first_pts is None:
            self._first_pts = pts
        self._last_pts = pts
        self._end_pts = pts + (frame.duration or 0)
        self._frames += 1
        if self._passthrough is not None:
            self._mux(self._passthrough.pump(frame.pts * self._spec.time_base))

    def _timed(self, frame: Frame) -> av.VideoFrame:
        """Return a frame as the encoder takes it, with its time."""
        pts = frame.pts - self._shift
        if self._feeder is None:
            picture = self._picture(frame)
        else:
            picture, self._held[pts] = self._on_gpu(frame, self._feeder)
        picture.pts = self._tick(pts, frame.duration)
        picture.time_base = self._video.codec_context.time_base
        picture.duration = 1 if self._encoder.ticks else (frame.duration or 0)
        return picture

    def _tick(self, pts: int, duration: int | None) -> int:
        """Return the timestamp that the encoder sees."""
        if not self._encoder.ticks:
            return pts
        self._times[self._frames] = (pts, duration or 0)
        return self._frames

    def _on_gpu(self, frame: Frame, feeder: nvenc.Feeder) -> tuple[av.VideoFrame, Any]:
        """Return a frame as NVENC takes it, and what it reads."""
        if frame.side_data is not None and "captions" not in self._drop:
            raise OutputError(
                f"encoder {self._encoder.name} cannot write the closed captions that begin here",
                hint="Use --drop captions to lose them, or --codec libx264 or libx265",
            )
        if frame.spec is self._spec or frame.spec == self._spec:
            picture, held = feeder.picture(frame)
        else:
            picture = self._picture(feeder.download(frame))
            picture, held = feeder.upload(planes_of(picture, PIXEL_FORMATS[self._pix_fmt]))
        return self._tagged(picture), held

    def _picture(self, frame: Frame) -> av.VideoFrame:
        """Return a frame as the encoder takes it."""
        spec, planes, format = frame.spec, frame.planes, frame.spec.format
        target = PIXEL_FORMATS.get(self._pix_fmt)
        if (
            format.model == "gray"
            and target is not None
            and target.model == "yuv"
            and target.bits == format.bits
        ):
            planes, format = to_yuv(planes, format, target), target
        direct = spec is self._spec and format.name == self._pix_fmt
        picture = frame_from(planes, format, share=direct and self._encoder.copies)
        same_size = (spec.width, spec.height) == (self._spec.width, self._spec.height)
        if not same_size or picture.format.name != self._pix_fmt:
            if spec not in self._converters:
                self._converters[spec] = Converter(
                    self._spec.width, self._spec.height, self._pix_fmt, "lanczos"
                )
            color = spec.resolved_color()
            target_color = encoded_color(replace(spec, color=color), self._pix_fmt)
            picture = self._converters[spec](picture, color, target_color)
            self._resized += not same_size
        if frame.side_data is not None and "captions" not in self._drop:
            picture = self._with_side_data(picture, frame.side_data)
        return self._tagged(picture)

    def _tagged(self, picture: av.VideoFrame) -> av.VideoFrame:
        picture.color_range = self._color.range
        picture.colorspace = self._color.matrix
        picture.color_trc = self._color.transfer
        picture.color_primaries = self._color.primaries
        picture.pict_type = 0
        return picture

    def _with_side_data(self, picture: av.VideoFrame, carrier: Any) -> av.VideoFrame:
        """Return the picture with the side data of another one.

        PyAV copies side data only when it converts a frame, so the small frame that
        carries them is converted to the size of the picture, and painted over.
        """
        if not isinstance(carrier, av.VideoFrame):
            return picture
        if not self._encoder.captions:
            raise OutputError(
                f"encoder {self._encoder.name} cannot write the closed captions that begin here",
                hint="Use --drop captions to lose them, or --codec h264 or hevc",
            )
        format = PIXEL_FORMATS.get(self._pix_fmt)
        if format is None:
            return picture
        result = carrier.reformat(picture.width, picture.height, self._pix_fmt)
        fill(result, planes_of(picture, format))
        return result

    def _mux_video(self, picture: av.VideoFrame | None) -> None:
        try:
            packets = self._video.encode(picture)
        except (av.error.FFmpegError, OSError) as error:
            raise output_error(self._path, error) from error
        if picture is None and self._packets == 0 and self._encoder.name == "libx265":
            _set_dts(packets)
        self._mux_encoded(packets)

    def _mux_encoded(self, packets: list[av.packet.Packet[Any]]) -> None:
        for packet in packets:
            if packet.pts is not None:
                self._held.pop(packet.pts, None)
            if self._encoder.ticks:
                assert packet.pts is not None
                pts, duration = self._times.pop(packet.pts)
                packet.pts = packet.dts = pts
                packet.duration = duration
                packet.time_base = self._spec.time_base
        self._packets += len(packets)
        self._mux(packets)

    def _mux(self, packets: Iterable[av.packet.Packet[Any]]) -> None:
        try:
            for packet in packets:
                self._out.mux_one(packet)
        except (av.error.FFmpegError, OSError) as error:
            raise output_error(self._path, error) from error

    def finish(self) -> None:
        """Write what is left, and complete the file.

        Raises:
            OutputError: the file cannot be written.
        """
        self._mux_video(None)
        if self._passthrough is not None:
            stopped = self._source is not None and self._source.counts.stopped
            end = (self._end_pts + self._shift) * self._spec.time_base if stopped else None
            self._mux(self._passthrough.pump(end))
        self.close()
        if isinstance(self._file, Path):
            self._patch(self._file)

    def _patch(self, file: Path) -> None:
        if self._patches_matroska:
            aspect = self._aspect()
            size = (self._spec.width, self._spec.height, aspect) if aspect != 1 else None
            done = patch_matroska(file, self._title, size, self._mastering, self._light)
        elif self._container.hdr and (self._mastering is not None or self._light is not None):
            done = patch_mp4(file, self._mastering, self._light)
        else:
            return
        if not done:
            raise OutputError(f"the header of '{self._path}' has no room for its metadata")

    def close(self) -> None:
        """Write the trailer, if there is a header, and close both files.

        Raises:
            OutputError: the trailer cannot be written.
        """
        try:
            self._out.close()
        except (av.error.FFmpegError, OSError) as error:
            raise output_error(self._path, error) from error
        finally:
            if self._passthrough is not None:
                self._passthrough.close()

    def report(self) -> dict[str, Any]:
        """Return what was written."""
        spec, base = self._spec, self._spec.time_base
        streams = [r.to_dict() for r in self._passthrough.routes] if self._passthrough else []
        return {
            "path": str(self._path),
            "container": self._container.muxer,
            "encoder": self._encoder.name,
            "encoder_options": self._options,
            "pixel_format": self._pix_fmt,
            "width": spec.width,
            "height": spec.height,
            "frames": self._frames,
            "packets": self._packets,
            "resized_frames": self._resized,
            "first_pts": self._first_pts,
            "last_pts": self._last_pts,
            "time_base": str(base),
            "duration_s": round(float((self._end_pts - (self._first_pts or 0)) * base), 6),
            "chapters": self._chapters,
            "streams": streams,
        }


_REORDERED = 16  # frames; more than any encoder decodes before they are shown


def _set_dts(packets: list[Any]) -> None:
    """Give all packets of a very short clip their decoding times, unless they have them.

    libx265 leaves them undefined where fewer frames come than it delays.

    Args:
        packets: all packets of the clip, in the order of decoding.
    """
    given = [packet.dts for packet in packets]
    rising = None not in given and all(a < b for a, b in pairwise(given))
    times = sorted(packet.pts for packet in packets)
    step = max([b - a for a, b in pairwise(times)] + [p.duration or 1 for p in packets])
    # Undefined ones may rise as well, but far away from the pictures' times.
    if rising and all(p.pts - _REORDERED * step <= p.dts <= p.pts for p in packets):
        return
    following: int | None = None
    for packet in reversed(packets):
        packet.dts = packet.pts if following is None else min(packet.pts, following - 1)
        following = packet.dts


def output_error(path: Path, error: Exception) -> OutputError:
    """Say in one line why an output cannot be written."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left for '{path}'", hint="Free some space, then run again")
    if number == errno.EFBIG:
        return OutputError(f"'{path}' would get larger than a file may be here")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"no permission to write '{path}'")
    what = getattr(error, "strerror", None) or str(error)
    return OutputError(f"'{path}' cannot be written: {what}")
