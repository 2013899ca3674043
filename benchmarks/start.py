"""Time from the command to the end of a run of one frame: an upper bound of the first frame."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import av


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return seconds; medians over the rounds, after one warm-up round."""
    totals, firsts = [], []
    with av.open(str(clip)) as source:
        frame_s = 1 / float(source.streams.video[0].average_rate or 25)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "o.mkv"
        for round_ in range(rounds + 1):
            arguments = ["run", str(clip), str(out), "--model", model, "--overwrite", "--json"]
            begin_s = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "vidpipe", *arguments, "--duration", str(frame_s / 2)],
                check=True,
                capture_output=True,
                text=True,
            )
            total_s = time.perf_counter() - begin_s
            report = json.loads(done.stdout.splitlines()[-1])
            with av.open(str(out)) as written:
                if sum(1 for _ in written.decode(video=0)) != 1:
                    raise RuntimeError("not one frame came out")
            if round_:
                totals.append(total_s)
                firsts.append(report["first_frame_s"])
    return {"command_to_end_s": median(totals), "start_to_first_frame_s": median(firsts)}
