"""Latency and rate of what passes one place in a live graph."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vidpipe.clock import Clock


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of at least one value: one that did occur."""
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a meter saw.

    Attributes:
        frames: all frames since the start.
        rate: frames per second over the window.
        p50_s, p95_s, p99_s: latency over the window in seconds, None before the first frame.
        own_p50_s: median of the part of it that lies behind the enhance stage, or None.
    """

    frames: int = 0
    rate: float = 0.0
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    own_p50_s: float | None = None


class Meter:
    """Counts frames and keeps their latencies over the last seconds.

    Args:
        clock: the pipeline's clock, the one that frames were stamped with.
        window_s: how far back percentiles and rate look.

    May be read from any thread.
    """

    MOST = 2048
    """Samples kept, whatever the rate; memory stays flat."""

    def __init__(self, clock: Clock, window_s: float = 10.0) -> None:
        self.clock = clock
        self.window_s = window_s
        self._samples: deque[tuple[float, float, float | None]] = deque(maxlen=self.MOST)
        self._frames = 0
        self._lock = threading.Lock()

    def add(self, captured_s: float, enhanced_s: float | None = None) -> float:
        """Note that a frame is done now.

        Args:
            captured_s: when it entered the pipeline.
            enhanced_s: when it left the enhance stage, if it passed one.

        Returns:
            Its latency in seconds.
        """
        now_s = self.clock.now_s()
        own_s = None if enhanced_s is None else now_s - enhanced_s
        with self._lock:
            self._frames += 1
            self._samples.append((now_s, now_s - captured_s, own_s))
            while self._samples[0][0] <= now_s - self.window_s:
                self._samples.popleft()
        return now_s - captured_s

    def read(self) -> Reading:
        """Return the figures of the last window."""
        now_s = self.clock.now_s()
        with self._lock:
            frames = self._frames
            samples = [s for s in self._samples if s[0] > now_s - self.window_s]
        if not samples:
            return Reading(frames)
        latencies = [s[1] for s in samples]
        own = [s[2] for s in samples if s[2] is not None]
        span_s = samples[-1][0] - samples[0][0]
        return Reading(
            frames,
            (len(samples) - 1) / span_s if span_s > 0 else 0.0,
            percentile(latencies, 50),
            percentile(latencies, 95),
            percentile(latencies, 99),
            percentile(own, 50) if own else None,
        )
