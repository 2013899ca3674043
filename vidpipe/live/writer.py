"""One open output through PyAV: pictures with the sound that belongs to them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import av.container

from vidpipe.frame import Frame, FrameSpec
from vidpipe.live.audio import RATE, AudioReader, Chunk, Samples, Track
from vidpipe.live.rtp import PAYLOAD, RtpWriter
from vidpipe.media.convert import Converter, frame_from

TIME_BASE = Fraction(1, 90000)

SOUND: dict[str, dict[str, str]] = {
    "aac": {},
    "libopus": {"application": "lowdelay", "frame_duration": "10"},
}
"""Encoders of sound and their options. AAC leaves its encoder three of its frames, 64 ms, after
its time; Opus so set, 12.5 ms."""

PRIMING = 1024
"""AAC's first packet lies so many samples before its first sound. FLV takes nothing that lies
before its first packet, a picture, so the sound is cut until then."""


class LiveWriter:
    """Encodes and muxes as frames come; nothing is held back.

    Args:
        url: what FFmpeg opens, or a file that is closed with the writer.
        muxer: FFmpeg's name.
        spec: of the first frame; later frames are brought to its size.
        video: options of libx264.
        options: options of the muxer and its protocol.
        sound: where sound comes from, or None for an output without sound.
        sound_encoder: one of `SOUND`.
        timeout_s: a peer that takes nothing for so long is lost; None for files.
        keyframe_s: a key frame comes every so often.

    Raises:
        OSError, ValueError, av.error.FFmpegError: it cannot be opened. All methods raise them
            when the output is lost.
    """

    def __init__(
        self,
        url: str | RtpWriter,
        muxer: str,
        spec: FrameSpec,
        *,
        video: dict[str, str],
        options: dict[str, str] | None = None,
        sound: AudioReader | None = None,
        sound_encoder: str = "aac",
        timeout_s: float | None = None,
        keyframe_s: float = 2.0,
    ) -> None:
        self._spec = spec
        self._keyframe_s = keyframe_s
        self._sound = sound
        self._track: Track | None = None
        self._first_s: float | None = None
        self._key_s = 0.0
        self._last_pts = -1
        self._converters: dict[FrameSpec, Converter] = {}
        self.resized = 0
        # Sound and picture are interleaved here; the muxer must wait for neither.
        options = {"max_interleave_delta": "1", "flush_packets": "1", **(options or {})}
        if timeout_s is not None:
            options["rw_timeout"] = str(round(timeout_s * 1e6))
        self._file = url if isinstance(url, RtpWriter) else None
        # PyAV's types know files, but not that one method is enough.
        target: Any = url
        self._out: av.container.OutputContainer = av.open(
            target,
            "w",
            format=muxer,
            container_options=options,
            timeout=timeout_s,
            buffer_size=PAYLOAD if self._file else 32768,
        )
        try:
            self._video = self._add_video(video)
            self._audio: Any = None
            if sound is not None:
                self._audio = self._out.add_stream(
                    sound_encoder, rate=RATE, options=SOUND[sound_encoder]
                )
                self._audio.codec_context.layout = "stereo"
                self._audio.codec_context.bit_rate = 128_000
            self._out.start_encoding()
        except BaseException:
            self.close()
            raise

    def _add_video(self, options: dict[str, str]) -> Any:
        spec = self._spec
        stream: Any = self._out.add_stream("libx264", rate=spec.rate or Fraction(30))
        context = stream.codec_context
        context.width, context.height = spec.width, spec.height
        context.pix_fmt = "yuv420p"
        context.time_base = stream.time_base = TIME_BASE
        context.color_range = spec.color.range
        context.colorspace = spec.color.matrix
        context.color_trc = spec.color.transfer
        context.color_primaries = spec.color.primaries
        context.options = dict(options)
        return stream

    def write(self, frame: Frame) -> None:
        """Write a picture, and the sound up to it."""
        time_s = frame.time_s
        if self._first_s is None:
            self._first_s = time_s
            self._key_s = time_s - self._keyframe_s
            if self._sound is not None:
                self._track = Track(time_s + PRIMING / RATE)
        picture = self._picture(frame)
        pts = max(round((time_s - self._first_s) / TIME_BASE), self._last_pts + 1)
        picture.pts = self._last_pts = pts
        picture.time_base = TIME_BASE
        due = time_s - self._key_s >= self._keyframe_s
        if due:
            self._key_s = time_s
        picture.pict_type = av.video.frame.PictureType.I if due else 0
        for packet in self._video.encode(picture):
            self._out.mux_one(packet)
        self._write_sound(time_s)

    def _write_sound(self, until_s: float) -> None:
        if self._sound is None or self._track is None:
            return
        for chunk in self._sound.take(until_s):
            self._encode_sound(chunk)
        for samples in self._track.fill(until_s):
            self._put_sound(samples, self._track.samples - samples.shape[1])

    def _encode_sound(self, chunk: Chunk) -> None:
        assert self._track is not None
        position = self._track.samples
        for samples in self._track.add(chunk):
            self._put_sound(samples, position)
            position += samples.shape[1]

    def _put_sound(self, samples: Samples, position: int) -> None:
        heard = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
        heard.sample_rate = RATE
        heard.pts = position + PRIMING
        heard.time_base = Fraction(1, RATE)
        for packet in self._audio.encode(heard):
            self._out.mux_one(packet)

    def _picture(self, frame: Frame) -> av.VideoFrame:
        spec, first = frame.spec, self._spec
        picture = frame_from(frame.planes, spec.format)
        same = (spec.width, spec.height, spec.format.name) == (first.width, first.height, "yuv420p")
        if not same:
            if spec not in self._converters:
                self._converters[spec] = Converter(
                    first.width, first.height, "yuv420p", "bicubic", threads=1
                )
            if (spec.width, spec.height) != (first.width, first.height):
                self.resized += 1
            picture = self._converters[spec](picture, spec.resolved_color())
        picture.color_range = first.color.range
        picture.colorspace = first.color.matrix
        return picture

    def finish(self) -> None:
        """Write what the encoders hold, and the end."""
        for stream in (self._video, self._audio):
            if stream is not None:
                for packet in stream.encode(None):
                    self._out.mux_one(packet)
        self.close()

    def close(self) -> None:
        """Hang up."""
        try:
            self._out.close()
        finally:
            if self._file is not None:
                self._file.close()
