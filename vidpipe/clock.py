"""The only place that reads the time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time that never goes back."""

    def now_s(self) -> float:
        """Return seconds since some fixed moment."""


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Return seconds since some fixed moment."""
        return time.perf_counter()


def processor_s() -> float:
    """Return the processor time in seconds, user and system, of all threads of the process."""
    return time.process_time()
