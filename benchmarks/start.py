"""Time from the command to the first frame written, and to the end of a run of one frame.

Python keeps bytecode in a folder of this benchmark's own, as it does beside an installed package;
the round that is not counted fills it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import av


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return seconds; medians over the rounds, after one warm-up round.

    `command_to_first_frame_s` is the whole time less that from the first frame to the end of
    the run; the end of the process is in it, so it is an upper bound.
    """
    commands: list[float] = []
    totals: list[float] = []
    firsts: list[float] = []
    with av.open(str(clip)) as source:
        frame_s = 1 / float(source.streams.video[0].average_rate or 25)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "o.mkv"
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for round_ in range(rounds + 1):
            arguments = ["run", str(clip), str(out), "--model", model, "--overwrite", "--json"]
            begin_s = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "vidpipe", *arguments, "--duration", str(frame_s / 2)],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            )
            total_s = time.perf_counter() - begin_s
            report = json.loads(done.stdout.splitlines()[-1])
            with av.open(str(out)) as written:
                if sum(1 for _ in written.decode(video=0)) != 1:
                    raise RuntimeError("not one frame came out")
            if round_:
                totals.append(total_s)
                firsts.append(report["first_frame_s"])
                commands.append(total_s - (report["wall_s"] - report["first_frame_s"]))
    return {
        "command_to_first_frame_s": median(commands),
        "command_to_end_s": median(totals),
        "start_to_first_frame_s": median(firsts),
    }
