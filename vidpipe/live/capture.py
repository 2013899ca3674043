"""The source of live graphs: it may be lost and comes back by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vidpipe.errors import MediaError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.link import Policy
from vidpipe.live.address import parse_source, without_secrets
from vidpipe.live.audio import AudioHub
from vidpipe.live.reader import TIME_BASE, Connection, Timeline, slate
from vidpipe.stage import FrameSource, Source, register


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next attempt: doubles, up to a limit.

    One second at most, so that a source that is back is found within two.
    """

    first_s: float = 0.125
    most_s: float = 1.0
    attempts: int = 0

    def next(self) -> float:
        """Return the next wait in seconds."""
        wait_s = min(self.first_s * 2.0**self.attempts, self.most_s)
        self.attempts = min(self.attempts + 1, 16)
        return wait_s

    def reset(self) -> None:
        """Begin anew: an attempt succeeded."""
        self.attempts = 0


class Frames(FrameSource):
    """Live pictures from any Python iterable: the latest wins at the entrance.

    Args:
        spec, frames: as for `FrameSource`. A `captured_s` of 0 is set to now.
    """

    policy = Policy.LATEST


@register("capture")
class Capture(Source):
    """Pictures and sound of a camera, a screen, a network stream, or a file at its own pace.

    A source that is lost is tried again, after an eighth of a second at first and every
    second at last. Meanwhile the last good picture is repeated five times a
    second, so that sinks go on. What comes before the other stages are open counts as early.

    Args:
        address: "camera", "camera:1", "screen", "screen:WxH+X,Y", a URL, a device of FFmpeg
            such as "v4l2:/dev/video0", or a file, which is repeated.
        size: WIDTHxHEIGHT to ask a camera or screen for.
        rate: frames per second to ask a camera or screen for.
        options: more options of FFmpeg's demuxer or protocol.
        loop: start a file again at its end.
        audio: pass the sound on.
        lost: "hold" repeats the last good picture while the source is lost, "slate" shows a dark
            one with a bright edge.
        timeout_s: a network source that is silent for so long is lost.
        threads: of the decoder; 0 means as many as the machine has.
    """

    policy = Policy.LATEST

    HOLD_S = 0.2
    """While the source is lost, a picture is repeated every so often."""

    STALL_S = 1.0
    """A source that gave nothing for so long shows the last picture, too."""

    def __init__(
        self,
        *,
        address: str,
        size: str | None = None,
        rate: float | None = None,
        options: dict[str, str] | None = None,
        loop: bool = True,
        audio: bool = True,
        lost: Literal["hold", "slate"] = "hold",
        timeout_s: float = 5.0,
        threads: int = 1,
    ) -> None:
        self.address = parse_source(address, size=size, rate=rate)
        self.options = dict(options or {})
        self.loop = loop
        self.lost = lost
        self.timeout_s = timeout_s
        self.threads = threads
        self.sound = AudioHub() if audio else None
        self.has_sound = False
        self.state = "starting"
        self.reason: str | None = None
        self.losses = 0
        self.repeated = 0
        self.overwritten = 0
        self.early = 0
        self.frames_read = 0
        self.notify: Callable[[dict[str, Any]], None] = lambda _event: None
        self._error: MediaError | None = None
        self._start_s = 0.0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._next: Frame | None = None
        self._ended = False
        self._shown: Frame | None = None
        self._spec: FrameSpec | None = None
        self._thread: threading.Thread | None = None

    def plan(self) -> FrameSpec:
        """Connect and wait for the first picture.

        Raises:
            MediaError: there is none; a source must be there when the filter starts.
        """
        self._start_s = self.clock.now_s()
        # A daemon: a driver may hold a read for ever, which must not keep the program alive.
        self._thread = threading.Thread(
            target=self._read, name=f"vidpipe-{self.name}-reader", daemon=True
        )
        self._thread.start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._next is not None or self._error is not None or self._ended,
                timeout=2 * self.timeout_s,
            )
            first, error = self._next, self._error
        if first is None:
            self.close()
            raise error or MediaError(
                f"source '{without_secrets(self.address.url)}' gave no picture in "
                f"{2 * self.timeout_s:g} s"
            )
        return first.spec

    def stop(self) -> None:
        """End `frames` and the reading."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Hang up."""
        self.stop()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(self.timeout_s + 1)

    def frames(self) -> Iterator[Frame]:
        """Yield the latest picture, again and again; ends with `stop` or with a file."""
        last_pts = -1
        while True:
            frame = self._wait()
            if frame is None:
                return
            if frame.pts <= last_pts:
                frame.pts = last_pts + 1
            last_pts = frame.pts
            yield frame
            del frame

    def _wait(self) -> Frame | None:
        with self._changed:
            while not self._stop.is_set():
                if self._next is not None:
                    frame, self._next = self._next, None
                    self._shown = frame
                    # The pipeline gets an object of its own: `frames` sets its pts.
                    return _copy(frame)
                if self._ended:
                    return None
                patience_s = self.HOLD_S if self.state == "lost" else self.STALL_S
                if not self._changed.wait(patience_s):
                    return self._repeat()
        return None

    def _repeat(self) -> Frame | None:
        """Return the last good picture once more, or a slate, as of now."""
        shown = self._shown
        if shown is None:
            return None
        self.repeated += 1
        again = slate(shown.spec) if self.lost == "slate" else _copy(shown)
        again.captured_s = self.clock.now_s()
        again.pts = round((again.captured_s - self._start_s) / TIME_BASE)
        return again

    def _read(self) -> None:
        """Keep the source open; runs on a thread of its own."""
        backoff = Backoff()
        while not self._stop.is_set():
            timeline = Timeline(self.clock, self._start_s)
            begin_s = self.clock.now_s()
            try:
                connection = Connection(
                    self.address,
                    self.clock,
                    timeline,
                    options=self.options,
                    timeout_s=self.timeout_s,
                    sound=self.sound.put if self.sound else None,
                    threads=self.threads,
                    stop=self._stop,
                    known=self._spec,
                )
            except MediaError as error:
                self._lost(error)
            else:
                try:
                    self.has_sound = self.has_sound or connection.has_sound
                    for frame in connection.frames():
                        backoff.reset()
                        self._spec = frame.spec
                        self._offer(frame)
                        del frame
                    if self.address.kind != "file":
                        name = without_secrets(self.address.url)
                        self._lost(MediaError(f"source '{name}' ended"))
                    elif self.loop and backoff.attempts == 0:
                        backoff.attempts = 1  # a file without a picture is not read in a spin
                        continue
                    else:
                        self._finish()
                        return
                except MediaError as error:
                    self._lost(error)
                except Exception as error:  # a thread that dies would look like a silent source
                    self._lost(MediaError(f"{type(error).__name__}: {error}"))
                finally:
                    connection.close()
            if self.state == "starting":
                return
            # An attempt that took its time has waited already.
            self._stop.wait(max(0.0, backoff.next() - (self.clock.now_s() - begin_s)))

    def _offer(self, frame: Frame) -> None:
        if frame.pts < 0:
            frame.pts = round((frame.captured_s - self._start_s) / TIME_BASE)
        with self._changed:
            if self._next is not None and self._shown is None:
                self.early += 1
            elif self._next is not None:
                self.overwritten += 1
            self._next = frame
            self.frames_read += 1
            back = self.state == "lost"
            self.state = "live"
            self._changed.notify_all()
        if back:
            self.reason = None
            self.notify({"event": "source", "source": self.name, "state": "live"})

    def _lost(self, error: MediaError) -> None:
        with self._changed:
            known = self.state == "lost"
            if self.state == "starting":
                self._error = error
            else:
                self.state = "lost"
            self._changed.notify_all()
        if not known and self._error is None and not self._stop.is_set():
            self.losses += 1
            self.reason = error.message
            self.notify(
                {"event": "source", "source": self.name, "state": "lost", "reason": error.message}
            )

    def _finish(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """Return what was read and lost."""
        return {
            "summary": f"{self.frames_read} frames read, lost {self.losses} times",
            "frames": self.frames_read,
            "overwritten": self.overwritten,
            "early": self.early,
            "repeated": self.repeated,
            "losses": self.losses,
        }


def _copy(frame: Frame) -> Frame:
    return frame.replace(frame.planes, frame.spec)
