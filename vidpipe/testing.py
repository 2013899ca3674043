"""Parts for tests of graphs and stages: frames without files, and time without waiting."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.stage import FrameSource, Sink, Stage


def spec(width: int = 64, height: int = 48, name: str = "yuv420p", rate: int = 25) -> FrameSpec:
    """Return a small FrameSpec with one tick a frame."""
    return FrameSpec(
        width=width,
        height=height,
        format=pixel_format(name),
        time_base=Fraction(1, rate),
        rate=Fraction(rate),
    )


def pattern(spec: FrameSpec, pts: int = 0) -> Frame:
    """Return a frame of noise that depends only on `pts`; every code value occurs.

    Planes are contiguous NumPy arrays of the format's shapes and dtype.
    """
    random = np.random.default_rng(pts)
    planes = []
    for shape in spec.plane_shapes():
        codes = random.integers(0, 1 << spec.format.bits, shape, dtype=np.uint16)
        planes.append((codes << spec.format.shift).astype(spec.format.dtype))
    return Frame(tuple(planes), spec, pts, duration=1)


def patterns(count: int, first: FrameSpec | None = None) -> FrameSource:
    """Return a source of `count` noise frames, made one at a time."""
    first = first or spec()
    return FrameSource(first, (pattern(first, pts) for pts in range(count)))


class Collect(Sink):
    """Keeps every frame it gets in `frames`."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.specs: list[FrameSpec] = []
        self.finished = False
        self.closed = 0

    def plan(self, spec: FrameSpec) -> None:
        """Take anything."""
        self.specs.append(spec)

    def write(self, frame: Frame) -> None:
        """Keep the frame."""
        self.frames.append(frame)

    def finish(self) -> None:
        """Note that the stream ended well."""
        self.finished = True

    def close(self) -> None:
        """Count the calls."""
        self.closed += 1


class Identity(Stage):
    """Gives every frame back as it is."""

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return the same spec."""
        return spec

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Return the same frame."""
        return (frame,)


class ManualClock:
    """A clock that moves only when told."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        """Return the time that was set."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now_s += seconds
