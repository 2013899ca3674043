"""The bounded queue between two stages.

A link has a life: it is open, then ended by its writer (the reader still gets what is
queued), closed by its reader (the writer is told to stop), or broken by an error anywhere
(both sides stop at once).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from vidpipe.clock import Clock, MonotonicClock
from vidpipe.frame import Frame


class Policy(Enum):
    """What a full link does with one more frame."""

    BLOCK = "block"
    """The writer waits. Files lose nothing."""

    LATEST = "latest"
    """The oldest queued frame is dropped and counted. For the entrance of live graphs: there
    a reader may also leave out what waited too long."""


class LinkClosed(Exception):
    """The reader wants no more frames, or the pipeline is being torn down."""


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """What a link has seen so far.

    Attributes:
        put, got, dropped: frames.
        queued: frames waiting now; capacity: the most that may wait.
        writer_waited_s: time the writer was held up by a full link.
        reader_waited_s: time the reader was held up by an empty link.
    """

    put: int
    got: int
    dropped: int
    queued: int
    capacity: int
    writer_waited_s: float
    reader_waited_s: float


_PATIENCE_S = 0.02


class Link:
    """A bounded queue of frames with one writer and one reader.

    Waking a thread costs more than many a stage needs for a frame. `bundle`, at most `capacity`,
    lets a side that had to wait sleep until there is something to do for so many frames: the
    writer until there is room for them, the reader until they are there, or for 20 ms. A reader
    that has found nothing by then gets the next frame at once.

    Args:
        capacity: the most frames that may wait, at least 1.
        policy: what a full link does.
        clock: source of the waiting times.
        stale: with `Policy.LATEST`, says that a waiting frame comes too late; it is dropped if
            a later one waits.
    """

    def __init__(
        self,
        capacity: int = 2,
        policy: Policy = Policy.BLOCK,
        clock: Clock | None = None,
        stale: Callable[[Frame], bool] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, expected at least 1")
        self.capacity = capacity
        self.policy = policy
        self.bundle = 1
        self._clock = clock or MonotonicClock()
        self._stale = stale if policy is Policy.LATEST else None
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._woken = False
        self._wanted = 1  # frames that the reader waits for
        self._put = self._got = self._dropped = 0
        self._writer_waited_s = self._reader_waited_s = 0.0

    def put(self, frame: Frame) -> None:
        """Queue a frame.

        Raises:
            LinkClosed: nobody will read it.
        """
        with self._changed:
            if len(self._queue) >= self.capacity and not self._closed:
                if self.policy is Policy.LATEST:
                    self._queue.popleft()
                    self._dropped += 1
                else:
                    start_s = self._clock.now_s()
                    self._changed.wait_for(lambda: self._closed or self._has_room())
                    self._writer_waited_s += self._clock.now_s() - start_s
            if self._closed:
                raise LinkClosed
            self._queue.append(frame)
            self._put += 1
            if len(self._queue) >= self._wanted:
                self._changed.notify_all()

    def end(self) -> None:
        """Say that no more frames will come; queued ones are still delivered."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what is queued and stop both sides. May be called from any thread."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def wake(self) -> None:
        """Let `items` give None if no frame is there. May be called from any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames in order until the writer ends the link.

        Raises:
            LinkClosed: the link was closed meanwhile.
        """
        for frame in self.items():
            if frame is not None:
                yield frame
            del frame  # a ring slot is free as soon as the reader lets go

    def items(self) -> Iterator[Frame | None]:
        """Yield frames like `__iter__`, and None after `wake`.

        Raises:
            LinkClosed: the link was closed meanwhile.
        """
        while True:
            frame: Frame | None = None
            with self._changed:
                if not self._has_news():
                    start_s = self._clock.now_s()
                    self._wait_for_news()
                    self._reader_waited_s += self._clock.now_s() - start_s
                if self._closed:
                    raise LinkClosed
                if self._queue:
                    frame = self._pop()
                elif self._ended:
                    return
                self._woken = False
            yield frame
            del frame

    def peek(self, ahead: int) -> Frame | None:
        """Return the frame that comes so many frames after the next one, or the last that waits.

        Returns:
            None if none waits.
        """
        with self._changed:
            queue = self._queue
            return queue[min(ahead, len(queue) - 1)] if queue else None

    def _has_news(self) -> bool:
        return len(self._queue) >= self._wanted or self._ended or self._closed or self._woken

    def _wait_for_news(self) -> None:
        if self.bundle > 1:
            self._wanted = self.bundle
            self._changed.wait_for(self._has_news, _PATIENCE_S)
            self._wanted = 1
        self._changed.wait_for(self._has_news)

    def _has_room(self) -> bool:
        return len(self._queue) <= self.capacity - self.bundle

    def _pop(self) -> Frame:
        frame = self._queue.popleft()
        while self._queue and self._stale is not None and self._stale(frame):
            frame = self._queue.popleft()
            self._dropped += 1
        self._got += 1
        if self._has_room():
            self._changed.notify_all()
        return frame

    def statistics(self) -> LinkStatistics:
        """Return a snapshot of what the link has seen."""
        with self._changed:
            return LinkStatistics(
                self._put,
                self._got,
                self._dropped,
                len(self._queue),
                self.capacity,
                self._writer_waited_s,
                self._reader_waited_s,
            )
