"""The live filter: latency, drops, overload and growth, read back from the pictures themselves.

A source draws its frame number and the time of capture into the picture as black and white
cells. The sink reads both back after the model, checks the number, and takes the latency from
the time: what is measured went through everything that a picture goes through.

VIDPIPE_LIVE_S is how long each part runs, 10 s by default. Parts by themselves, with --model,
--precision and --device:

    python -m benchmarks.live --play 600                     latency, drops, overload
    python -m benchmarks.live --soak 1800 --chart soak.svg   memory, threads, descriptors
    python -m benchmarks.live --outage 10                    a source that goes away and is back
    python -m benchmarks.live --toggle 60                    controls changed while it runs
    python -m benchmarks.live --shares 5                     processor time beside the model's
    python -m benchmarks.live --gpu 20 --model fast-2x       latency of 1080p60 through a GPU

Each prints JSON. `verdicts` holds every figure that has a limit, the limit, and whether it is kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from benchmarks._growth import Growth, at_most
from vidpipe.clock import MonotonicClock
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.errors import VidpipeError
from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.graph import Graph
from vidpipe.live.capture import Frames
from vidpipe.live.enhance import PLAIN
from vidpipe.live.meter import percentile
from vidpipe.live.outputs import Callback
from vidpipe.live.page import on_host
from vidpipe.live.session import Live
from vidpipe.pipeline import Pipeline

Models = dict[str, Any]
"""Options that the enhance stages of all parts get: `device` and `precision`."""

LATENCY_MS = 100.0
LATENCY_GPU_MS = 12.0
RECOVERY_S = 2.0
LATE_FRAME_TIMES = 2.0

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


def play(
    rate: int, seconds: float, budget_s: float, *, all_frames: bool = False, **options: Any
) -> dict[str, Any]:
    """Run the filter and return what the pictures say.

    Args:
        rate: of the source, frames per second.
        seconds: how long.
        budget_s: latency budget.
        all_frames: none may be dropped.
        options: of the enhance stage.
    """
    source = Drawn(rate, seconds)
    latencies, numbers = array("d"), array("q")  # lists would grow eight times as much
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
    until_warm(live)
    grown = Growth()
    source.go.set()
    while not live.wait(0.5):
        grown.note()
    live.pipeline.report()
    if list(numbers) != sorted(set(numbers)) or not numbers:
        raise RuntimeError("frames came out of order, twice or not at all")
    counted = sum(s.dropped for s in live.pipeline.progress())
    if len(numbers) + counted != source.count:
        raise RuntimeError(f"{len(numbers)} out and {counted} dropped are not {source.count}")
    p99_ms = 1000 * percentile(latencies, 99)
    verdicts = {"latency_p99_ms": at_most(p99_ms, min(LATENCY_MS, 1000 * budget_s))}
    if all_frames:
        verdicts["drops"] = at_most(counted, 0)
    work = next(s for s in live.pipeline.progress() if s.name == "enhance")
    return {
        "rate": rate,
        "enhance_alone_fps": work.fps,
        "frames": len(numbers),
        "drops": counted,
        "latency_p50_ms": 1000 * statistics.median(latencies),
        "latency_p99_ms": p99_ms,
        "latency_max_ms": 1000 * max(latencies),
        "tier_at_the_end": stage.tier,
        "ran_on": stage.provider(),
        "models": stage.report()["models"],
        "tier_changes": stage.report()["steps"],
        "source_late_max_ms": 1000 * source.late_s,
        **grown.figures(),
        "verdicts": verdicts | grown.verdicts(),
    }


class Controller:
    """Changes controls one after the other while a filter runs, and notes when frames come out.

    Args:
        tiers: the models to change between; there is plain scaling, too.
        every_s: a change comes every so often.
    """

    def __init__(self, tiers: Sequence[str], every_s: float = 0.5) -> None:
        self.changes: list[dict[str, Any]] = [
            {"enabled": False}, {"enabled": True}, {"tier": "scale"}, {"tier": tiers[-1]},
            {"tier": tiers[0]}, {"wipe": 0.5}, {"wipe": None}, {"strength": 0.5},
            {"strength": 1.0}, {"frozen": True}, {"frozen": False},
        ]  # fmt: skip
        self.every_s = every_s
        self.done = 0
        self.times: list[tuple[float, dict[str, Any]]] = []

    def run(self, live: Live, ended: threading.Event) -> None:
        """Go on until told to stop."""
        while not ended.wait(self.every_s):
            change = self.changes[self.done % len(self.changes)]
            self.times.append((live.clock.now_s(), change))
            live.control(change)
            self.done += 1

    def before(self, time_s: float) -> str:
        """Return the last change before a time of the filter's clock."""
        return str(next((c for at_s, c in reversed(self.times) if at_s <= time_s), None))


def toggle(model: str, seconds: float, models: Models, rate: int = 30) -> dict[str, Any]:
    """Return the worst gaps between frames in frame times, without and with changes of controls.

    A second model is among the tiers, so that changes go from one session to another, too.
    """
    figures: dict[str, Any] = {}
    tiers = [model, "clean-2x-nano" if model == "nano-2x" else "nano-2x"]
    for name in ("undisturbed", "changed"):
        source, arrivals = Drawn(rate, seconds), list[tuple[float, float]]()
        clock = source.clock
        graph = Graph().add("in", Frames(source.spec, source))
        graph.add(
            "enhance", "enhance", "in", latency_budget_s=1.0, tiers=tiers, tier=model, **models
        )
        # What is late is the way through the filter; the source's own lateness is not its doing.
        take = Callback(lambda f, a=arrivals, c=clock: a.append((f.captured_s, c.now_s())))  # type: ignore[misc]
        graph.add("out", take, "enhance")
        live, ended, controller = Live(graph), threading.Event(), Controller(tiers)
        live.start()
        until_warm(live)
        source.go.set()
        thread = threading.Thread(target=controller.run, args=(live, ended))
        if name == "changed":
            thread.start()
        while not live.wait(0.1):
            pass
        ended.set()
        if thread.is_alive():
            thread.join()
        gaps = [(b[1] - a[1]) * rate for a, b in itertools.pairwise(arrivals)]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        late = [(done - captured) * rate for captured, done in arrivals]
        figures |= {
            f"{name}.frames": len(arrivals),
            f"{name}.changes": controller.done,
            f"{name}.drops": source.count - len(arrivals),
            f"{name}.worst_gap_in_frame_times": gaps[worst],
            f"{name}.worst_gap_after": controller.before(arrivals[worst + 1][1]),
            f"{name}.p99_gap_in_frame_times": percentile(gaps, 99),
            f"{name}.worst_latency_in_frame_times": max(late),
            f"{name}.source_late_max_in_frame_times": source.late_s * rate,
            f"{name}.source_worst_gap_in_frame_times": max(
                (b[0] - a[0]) * rate for a, b in itertools.pairwise(arrivals)
            ),
        }
    figures["verdicts"] = {
        f"changed.{key}_in_frame_times": at_most(
            figures[f"changed.{key}_in_frame_times"], LATE_FRAME_TIMES
        )
        for key in ("worst_gap", "worst_latency")
    }
    return figures


def until_warm(live: Live) -> None:
    """Wait until every tier is open."""
    while any(f.governor is None for f in live.filters.values()):
        time.sleep(0.05)


def send(url: str) -> None:
    """Send drawn pictures with their time, in another process, until killed.

    Args:
        url: udp://HOST:PORT, or tcp://HOST:PORT?listen to serve who connects.
    """
    options = {"flush_packets": "1", "omit_video_pes_length": "0"}
    print("back", flush=True)
    with av.open(url, "w", format="mpegts", container_options=options) as out:
        stream: Any = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.options = {"preset": "ultrafast", "tune": "zerolatency", "g": "60"}
        planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        start_s = time.perf_counter()
        for number in itertools.count():
            time.sleep(max(0.0, start_s + number / 30 - time.perf_counter()))
            draw(planes, 0, number)
            # Milliseconds of the machine's monotonic clock, which all its processes share.
            draw(planes, 1, round(time.perf_counter() * 1000) & 0xFFFFFFFF)
            picture = av.VideoFrame.from_ndarray(planes, "yuv420p")
            picture.pts = number
            for packet in stream.encode(picture):
                out.mux_one(packet)


def outage(model: str, seconds: float, models: Models) -> dict[str, Any]:
    """Return how soon a source is shown again, for UDP and for a TCP server.

    It is away for some seconds. It is back when it sends, or listens for who connects.
    """
    figures: dict[str, Any] = {"outage_s": seconds, "verdicts": {}}
    scale = 1 if model == PLAIN else 2
    for scheme in ("udp", "tcp"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"{scheme}://127.0.0.1:{port}"
        command = [sys.executable, "-m", "benchmarks.live", "--send"]
        command.append(f"{address}?listen" if scheme == "tcp" else f"{address}?pkt_size=1316")
        fresh: list[tuple[float, float]] = []  # (drawn, arrived) of pictures not seen before

        def take(frame: Frame, fresh: list[tuple[float, float]] = fresh) -> None:
            now_s = time.perf_counter()
            drawn_s = read(frame.planes[0], 1, scale) / 1000
            if not fresh or drawn_s > fresh[-1][0]:
                fresh.append((drawn_s, now_s))

        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        live = None
        while live is None:
            graph = Graph().add("in", "capture", address=address)
            options = {
                "tiers": [model],
                "tier": model,
                "latency_budget_s": LATENCY_MS / 1000,
                **models,
            }
            graph.add("enhance", "enhance", "in", **options)
            graph.add("out", Callback(take), "enhance")
            try:
                live = Live(graph)
                live.start()
            except VidpipeError:  # not there yet
                live = None
        wait_for(lambda fresh=fresh: len(fresh) > 60, live)  # type: ignore[misc]
        process.kill()
        process.wait()
        gone_s = time.perf_counter()
        live.wait(seconds)
        repeated = live.sources["in"].repeated
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        back_s = time.perf_counter()
        wait_for(lambda gone_s=gone_s, fresh=fresh: fresh[-1][0] > gone_s, live)  # type: ignore[misc]
        first = next(f for f in fresh if f[0] > gone_s)
        live.wait(2)
        recovered_s = first[1] - back_s
        figures["verdicts"][f"{scheme}.recovered_after_s"] = at_most(recovered_s, RECOVERY_S)
        steady = [b - a for a, b in fresh if a > first[0] + 1]
        process.kill()
        process.wait()
        events = [e["state"] for e in live.events() if e["event"] == "source"]
        live.stop()
        figures |= {
            f"{scheme}.shown_again_meanwhile": repeated,
            f"{scheme}.recovered_after_s": recovered_s,
            f"{scheme}.events": " ".join(events),
            f"{scheme}.latency_p50_ms": 1000 * statistics.median(steady),
            f"{scheme}.latency_p99_ms": 1000 * percentile(steady, 99),
        }
    return figures


def wait_for(condition: Callable[[], bool], live: Live, patience_s: float = 30.0) -> None:
    """Wait for something while a filter runs."""
    end_s = time.perf_counter() + patience_s
    while not condition():
        live.wait(0.02)
        if time.perf_counter() > end_s:
            raise RuntimeError(f"it did not happen: {live.state()}")


def shares(clip: Path, model: str, seconds: float, models: Models) -> dict[str, Any]:
    """Return the processor time of each part, per frame, and as a part of a frame's time."""
    frames = {"use": "stream", "url": "udp://127.0.0.1:9", "audio": True}
    parts: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
        "source": ([], []),
        "stream_ultrafast": ([], [{**frames, "preset": "ultrafast"}]),
        "stream_superfast": ([], [{**frames, "preset": "superfast"}]),
        "model": ([model], []),
        "model_and_page_unwatched": ([model], [{"use": "page"}]),
        "all": ([model], [{**frames, "preset": "superfast"}, {"use": "page"}]),
    }
    figures: dict[str, Any] = {"processors": psutil.cpu_count()}
    process = psutil.Process()
    for name, (tiers, sinks) in parts.items():
        count = [0]
        graph = Graph().add("in", "capture", address=str(clip))
        options = {"tiers": tiers, "tier": tiers[0] if tiers else PLAIN, "latency_budget_s": 5.0}
        graph.add("enhance", "enhance", "in", **options, **models)

        def take(_frame: Frame, count: list[int] = count) -> None:
            count[0] += 1

        graph.add("out", Callback(take), "enhance")
        for number, sink in enumerate(sinks):
            graph.add(
                f"sink{number}",
                sink["use"],
                "enhance",
                **{k: v for k, v in sink.items() if k != "use"},
            )
        live = Live(graph)
        live.start()
        until_warm(live)
        wait_for(lambda count=count: count[0] > 5, live)  # type: ignore[misc]
        before, frames_before = process.cpu_times(), count[0]
        live.wait(seconds)
        after, done = process.cpu_times(), count[0] - frames_before
        live.stop()
        used_s = after.user + after.system - before.user - before.system
        figures[f"{name}.processor_ms_a_frame"] = 1000 * used_s / max(done, 1)
        figures[f"{name}.part_of_the_machine"] = used_s / seconds / (psutil.cpu_count() or 1)
    return figures


def soak(
    model: str, seconds: float, chart: Path, models: Models, sinks: Sequence[str], rate: int = 30
) -> dict[str, Any]:
    """Run for long with a model and several sinks; draw and return what grew.

    Args:
        model: the tier.
        seconds: how long; the first third is left for everything to settle.
        chart: the SVG file to write. Beside it, in .jsonl, every row is written as it comes.
        models: options of the enhance stage.
        sinks: besides a callback that reads every picture: "stream", "page" (watched).
        rate: frames per second.
    """
    source, seen = Drawn(rate, seconds), [0, -1]

    def take(frame: Frame) -> None:
        number = read(frame.planes[0], 0, 2)
        if number <= seen[1]:
            raise RuntimeError("a frame came twice or out of order")
        seen[0], seen[1] = seen[0] + 1, number

    graph = Graph().add("in", Frames(source.spec, source))
    options = {"tiers": [model], "tier": model, "latency_budget_s": LATENCY_MS / 1000, **models}
    graph.add("enhance", "enhance", "in", **options)
    graph.add("out", Callback(take), "enhance")
    if "stream" in sinks:
        graph.add("stream", "stream", "enhance", url="udp://127.0.0.1:9", preset="ultrafast")
    if "page" in sinks:
        graph.add("page", "page", "enhance")
    live = Live(graph)
    live.start()
    until_warm(live)
    for page in live.pages.values():
        page.watch(lambda _picture: None)
    grown, worst_ms = Growth(), 0.0
    source.go.set()
    with chart.with_suffix(".jsonl").open("w", buffering=1) as rows:
        while not live.wait(max(0.5, seconds / 600)):
            state = live.state()
            p99_ms = state["sinks"]["out"]["p99_ms"]
            worst_ms = max(worst_ms, p99_ms or 0.0)
            row = {"frames": seen[0], "drops": dropped(live), "p99_ms": p99_ms}
            rows.write(json.dumps(grown.note() | row) + "\n")
    live.pipeline.report()
    gc.collect()
    chart.write_text(grown.chart())
    drops = dropped(live)
    return {
        "seconds": seconds,
        "frames": seen[0],
        "expected_frames": source.count,
        "drops": drops,
        "latency_p99_of_the_worst_10_s_ms": worst_ms,
        "source_late_max_ms": 1000 * source.late_s,
        "ran_on": live.filters["enhance"].provider(),
        "models": live.filters["enhance"].report()["models"],
        **grown.figures(),
        "chart": str(chart),
        "verdicts": {
            "drops": at_most(sum(drops.values()), 0),
            "latency_p99_of_the_worst_10_s_ms": at_most(worst_ms, LATENCY_MS),
            **grown.verdicts(),
        },
    }


def dropped(live: Live) -> dict[str, int]:
    """Return the frames dropped on the way to each stage, save for the page, which may."""
    return {s.name: s.dropped for s in live.pipeline.progress() if s.dropped and s.name != "page"}


class Stills:
    """Eight numbered 8-bit 4:2:0 pictures in turns, at a constant rate, ready beforehand.

    Args:
        width, height: pixels.
        rate: frames per second.
        seconds: how long.
        device: where the pictures are.
    """

    COUNT = 8

    def __init__(
        self, width: int, height: int, rate: int, seconds: float, device: Device = CPU
    ) -> None:
        self.clock = MonotonicClock()
        self.count = round(rate * seconds)
        self.late_s = 0.0
        self.spec = FrameSpec(
            width=width,
            height=height,
            format=pixel_format("yuv420p"),
            time_base=Fraction(1, rate),
            rate=Fraction(rate),
            device=device,
        )
        ramp = np.add.outer(np.arange(height), np.arange(width)) % 200 + 20
        chroma = np.full((height // 2, width // 2), 128, np.uint8)
        self._pictures: list[tuple[Any, ...]] = []
        for number in range(self.COUNT):
            luma = ramp.astype(np.uint8)
            draw(luma, 0, number)
            self._pictures.append((luma, chroma, chroma))
        if device != CPU:
            cupy = import_cupy(device)
            self._pictures = [tuple(map(cupy.asarray, planes)) for planes in self._pictures]
            cupy.cuda.Device(device.index).synchronize()

    def __iter__(self) -> Iterator[Frame]:
        start_s = self.clock.now_s()
        for number in range(self.count):
            due_s = start_s + number / self.spec.time_base.denominator
            time.sleep(max(0.0, due_s - self.clock.now_s()))
            now_s = self.clock.now_s()
            self.late_s = max(self.late_s, now_s - due_s)
            planes = self._pictures[number % self.COUNT]
            yield Frame(planes, self.spec, number, captured_s=now_s)


def gpu(
    model: str, seconds: float, width: int = 1920, height: int = 1080, rate: int = 60
) -> dict[str, Any]:
    """Return the latency of frames through a model on a GPU, from hand-in to ready result.

    Args:
        model: enlarges two times.
        seconds: of each of the six runs: the model stage by itself and the enhance stage, from
            host to device, device to device and host to host.
        width, height, rate: of the source.
    """
    stages: dict[str, dict[str, Any]] = {
        "model": {"model": model, "device": "cuda"},
        "enhance": {"tiers": [model], "tier": model, "latency_budget_s": 1.0, "device": "cuda"},
    }
    cases = {
        "host_to_device": (CPU, False),
        "device_to_device": (Device("cuda"), False),
        "host_to_host": (CPU, True),
    }
    figures: dict[str, Any] = {"processors": psutil.cpu_count(), "size": f"{width}x{height}"}
    verdicts = figures["verdicts"] = {}
    for (use, options), (case, (device, down)) in itertools.product(stages.items(), cases.items()):
        source = Stills(width, height, rate, seconds, device)
        latencies, numbers, last = array("d"), array("q"), list[Frame]()

        def take(
            frame: Frame,
            source: Stills = source,
            latencies: array[float] = latencies,
            numbers: array[int] = numbers,
            last: list[Frame] = last,
        ) -> None:
            frame.synchronize()
            latencies.append(source.clock.now_s() - frame.captured_s)
            numbers.append(frame.pts)
            last[:] = [frame]

        graph = Graph().add("in", Frames(source.spec, source)).add("work", use, "in", **options)
        if down:
            graph.add("down", "transfer", "work", device="cpu")
        graph.add("out", Callback(take), "down" if down else "work")
        pipeline = Pipeline(graph, capacity=1)
        report = pipeline.run()
        drops = sum(stage.dropped for stage in report.stages)
        if report.problems or len(numbers) + drops != source.count:
            raise RuntimeError(f"{len(numbers)} out, {drops} dropped: {report.problems}")
        if read(on_host(last[0])[0], 0, 2) != last[0].pts % source.COUNT:
            raise RuntimeError("the last picture is not the one that went in")
        p99_ms = 1000 * percentile(latencies, 99)
        verdicts[f"{use}.{case}.p99_ms"] = at_most(p99_ms, LATENCY_GPU_MS)
        verdicts[f"{use}.{case}.drops"] = at_most(drops, 0)
        figures |= {
            f"{use}.{case}.frames": f"{len(numbers)} of {source.count}",
            f"{use}.{case}.drops": drops,
            **{
                f"{use}.{case}.p{percent}_ms": 1000 * percentile(latencies, percent)
                for percent in (50, 95, 99)
            },
            f"{use}.{case}.max_ms": 1000 * max(latencies),
            f"{use}.{case}.source_late_max_ms": 1000 * source.late_s,
        }
    return figures


def measure(
    clip: Path, model: str, rounds: int, seconds: float | None = None, models: Models | None = None
) -> dict[str, Any]:
    """Return the figures of four runs; the clip and the rounds are not used."""
    del clip, rounds
    if seconds is None:
        seconds = float(os.environ.get("VIDPIPE_LIVE_S", "10"))
    figures: dict[str, Any] = {"processors": psutil.cpu_count(), "seconds": seconds}
    fixed = {"tiers": [model], "tier": model, **(models or {})}
    governed = {"tiers": [model], **(models or {})}
    first = play(30, seconds, 1.0, all_frames=True, **fixed)
    # Three times what the source has where that is too much already, or what the model can do.
    overload = 3 * max(30, math.ceil(first["enhance_alone_fps"]))
    parts = {
        f"{model}_30fps": first,
        "governed_30fps": play(30, seconds, 0.1, **governed),
        "overload_x3": play(overload, seconds, 0.1, **fixed),
        "overload_x3_governed": play(overload, seconds, 0.1, **governed),
    }
    verdicts: dict[str, Any] = {}
    for name, part in parts.items():
        verdicts |= {f"{name}.{key}": value for key, value in part.pop("verdicts").items()}
        figures |= {f"{name}.{key}": value for key, value in part.items()}
    return {**figures, "verdicts": verdicts}


def main() -> None:
    """Run single parts, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--clip", type=Path, default=Path("samples/bigbuckbunny.mp4"))
    parser.add_argument("--model", default="nano-2x")
    parser.add_argument("--precision", default="auto", help="of the models")
    parser.add_argument("--device", default="auto", help="of the models, such as openvino")
    for option in ("play", "soak", "outage", "toggle", "shares", "gpu"):
        parser.add_argument(f"--{option}", type=float, metavar="SECONDS")
    parser.add_argument("--chart", type=Path, default=Path("soak.svg"), help="of --soak")
    parser.add_argument(
        "--sinks", default="stream,page", help="of --soak, beside the callback: stream, page or ''"
    )
    parser.add_argument("--send", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        send(arguments.send)
        return
    model = arguments.model
    models = {"device": arguments.device, "precision": arguments.precision}
    parts: dict[str, Callable[[float], dict[str, Any]]] = {
        "play": lambda s: measure(arguments.clip, model, 1, s, models),
        "toggle": lambda s: toggle(model, s, models),
        "outage": lambda s: outage(model, s, models),
        "shares": lambda s: shares(arguments.clip, model, s, models),
        "gpu": lambda s: gpu(model, s),
        "soak": lambda s: soak(model, s, arguments.chart, models, arguments.sinks.split(",")),
    }
    for name, part in parts.items():
        if seconds := getattr(arguments, name):
            load = psutil.getloadavg()[0]
            figures = {"part": name, "model": model, **models, "load_before": load, **part(seconds)}
            figures["ok"] = all(v["ok"] for v in figures.get("verdicts", {}).values())
            print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
