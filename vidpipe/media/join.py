"""One output file from parts that were encoded by several encoders.

Every part is a stream of its own that begins with a key frame and refers to nothing outside
it. Their packets follow each other in one track, under the header that all of them share.
"""

from __future__ import annotations

import io
from bisect import insort
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import av.error
import av.packet

from vidpipe.device import CPU, Device
from vidpipe.errors import OutputError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.media import nvenc
from vidpipe.media.encode import Encode
from vidpipe.media.ranges import Schedule
from vidpipe.media.writer import Writer
from vidpipe.stage import Sink

_REORDERED = 32  # more than any encoder reorders


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What is known of a part when it is complete.

    Attributes:
        header: the encoder's extradata, the same for all parts.
        frames: how many were encoded.
        resized: how many of them were brought to the first size.
        end_pts: when the last one ends, in ticks.
    """

    header: bytes
    frames: int
    resized: int
    end_pts: int


class PartWriter(Writer):
    """Encodes one part, and keeps its packets instead of writing them.

    Args:
        feeder: of an earlier part, to go on with; else None.
        options: of `Writer`.
    """

    def __init__(self, *args: Any, feeder: nvenc.Feeder | None = None, **options: Any) -> None:
        self._given_feeder = feeder
        self._kept: list[av.packet.Packet[Any]] = []
        super().__init__(*args, **options)

    @property
    def feeder(self) -> nvenc.Feeder | None:
        """What shows frames on a GPU to the encoder."""
        return self._feeder

    def begin(self) -> None:
        """Open the encoder.

        Raises:
            OutputError: it cannot be opened.
        """
        self._video = self._add_video()

    def taken(self) -> list[av.packet.Packet[Any]]:
        """Return the packets that have come since the last call."""
        packets, self._kept = self._kept, []
        return packets

    def finish(self) -> None:
        """Let the encoder give its last packets.

        Raises:
            OutputError: it cannot.
        """
        self._mux_video(None)

    def facts(self) -> PartFacts:
        """Return what was encoded, after `finish`."""
        header = bytes(self._video.codec_context.extradata or b"")
        return PartFacts(header, self._frames, self._resized, self._end_pts)

    def _new_feeder(self, depth: int) -> nvenc.Feeder:
        return self._given_feeder or super()._new_feeder(depth)

    def _mux(self, packets: Iterable[av.packet.Packet[Any]]) -> None:
        self._kept += packets


class JoinWriter(Writer):
    """Writes the packets of parts into one file, and copies the other streams beside them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._floor: int | None = None  # first timestamp of the part
        self._delay = 0  # packets whose decoding times lie before the first picture
        self._recent: list[int] = []  # timestamps so far, the highest ones, rising
        self._due: list[int] = []
        super().__init__(*args, **options)

    def join(self, packets: list[av.packet.Packet[Any]], facts: PartFacts | None) -> None:
        """Write packets of a part; `facts` come with its last ones.

        Raises:
            OutputError: the file cannot be written, or the part has another header.
        """
        for packet in packets:
            self._set_times(packet)
            if self._passthrough is not None:
                assert packet.dts is not None
                due = packet.dts + self._shift
                self._mux(self._passthrough.pump(due * self._spec.time_base))
            packet.stream = self._video
            self._mux([packet])
        self._packets += len(packets)
        if facts is None:
            return
        self._floor = None
        self._frames += facts.frames
        self._resized += facts.resized
        self._end_pts = facts.end_pts - self._shift
        if facts.header != bytes(self._video.codec_context.extradata or b""):
            raise self._no_fit()

    def _set_times(self, packet: av.packet.Packet[Any]) -> None:
        """Give a packet its times in the file.

        An encoder that reorders pictures lets its first decoding times lie before its first
        picture. In the middle of a file those are the times of the last pictures before.
        """
        assert packet.pts is not None
        if self._floor is None:
            self._floor = packet.pts
            self._due = self._recent[len(self._recent) - self._delay :]
        dts = packet.pts if packet.dts is None else packet.dts
        if dts < self._floor and self._frames == 0:
            self._delay += 1
        elif dts < self._floor:
            if not self._due or self._due[0] > packet.pts:
                raise self._no_fit()
            dts = self._due.pop(0)
        insort(self._recent, packet.pts)
        del self._recent[:-_REORDERED]
        packet.pts -= self._shift
        packet.dts = dts - self._shift
        if self._first_pts is None:
            self._first_pts = packet.pts
        self._last_pts = max(self._last_pts, packet.pts)

    def _no_fit(self) -> OutputError:
        return OutputError(
            f"the parts that encoder {self._encoder.name} made do not fit together",
            hint="Use one device, or another --codec",
        )

    def _mux_video(self, picture: av.VideoFrame | None) -> None:
        """Do nothing: the encoder of this writer only gives the header."""

    def _open_on_gpu(
        self,
        first: Frame | None,  # noqa: ARG002 - it is encoded elsewhere
        feeder: nvenc.Feeder,
    ) -> None:
        super()._open_on_gpu(None, feeder)
        self._early = None


class PartEncode(Encode):
    """Encodes the parts that a worker reads, each with an encoder of its own.

    Args:
        schedule: takes the packets; shared with the other workers.
        options: of `Encode`.
    """

    def __init__(self, *, schedule: Schedule, **options: Any) -> None:
        super().__init__(**options)
        self.schedule = schedule
        self._current: PartWriter | None = None
        self._feeder: nvenc.Feeder | None = None
        self._finished = False

    @property
    def choice(self) -> tuple[str, dict[str, str] | None, FrameSpec | None]:
        """The encoder, its options where NVENC was chosen, and what it takes, on the CPU."""
        spec = replace(self._spec, device=CPU) if self._spec is not None else None
        return self._encoder.name, self._options, spec

    @property
    def spec(self) -> FrameSpec:
        """What the encoder takes, after `plan`."""
        assert self._spec is not None
        return self._spec

    def plan(self, spec: FrameSpec) -> None:
        """Choose the encoder; everything else is checked by the one that joins.

        Raises:
            OutputError: there is no such encoder or container.
        """
        self._settle(spec)

    def write(self, frame: Frame) -> None:
        """Encode one frame, and hand on what has come of it.

        Raises:
            OutputError: it cannot be encoded.
        """
        segment = self.schedule.at(frame.pts)
        writer = self._current
        if writer is None:
            writer = self._current = PartWriter(
                io.BytesIO(), feeder=self._feeder, **self._writing(self.spec)
            )
            self._feeder = writer.feeder
            writer.begin()
        writer.write(frame)
        if frame.pts != segment.last_pts:
            packets = writer.taken()
            if packets:
                self.schedule.put(segment, packets)
            return
        self._current = None
        writer.finish()
        self.schedule.put(segment, writer.taken(), writer.facts())
        writer.close()

    def finish(self) -> None:
        """Note that all parts are complete."""
        self._finished = True

    def close(self) -> None:
        """Let go of everything; unless all parts are complete, nobody waits for more."""
        writer, self._current = self._current, None
        self._feeder = None
        if writer is not None:
            with suppress(av.error.FFmpegError, OutputError):
                writer.close()
        if not self._finished:
            self.schedule.abort()


class PartSink(Sink):
    """Lets a sink that keeps nothing take the parts that a worker reads.

    Args:
        inner: the sink.
        schedule: is told when a part is complete; shared with the other workers.
    """

    def __init__(self, inner: Sink, schedule: Schedule) -> None:
        self._inner = inner
        self._schedule = schedule
        self._finished = False

    def device_for(self, spec: FrameSpec) -> Device:
        """Take frames where the sink does."""
        return self._inner.device_for(spec)

    def plan(self, spec: FrameSpec) -> None:
        """Plan the sink."""
        self._inner.plan(spec)

    def open(self) -> None:
        """Open the sink."""
        self._inner.open()

    def write(self, frame: Frame) -> None:
        """Let the sink take one frame."""
        self._inner.write(frame)
        segment = self._schedule.at(frame.pts)
        if frame.pts == segment.last_pts:
            self._schedule.put(segment, [], ())

    def finish(self) -> None:
        """Note that all parts are complete."""
        self._inner.finish()
        self._finished = True

    def close(self) -> None:
        """Close the sink; unless all parts are complete, nobody waits for more."""
        self._inner.close()
        if not self._finished:
            self._schedule.abort()

    def report(self) -> dict[str, Any]:
        """Return the sink's report."""
        return self._inner.report()


class JoinEncode(Encode):
    """Writes the file that parts make together. Options as `Encode`."""

    def adopt(self, part: PartEncode) -> None:
        """Use the encoder that a part's was found to be; called before `plan`."""
        self._encoder, self._options = part._encoder, part._options
        self._layout, self._why_host = part._layout, part._why_host

    def join(
        self, packets: list[av.packet.Packet[Any]], facts: PartFacts | tuple[()] | None
    ) -> None:
        """Write packets of a part; `facts` come with its last ones, `()` if it has none.

        Raises:
            OutputError: the file cannot be written, or the parts do not fit together.
        """
        writer = self._writer
        if writer is None and packets:
            assert self._spec is not None
            writer = self._writer = JoinWriter(self._part(), **self._writing(self._spec))
            first = packets[0].pts
            assert first is not None
            writer.start(Frame((), self._spec, first))
        if writer is not None:
            assert isinstance(writer, JoinWriter)
            writer.join(packets, facts or None)
