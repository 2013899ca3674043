"""Several frames at once through one session, given back in order.

Two frames on one thread each keep two processors busier than one frame on two threads: no
thread waits for the other behind every operator.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vidpipe import trace
from vidpipe.clock import Clock

Job = TypeVar("Job")


class Lanes(Generic[Job]):
    """Threads that run jobs beside the one that they are used from.

    Args:
        count: how many.
        clock: of the times.
        wake: called, on a thread of a lane, whenever a job is over.
        name: of the stage.
    """

    def __init__(self, count: int, clock: Clock, wake: Callable[[], None], name: str) -> None:
        self.count = count
        self._clock = clock
        self._wake = wake
        self._jobs: deque[tuple[Future[float], Job]] = deque()
        track = trace.current()
        self._tracks = [] if track is None else [track.beside(f"lane {n}") for n in range(count)]
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(count, f"vidpipe-{name}-lane", self._begin)

    def __len__(self) -> int:
        """Return how many jobs were put and not given back."""
        return len(self._jobs)

    def _begin(self) -> None:
        self._local.track = self._tracks.pop() if self._tracks else None

    def put(self, work: Callable[[], object], job: Job, pts: int) -> None:
        """Begin a piece of work as soon as a lane is free; `job` is what it is known by."""
        future = self._pool.submit(self._run, work, pts)
        self._jobs.append((future, job))
        future.add_done_callback(lambda _: self._wake())

    def _run(self, work: Callable[[], object], pts: int) -> float:
        start_s = self._clock.now_s()
        work()
        end_s = self._clock.now_s()
        if self._local.track is not None:
            self._local.track.span("run", start_s, end_s, pts=pts)
        return end_s - start_s

    def done(self, left: int) -> Iterator[tuple[Job, BaseException | None, float]]:
        """Yield (job, its error, seconds) of the jobs that are over, in the order they were put in.

        The seconds are what the job took, shared out among the lanes, but for what was waited for
        it here: what the user's own clock has not seen.

        Args:
            left: wait until no more than so many are left.
        """
        while self._jobs and (len(self._jobs) > left or self._jobs[0][0].done()):
            future, job = self._jobs.popleft()
            start_s = self._clock.now_s()
            error = future.exception()
            waited_s = self._clock.now_s() - start_s
            took_s = future.result() / self.count if error is None else 0.0
            yield job, error, took_s - waited_s

    def close(self) -> None:
        """Wait for what runs, drop the rest."""
        self._pool.shutdown(cancel_futures=True)
        self._jobs.clear()
