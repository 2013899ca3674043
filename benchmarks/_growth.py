"""What grew while something ran, and whether figures keep their limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

FLAT_MIB = 4.0
"""Memory that has grown by less than this, or by `FLAT_PART` of all, is flat."""

FLAT_PART = 0.02


def at_most(value: float, most: float) -> dict[str, Any]:
    """Return a figure with its limit, and whether it keeps it."""
    return {"value": round(value, 4), "at_most": round(most, 4), "ok": bool(value <= most)}


class Growth:
    """Memory, threads and descriptors of this process over time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start_s = time.perf_counter()
        self._cpu_s = self._used_s()
        self.rows: list[tuple[float, float, int, int]] = []

    def _used_s(self) -> float:
        used = self._process.cpu_times()
        return float(used.user + used.system)

    def note(self) -> dict[str, Any]:
        """Take a row; return it, with the processors that were busy since the start."""
        process = self._process
        elapsed_s = time.perf_counter() - self._start_s
        row = (
            elapsed_s,
            process.memory_info().rss / 2**20,
            process.num_threads(),
            process.num_fds() if hasattr(process, "num_fds") else 0,
        )
        self.rows.append(row)
        return {
            "elapsed_s": round(elapsed_s, 2),
            "memory_mib": round(row[1], 2),
            "threads": row[2],
            "descriptors": row[3],
            "processors_busy": round((self._used_s() - self._cpu_s) / max(elapsed_s, 1e-9), 3),
        }

    def figures(self) -> dict[str, Any]:
        """Return what grew after the first third, which is left for everything to settle."""
        rows = self.rows[len(self.rows) // 3 :]
        if len(rows) < 2:
            return {}
        times, memory, threads, descriptors = zip(*rows, strict=True)
        return {
            "memory_at_a_third_mib": memory[0],
            "memory_at_the_end_mib": memory[-1],
            "memory_growth_mib": memory[-1] - memory[0],
            "memory_slope_mib_an_hour": float(np.polyfit(times, memory, 1)[0]) * 3600,
            "thread_growth": threads[-1] - threads[0],
            "descriptor_growth": descriptors[-1] - descriptors[0],
        }

    def verdicts(self) -> dict[str, Any]:
        """Return whether memory, threads and descriptors stayed as they were."""
        figures = self.figures()
        if not figures:
            return {}
        flat_mib = max(FLAT_MIB, FLAT_PART * figures["memory_at_a_third_mib"])
        return {
            "memory_growth_mib": at_most(figures["memory_growth_mib"], flat_mib),
            "thread_growth": at_most(figures["thread_growth"], 0),
            "descriptor_growth": at_most(figures["descriptor_growth"], 0),
        }

    def chart(self) -> str:
        """Return an SVG picture of all rows."""
        times, *columns = ([*column] for column in zip(*self.rows, strict=True))
        names = ("memory, MiB", "threads", "descriptors")
        return drawn_chart(times, dict(zip(names, columns, strict=True)))


def drawn_chart(times: Sequence[float], curves: dict[str, list[float]]) -> str:
    """Return an SVG picture with one panel for each curve, all over the same time."""
    width, height, left, gap = 900, 150, 70, 40
    parts = []
    for number, (name, values) in enumerate(curves.items()):
        top = 30 + number * (height + gap)
        most = max(max(values) * 1.1, 1)
        points = " ".join(
            f"{left + (width - left - 10) * t / max(times[-1], 1e-9):.1f},"
            f"{top + height * (1 - v / most):.1f}"
            for t, v in zip(times, values, strict=True)
        )
        parts.append(f'<text x="{left}" y="{top - 8}">{name}: {values[-1]:.6g} at the end</text>')
        for part in (0, 0.5, 1):
            y = top + height * (1 - part)
            parts.append(f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#ccc"/>')
            parts.append(
                f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * part:.4g}</text>'
            )
        parts.append(f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>')
    bottom = 30 + len(curves) * (height + gap)
    for part in (0, 0.25, 0.5, 0.75, 1):
        x = left + (width - left - 10) * part
        parts.append(
            f'<text x="{x:.0f}" y="{bottom - 14}" text-anchor="middle">'
            f"{times[-1] * part:.0f} s</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 10}" height="{bottom}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )
