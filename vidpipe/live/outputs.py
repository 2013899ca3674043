"""The sinks of live graphs: none of them can hold up another.

Each has a link of its own that keeps the latest frames and drops older ones, counted; a sink
that stalls loses its own frames only. A sink that is lost while the filter runs says so and
tries again; it never ends the filter.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import av
import av.error

from vidpipe.clock import Clock
from vidpipe.device import Device
from vidpipe.errors import InputError, OutputError, SpecError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.link import Policy
from vidpipe.live.address import muxer_for, without_secrets
from vidpipe.live.audio import AudioReader
from vidpipe.live.capture import Backoff, Capture
from vidpipe.live.meter import Meter
from vidpipe.live.reader import FAILURES
from vidpipe.live.rtp import RtpWriter
from vidpipe.live.writer import LiveWriter
from vidpipe.stage import Sink, Source, register

_OLD_PYAV = int(av.__version__.partition(".")[0]) < 19
"""It holds the interpreter's lock while it opens and closes an output."""


class LiveSink(Sink):
    """A sink that measures latency and survives the loss of where it writes.

    Subclasses have `deliver`.
    """

    policy = Policy.LATEST
    capacity = 2
    in_budget = True
    """Whether the time this sink takes counts towards the latency budget."""

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self.notify: Callable[[dict[str, Any]], None] = lambda _event: None
        self.state = "starting"
        self.drops: dict[str, int] = {}
        self.source: Source | None = None
        self._spec: FrameSpec | None = None

    def attach(self, source: Source) -> None:
        """Remember where sound comes from."""
        self.source = source

    def plan(self, spec: FrameSpec) -> None:
        """Take 8-bit 4:2:0 pictures on the host.

        Raises:
            SpecError: others.
        """
        if spec.device.kind != "cpu" or spec.format.name not in ("yuv420p", "nv12"):
            raise SpecError(
                f"live outputs take yuv420p or nv12 on the CPU, got {spec.format} on {spec.device}"
            )
        if self._spec is None:
            self._spec = spec

    def measure(self, clock: Clock) -> Meter:
        """Return the meter, made at the first call."""
        if self.meter is None:
            self.meter = Meter(clock)
        return self.meter

    def write(self, frame: Frame) -> None:
        """Deliver a frame and note its latency, or note why it was dropped."""
        reason = self.deliver(frame)
        if reason is None:
            self.state = "live"
            self.measure(self.clock).add(frame.captured_s, getattr(frame, "enhanced_s", None))
        elif reason:
            self.drops[reason] = self.drops.get(reason, 0) + 1

    @abstractmethod
    def deliver(self, frame: Frame) -> str | None:
        """Give the frame to whoever it is for.

        Returns:
            None if that was done, why it was not possible, or "" if nobody wants it.
        """

    def report(self) -> dict[str, Any]:
        """Return state, drops and latency."""
        facts: dict[str, Any] = {"state": self.state, "drops": dict(self.drops)}
        if self.meter is not None:
            reading = self.meter.read()
            facts |= {"frames": reading.frames, "p99_s": reading.p99_s}
            if reading.p99_s is not None:
                facts["summary"] = f"p99 {reading.p99_s * 1000:.0f} ms in the last seconds"
        return facts


class Callback(LiveSink):
    """Hands every frame to a function, on the thread of this sink.

    Args:
        function: takes a `Frame`; its planes are on the device where they were made, and may
            be kept. Behind an enhance stage they are ready; behind other stages on a GPU they
            are when `frame.ready` is reached.
    """

    capacity = 1

    def __init__(self, function: Callable[[Frame], Any]) -> None:
        super().__init__()
        self._function = function

    def device_for(self, spec: FrameSpec) -> Device:
        """Take frames where they are."""
        return spec.device

    def plan(self, spec: FrameSpec) -> None:
        """Take anything."""

    def deliver(self, frame: Frame) -> str | None:
        """Call the function."""
        self._function(frame)
        return None


class _Encoded(LiveSink):
    """What recording and streaming share."""

    STEADY_S = 5.0
    """An output that held so long is tried again at once when it is lost, others less often."""

    listens = False
    """Whether this side waits for the other to connect."""

    def __init__(self, audio: bool) -> None:
        super().__init__()
        self.audio = audio
        self._writer: LiveWriter | None = None
        self._backoff = Backoff()
        self._again_s = 0.0
        self._since_s = 0.0
        self._reader: AudioReader | None = None

    def plan(self, spec: FrameSpec) -> None:
        """Check size and format."""
        super().plan(spec)
        if spec.width % 2 or spec.height % 2:
            raise SpecError(f"H.264 takes even sizes, got {spec.width}x{spec.height}")

    def replan(self, spec: FrameSpec) -> None:
        """Go on; the writer brings other sizes to the first one."""

    @abstractmethod
    def _connect(self, sound: AudioReader | None) -> LiveWriter: ...

    @abstractmethod
    def _error(self, error: Exception) -> OutputError: ...

    def open(self) -> None:
        """Open the output.

        Raises:
            OutputError: it cannot be; what is lost later is tried again instead.
        """
        if self.audio and isinstance(self.source, Capture) and self.source.has_sound:
            assert self.source.sound is not None
            self._reader = self.source.sound.subscribe()
        if self.listens:
            self.state = "waiting"
            return
        try:
            self._writer = self._connect(self._reader)
        except FAILURES as error:
            raise self._error(error) from None

    def deliver(self, frame: Frame) -> str | None:
        """Write the frame; when the output is lost, note it and try again later."""
        if self._writer is None and not self._reconnect():
            return self.state
        assert self._writer is not None
        try:
            self._writer.write(frame)
        except FAILURES as error:
            self._lose(error)
            return self.state
        if self.clock.now_s() - self._since_s > self.STEADY_S:
            self._backoff.reset()
        return None

    def _lose(self, error: Exception) -> None:
        state = "waiting" if self.listens else "lost"
        if self.state != state:
            self.notify(
                {
                    "event": "sink",
                    "sink": self.name,
                    "state": state,
                    "reason": self._error(error).message,
                }
            )
        self.state = state
        wait_s = 0.0 if self.listens else self._backoff.next()
        self._again_s = self.clock.now_s() + wait_s
        self._hang_up()

    def _reconnect(self) -> bool:
        if self.clock.now_s() < self._again_s:
            return False
        try:
            self._writer = self._connect(self._reader)
        except FAILURES as error:
            self._lose(error)
            return False
        self._since_s = self.clock.now_s()
        self.notify({"event": "sink", "sink": self.name, "state": "live"})
        return True

    def _hang_up(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(*FAILURES):
                writer.close()

    def finish(self) -> None:
        """Write the end."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.finish()
            except FAILURES as error:
                self._lose(error)
                with suppress(*FAILURES):
                    writer.close()

    def close(self) -> None:
        """Hang up."""
        self._hang_up()


_MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


@register("record")
class Record(_Encoded):
    """Writes a file that is whole at any moment: fragments of a second.

    Args:
        path: .mp4, .mov (fragmented) or .mkv.
        crf: quality of libx264, lower is better and bigger.
        preset: of libx264.
        audio: record the source's sound, as AAC.
        overwrite: replace a file that exists.
    """

    capacity = 15
    in_budget = False

    def __init__(
        self,
        *,
        path: str,
        crf: float = 20,
        preset: str = "superfast",
        audio: bool = True,
        overwrite: bool = False,
    ) -> None:
        super().__init__(audio)
        self.path = Path(path)
        self.overwrite = overwrite
        self.video = {"preset": preset, "crf": f"{crf:g}", "bf": "0", "rc-lookahead": "0"}
        if self.path.suffix.lower() not in _MUXERS:
            raise InputError(
                f"cannot record to '{self.path.name}'", hint="Use a name in .mp4, .mov or .mkv"
            )

    def open(self) -> None:
        """Create the file."""
        if self.path.exists() and not self.overwrite:
            raise OutputError(f"'{self.path}' exists already", hint="Use another name")
        if not self.path.parent.is_dir():
            raise OutputError(f"the folder '{self.path.parent}' does not exist")
        super().open()

    def _connect(self, sound: AudioReader | None) -> LiveWriter:
        assert self._spec is not None
        muxer = _MUXERS[self.path.suffix.lower()]
        if muxer == "matroska":
            options = {"cluster_time_limit": "1000"}
        else:
            options = {
                "movflags": "+frag_keyframe+empty_moov+default_base_moof",
                "frag_duration": "1000000",
            }
        return LiveWriter(
            f"file:{self.path}",
            muxer,
            self._spec,
            video=self.video,
            options=options,
            sound=sound,
            keyframe_s=1.0,
        )

    def _lose(self, error: Exception) -> None:
        super()._lose(error)
        # Opening the file again would overwrite what is in it.
        self._again_s = float("inf")

    def _error(self, error: Exception) -> OutputError:
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC:
            return OutputError(f"no space left for '{self.path}'")
        what = getattr(error, "strerror", None) or str(error)
        return OutputError(f"'{self.path}' cannot be written: {what}")


@register("stream")
class StreamOut(_Encoded):
    """Sends H.264 and AAC to the network; over RTSP, H.264 and Opus.

    RTSP sends sound and picture apart. FFmpeg's has no CNAME in its RTCP reports, without which
    some receivers play each as it arrives: there sound must not leave later than its picture.

    Args:
        url: rtmp(s)://, rtsp://, udp://, rtp://, tcp://, unix:// or http(s)://; MPEG-TS where the
            protocol leaves it open.
        bitrate: bits per second; by default a tenth of a bit for every pixel.
        preset: of libx264.
        audio: send the source's sound.
        options: more options of FFmpeg's muxer or protocol. With listen = "1" (http, tcp) the
            stream is for whoever connects, one at a time.
        timeout_s: a peer that takes nothing for so long is lost and tried again.
    """

    capacity = 2

    ACCEPT_S = 0.5
    """How long a stream for whoever connects waits at a time; a stop takes as long."""

    def __init__(
        self,
        *,
        url: str,
        bitrate: int | None = None,
        preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast"] = "superfast",
        audio: bool = True,
        options: dict[str, str] | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        super().__init__(audio)
        self.url = url
        self.muxer = muxer_for(url)
        self.bitrate = bitrate
        self.preset = preset
        self.options = dict(options or {})
        self.timeout_s = timeout_s
        self.listens = self.options.get("listen", "0") != "0" or _listen_in(url)
        if self.listens and _OLD_PYAV:
            # It would wait with the interpreter's lock held, and not end.
            raise InputError(
                f"waiting for whoever connects needs PyAV 19, this is {av.__version__}",
                hint="Use Python 3.12 or later",
            )
        # UDP and RTP connect to nobody.
        self.holds_up = _OLD_PYAV and not url.startswith(("udp:", "rtp:", "unix:"))
        if bitrate is not None and bitrate < 1000:
            raise InputError(f"the bitrate is {bitrate}", hint="Write bits per second: 4000000")

    def open(self) -> None:
        """Connect, unless others are to connect to this.

        Raises:
            OutputError: it cannot be; what is lost later is tried again instead.
        """
        if self.holds_up:
            self.notify(
                {
                    "event": "warning",
                    "sink": self.name,
                    "reason": f"with PyAV {av.__version__} all stops while this output connects, "
                    "long if its server does not answer; Python 3.12 or later has a newer one",
                }
            )
        super().open()

    def _connect(self, sound: AudioReader | None) -> LiveWriter:
        assert self._spec is not None
        spec = self._spec
        rate = float(spec.rate or 30)
        bitrate = self.bitrate or max(500_000, round(0.1 * spec.width * spec.height * rate))
        video = {
            "preset": self.preset,
            "tune": "zerolatency",
            "b": str(bitrate),
            "maxrate": str(bitrate),
            "bufsize": str(bitrate // 2),
        }
        options = dict(self.options)
        if self.muxer == "flv":
            options.setdefault("flvflags", "no_duration_filesize")
        if self.muxer == "rtsp":
            options.setdefault("rtsp_transport", "tcp")
        if self.muxer == "mpegts":
            options.setdefault("muxdelay", "0")
            # A picture whose length is told need not wait for the next one to be complete.
            options.setdefault("omit_video_pes_length", "0")
        if self.listens:
            options.setdefault("listen_timeout", str(round(1000 * self.ACCEPT_S)))
        if self.url.startswith("udp:"):
            options.setdefault("pkt_size", "1316")
        url: str | RtpWriter = self.url
        if self.url.startswith("rtp:"):
            url = RtpWriter(self.url, self.clock)
        elif self.url.startswith("tcp:") and "timeout=" not in self.url:
            # PyAV before 19 has no timeout for writing; this is the protocol's own.
            sign = "&" if "?" in self.url else "?"
            url = f"{self.url}{sign}timeout={round(self.timeout_s * 1e6)}"
        return LiveWriter(
            url,
            self.muxer,
            spec,
            video=video,
            options=options,
            sound=sound,
            sound_encoder="libopus" if self.muxer == "rtsp" else "aac",
            timeout_s=self.timeout_s,
        )

    def _error(self, error: Exception) -> OutputError:
        number = getattr(error, "errno", None)
        what = getattr(error, "strerror", None) or str(error)
        if isinstance(error, av.error.ExitError) or number == errno.ETIMEDOUT:
            what = "nobody watches" if self.listens else f"it took nothing for {self.timeout_s:g} s"
        hint = "Is the server running?" if number == errno.ECONNREFUSED else None
        return OutputError(f"cannot stream to '{without_secrets(self.url)}': {what}", hint=hint)


def _listen_in(url: str) -> bool:
    return "listen" in parse_qs(urlsplit(url).query, keep_blank_values=True)
