"""Peak memory of `vidpipe run` on a short clip, and on the same clip looped 30 times."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av

FRAMES, LOOPS = 60, 30


def _looped(clip: Path, path: Path, loops: int) -> None:
    """Write the clip's first frames, `loops` times, at a quarter of a million pixels at most."""
    with av.open(str(clip)) as source:
        video = source.streams.video[0]
        scale = min(1.0, 320 / video.width)
        width, height = (int(n * scale) // 2 * 2 for n in (video.width, video.height))
        frames = []
        for frame in source.decode(video):
            frames.append(frame.reformat(width, height, "yuv420p"))
            if len(frames) == FRAMES:
                break
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(FRAMES * loops):
            frame = frames[index % len(frames)]
            frame.pts, frame.time_base = index, Fraction(1, 25)
            frame.pict_type = 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _peak_mb(source: Path, destination: Path, model: str) -> float:
    """Return the peak resident memory of one run, in MB."""
    if sys.platform == "win32":
        raise SystemExit("this benchmark needs a POSIX system")
    arguments = ["run", str(source), str(destination), "--model", model, "--overwrite", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vidpipe", *arguments],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"vidpipe run ended with {process.returncode}")
    return usage.ru_maxrss / 1024


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return peaks in MB and their ratio; medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        short, long, out = (Path(folder) / name for name in ("s.mp4", "l.mp4", "o.mp4"))
        _looped(clip, short, 1)
        _looped(clip, long, LOOPS)
        peaks: dict[int, list[float]] = {1: [], LOOPS: []}
        for _ in range(rounds):
            for loops, source in ((1, short), (LOOPS, long)):
                peaks[loops].append(_peak_mb(source, out, model))
                with av.open(str(out)) as written:
                    frames = sum(1 for p in written.demux(video=0) if p.size)
                if frames != FRAMES * loops:
                    raise RuntimeError(f"{frames} frames came out of {FRAMES * loops}")
    one, many = median(peaks[1]), median(peaks[LOOPS])
    return {
        "short_frames": FRAMES,
        "long_frames": FRAMES * LOOPS,
        "short_peak_mb": one,
        "long_peak_mb": many,
        "ratio": many / one,
    }
