"""The live filter: latency, drops, overload and growth, read back from the pictures themselves.

A source draws its frame number and the time of capture into the picture as black and white
cells. The sink reads both back after the model, checks the number, and takes the latency from
the time: what is measured went through everything that a picture goes through.

VIDPIPE_LIVE_S is how long each part runs, 10 s by default: 600 for ten minutes.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vidpipe.clock import MonotonicClock
from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.graph import Graph
from vidpipe.live.capture import Frames
from vidpipe.live.meter import percentile
from vidpipe.live.outputs import Callback
from vidpipe.live.session import Live

WIDTH, HEIGHT = 640, 360
CELL = 16  # pixels; survives a network that sharpens or smooths
BITS = 32


def draw(luma: np.ndarray[Any, Any], row: int, value: int) -> None:
    """Draw 32 bits as cells, most significant first.

    Args:
        luma: shape (h, w), uint8.
        row: which row of cells.
        value: 0 to 2^32 - 1.
    """
    bits = (value >> np.arange(BITS)[::-1]) & 1
    cells = np.repeat(np.where(bits, 235, 16).astype(np.uint8), CELL)
    luma[row * CELL : (row + 1) * CELL, : BITS * CELL] = cells


def read(luma: np.ndarray[Any, Any], row: int, scale: int) -> int:
    """Return what `draw` drew, from a picture `scale` times as large."""
    cell = CELL * scale
    middle = luma[row * cell + cell // 2, cell // 2 : BITS * cell : cell]
    if ((middle > 90) & (middle < 160)).any():
        raise RuntimeError("the cells of the picture cannot be read")
    return int(sum(int(bit) << (BITS - 1 - n) for n, bit in enumerate(middle > 125)))


class Drawn:
    """Pictures at a constant rate, each with its number and its time in it.

    Args:
        rate: frames per second.
        seconds: how long.
    """

    def __init__(self, rate: int, seconds: float) -> None:
        self.clock = MonotonicClock()
        self.begin_s = self.clock.now_s()
        self.rate = rate
        self.count = round(rate * seconds)
        self.late_s = 0.0
        self.go = threading.Event()
        self.spec = FrameSpec(
            width=WIDTH,
            height=HEIGHT,
            format=pixel_format("yuv420p"),
            time_base=Fraction(1, 90000),
            rate=Fraction(rate),
        )
        # A still picture with some texture: what is drawn into it changes, nothing else.
        ramp = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) % 200 + 20
        self._luma = ramp.astype(np.uint8)
        self._chroma = np.full((HEIGHT // 2, WIDTH // 2), 128, np.uint8)

    def __iter__(self) -> Iterator[Frame]:
        self.go.wait()
        start_s = self.clock.now_s()
        for number in range(self.count):
            due_s = start_s + number / self.rate
            time.sleep(max(0.0, due_s - self.clock.now_s()))
            now_s = self.clock.now_s()
            self.late_s = max(self.late_s, now_s - due_s)
            luma = self._luma.copy()
            draw(luma, 0, number)
            draw(luma, 1, round((now_s - self.begin_s) * 1e6))
            planes = (luma, self._chroma, self._chroma)
            yield Frame(planes, self.spec, round(number * 90000 / self.rate), captured_s=now_s)


def play(rate: int, seconds: float, budget_s: float, **options: Any) -> dict[str, Any]:
    """Run the filter and return what the pictures say.

    Args:
        rate: of the source, frames per second.
        seconds: how long.
        budget_s: latency budget.
        options: of the enhance stage.
    """
    source = Drawn(rate, seconds)
    latencies: list[float] = []
    numbers: list[int] = []
    scale = 2

    def take(frame: Frame) -> None:
        now_s = source.clock.now_s()
        luma = frame.planes[0]
        numbers.append(read(luma, 0, scale))
        latencies.append(now_s - source.begin_s - read(luma, 1, scale) / 1e6)

    graph = Graph().add("in", Frames(source.spec, source))
    graph.add("enhance", "enhance", "in", latency_budget_s=budget_s, **options)
    graph.add("out", Callback(take), "enhance")
    live = Live(graph)
    live.start()
    stage = live.filters["enhance"]
    while stage.governor is None:
        time.sleep(0.05)
    process = psutil.Process()
    source.go.set()
    memory, threads, files = [], [], []
    while not live.wait(0.5):
        memory.append(process.memory_info().rss)
        threads.append(process.num_threads())
        files.append(process.num_fds() if hasattr(process, "num_fds") else 0)
    live.pipeline.report()
    if numbers != sorted(set(numbers)) or not numbers:
        raise RuntimeError("frames came out of order, twice or not at all")
    counted = sum(s.dropped for s in live.pipeline.progress())
    if len(numbers) + counted != source.count:
        raise RuntimeError(f"{len(numbers)} out and {counted} dropped are not {source.count}")
    settled = len(memory) // 3
    return {
        "frames": len(numbers),
        "drops": counted,
        "latency_p50_ms": 1000 * statistics.median(latencies),
        "latency_p99_ms": 1000 * percentile(latencies, 99),
        "latency_max_ms": 1000 * max(latencies),
        "tier_at_the_end": stage.tier,
        "tier_changes": stage.report()["steps"],
        "source_late_max_ms": 1000 * source.late_s,
        "memory_growth_mib": (memory[-1] - memory[settled]) / 2**20 if memory else 0.0,
        "thread_growth": threads[-1] - threads[settled] if threads else 0,
        "descriptor_growth": files[-1] - files[settled] if files else 0,
    }


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return the figures of four runs; the clip and the rounds are not used."""
    del clip, rounds
    seconds = float(os.environ.get("VIDPIPE_LIVE_S", "10"))
    figures: dict[str, Any] = {
        "processors": psutil.cpu_count(),
        "load_before": psutil.getloadavg()[0],
        "seconds": seconds,
    }
    parts = {
        f"{model}_30fps": play(30, seconds, 1.0, tiers=[model], tier=model),
        "governed_30fps": play(30, seconds, 0.1, tiers=[model]),
        "overload_x3": play(90, seconds, 0.1, tiers=[model], tier=model),
        "overload_x3_governed": play(90, seconds, 0.1, tiers=[model]),
    }
    for name, part in parts.items():
        figures |= {f"{name}.{key}": value for key, value in part.items()}
    return figures
