"""Sound beside a live picture: one decoder, and a reader for each sink that wants it.

Sound travels as 48 kHz stereo float samples with the time base of the pictures: seconds
since the source started. A sink writes it up to the picture that it writes, so sound is as
late as the picture and the two stay together.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

RATE = 48000
"""Samples a second."""

CHANNELS = 2

MOST_S = 10.0
"""Sound that may wait for a sink's picture; older sound is dropped."""

TOLERANCE_S = 0.02
"""How far timestamps may be off before silence is put in or sound is cut."""

LAG_S = 0.5
"""A source that gives no sound for so long is taken to be silent."""

Samples = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of sound.

    Attributes:
        time_s: when it begins, in the time of the pictures.
        samples: shape (2, n), float32, -1..1, on the CPU.
    """

    time_s: float
    samples: Samples

    @property
    def end_s(self) -> float:
        """When it ends."""
        return self.time_s + int(self.samples.shape[1]) / RATE


class AudioReader:
    """What one sink has not taken yet."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._lock = threading.Lock()
        self.dropped_s = 0.0

    def put(self, chunk: Chunk) -> None:
        """Queue a chunk; what waits too long is dropped and counted."""
        with self._lock:
            self._chunks.append(chunk)
            while self._chunks[-1].end_s - self._chunks[0].time_s > MOST_S:
                gone = self._chunks.popleft()
                self.dropped_s += gone.samples.shape[1] / RATE

    def take(self, until_s: float) -> list[Chunk]:
        """Return the chunks that begin before a time."""
        taken = []
        with self._lock:
            while self._chunks and self._chunks[0].time_s < until_s:
                taken.append(self._chunks.popleft())
        return taken


class AudioHub:
    """Hands a source's sound to every sink that asked."""

    def __init__(self) -> None:
        self._readers: list[AudioReader] = []
        self._lock = threading.Lock()

    def subscribe(self) -> AudioReader:
        """Return a reader that gets all sound from now on."""
        reader = AudioReader()
        with self._lock:
            self._readers.append(reader)
        return reader

    def put(self, chunk: Chunk) -> None:
        """Give a chunk to every reader. Never waits."""
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.put(chunk)


class Track:
    """Makes chunks one unbroken run of samples that keeps to its timestamps.

    Args:
        start_s: time of the first sample to come out; earlier sound is cut.

    The first sound begins exactly where it belongs. Later gaps are filled with silence and
    overlaps are cut; differences of up to `TOLERANCE_S` are left as they are.
    """

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.samples = 0

    @property
    def end_s(self) -> float:
        """Time of the next sample."""
        return self.start_s + self.samples / RATE

    def add(self, chunk: Chunk) -> list[Samples]:
        """Return the samples to write for a chunk, silence before it included."""
        parts = []
        gap_s = chunk.time_s - self.end_s
        samples = chunk.samples
        # What is off at the start stays off; later, timestamps wander about the truth.
        tolerance_s = TOLERANCE_S if self.samples else 0.0
        if gap_s > tolerance_s:
            parts.append(silence(gap_s))
        elif gap_s < -tolerance_s:
            samples = samples[:, round(-gap_s * RATE) :]
        parts.append(samples)
        # An encoder cannot take a part of no samples.
        parts = [part for part in parts if part.shape[1]]
        self.samples += sum(p.shape[1] for p in parts)
        return parts

    def fill(self, time_s: float) -> list[Samples]:
        """Return silence up to `LAG_S` before a time, for a source that has gone quiet."""
        gap_s = time_s - LAG_S - self.end_s
        if gap_s <= LAG_S:
            return []
        part = silence(gap_s)
        self.samples += part.shape[1]
        return [part]


def silence(seconds: float) -> Samples:
    """Return zeros, shape (2, n)."""
    return np.zeros((CHANNELS, round(seconds * RATE)), np.float32)
