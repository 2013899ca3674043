"""The benchmark of a file split over several workers: GPUs, or decoders of one.

Each turn is a whole `SplitRun`, with a clock at every worker's sink. Only the stretch counts in
which all workers are at work: from the moment when the last of them has had its lead-in, to the
last frame of the first one that runs dry. So neither opening nor the end, where workers wait for
each other's last part, is in a rate; what seeking to each part costs is. `whole_fps` has
the end in it: all frames but the first over the time from the first to the last.

The limits are those of what runs: `decode` is as many decoders at once as there are workers, a
model is one session alone on each GPU and the sum over the GPUs (two workers of a GPU share
it), `encode` is an encoder for each worker, all at once.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from vidpipe.bench import (
    Chain,
    Figure,
    Options,
    frames_for,
    least_psnr,
    order_of,
    same_times,
    spec_facts,
)
from vidpipe.bench.machine import smi
from vidpipe.bench.rig import (
    LEAD_IN,
    Around,
    Burst,
    HostNull,
    Moment,
    Repeat,
    Rig,
    close_all,
    copied,
    on_host,
)
from vidpipe.clock import processor_s
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.errors import InputError, VerificationError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.media import ranges
from vidpipe.media.decode import Decode
from vidpipe.media.encode import DROPPABLE, Encode
from vidpipe.model.stage import Model
from vidpipe.pipeline import Report
from vidpipe.segments import SplitRun
from vidpipe.stage import Null, Sink

_RING = 8
_KEPT = 2
_PARTS = 3
_TO_FILE_S = 8.0

_ENDS = {"null": "pipeline to null", "host": "pipeline to the host", "file": "pipeline to a file"}


def workers_for(
    options: Options, source: Path, models: Sequence[str]
) -> tuple[list[Device], list[str]]:
    """Return the workers that a chain is to be measured on, and what there is to say of them.

    Raises:
        VidpipeError: the chain cannot be planned.
    """
    run = SplitRun(_graph(source, models, "null"), options.devices, decoders=options.decoders)
    if options.decoders is None:
        run.plan()
        run.abort()
    return run.devices, run.notes


def _graph(source: Path, models: Sequence[str], end: str, **ends: Any) -> Graph:
    """Return decode, models, and a sink.

    Args:
        source, models: what, through what.
        end: "null" or "encode".
        ends: options of the decode stage, and "path" of the file to write.
    """
    out = ends.pop("path", None)
    graph = Graph("+".join(models) or "decode").add("source", "decode", path=str(source), **ends)
    last = "source"
    for number, model in enumerate(models, 1):
        graph.add(f"stage{number}", "model", last, model=model)
        last = f"stage{number}"
    if end == "null":
        return graph.add("sink", "null", last)
    # Only the picture is measured.
    drop = [kind for kind in DROPPABLE if kind != "alpha"]
    return graph.add("sink", "encode", last, path=str(out), overwrite=True, drop=drop)


class _Watch(Around):
    """A worker's sink, with a clock on it.

    Args:
        inner: the sink.
        host: take frames in host memory, so that the pipeline copies them there.
        keep: frames to keep copies of, the worker's first ones.
    """

    def __init__(self, inner: Sink, host: bool, keep: int) -> None:
        super().__init__(inner)
        self._host, self._keep = host, keep
        self.kept: list[Frame] = []
        self._pts: list[tuple[int, FrameSpec]] = []
        self.seen: list[tuple[float, float]] = []

    @property
    def times(self) -> list[Fraction]:
        """When the frames are shown, in seconds, in the order in which they came."""
        return [pts * spec.time_base for pts, spec in self._pts]

    def device_for(self, spec: FrameSpec) -> Device:
        return CPU if self._host else super().device_for(spec)

    def write(self, frame: Frame) -> None:
        super().write(frame)
        self.seen.append((self.clock.now_s(), processor_s()))
        self._pts.append((frame.pts, frame.spec))
        if len(self.kept) < self._keep:
            self.kept.append(copied(frame))


class Watched(SplitRun):
    """A split run with a clock at each worker's sink.

    Args:
        graph, devices, options: of `SplitRun`.
        host: copy frames that go to nothing into host memory.
        keep: frames of each worker to keep copies of, the first ones.
    """

    def __init__(
        self,
        graph: Graph,
        devices: Sequence[Device],
        *,
        host: bool = False,
        keep: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(graph, devices, **options)
        self._host, self._keep = host, keep
        self.watches: list[_Watch] = []

    def _around(self, sink: Sink) -> Sink:
        watch = _Watch(sink, self._host, self._keep)
        self.watches.append(watch)
        return watch

    def plan(self) -> None:
        """Plan all workers.

        Raises:
            InputError: the file cannot be split over them.
        """
        super().plan()
        if not self.watches:
            raise InputError(
                self.notes[0] if self.notes else f"'{self.graph.title}' is not split",
                hint="Measure it on one device, or take a longer file with more key frames",
            )


def together(watches: Sequence[Sequence[tuple[float, float]]]) -> Burst:
    """Return the stretch in which all workers are at work.

    Args:
        watches: for each worker the moments when a frame was done, (time, processor time) in s.

    Raises:
        InputError: there is none; the file is too short for so many workers.
    """
    nothing = [(0.0, 0.0)]
    begin = max(seen[min(LEAD_IN, len(seen) // 4)] for seen in (s or nothing for s in watches))
    end = min((seen or nothing)[-1] for seen in watches)
    if end <= begin:
        raise InputError(
            f"the file is too short to keep {len(watches)} workers at work at once",
            hint="Take a longer one, or --frames with a higher number",
        )
    frames = sum(bisect_right(seen, end) - bisect_right(seen, begin) for seen in watches)
    (begin_s, used_before_s), (end_s, used_s) = begin, end
    return Burst(frames, Moment(begin_s), Moment(end_s), (used_s - used_before_s) / frames)


def whole_fps(watches: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return frames per second from the first frame of all to the last."""
    first, last = min(s[0] for s in watches), max(s[-1] for s in watches)
    return (sum(map(len, watches)) - 1) / max(last[0] - first[0], 1e-9)


class SplitChain(Chain):
    """The measurements of one chain of models on several workers.

    Args:
        options: what to measure.
        workers: a device for each.
        others: of `Chain`.
    """

    def __init__(self, options: Options, workers: Sequence[Device], *others: Any) -> None:
        super().__init__(replace(options, device=workers[0]), *others)
        self._workers = list(workers)
        self._gpus = list(dict.fromkeys(workers))
        self._groups: dict[str, list[Rig]] = {}
        self._wholes: dict[str, list[float]] = {}
        self._reports: dict[str, Report] = {}
        self._head = Decode(path=str(self._path))
        self._starts: list[float] = []

    # -- the whole -------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Verify, open what runs alone, take turns, close everything."""
        options = self._options
        self._find_parts()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(lambda: close_all([r for group in self._groups.values() for r in group]))
            verified = self._verify_split()
            self._figures["decode"] = Figure("decode", "stage")
            self._open_alone(folder)
            turns = self._split_turns(folder)
            for number in range(options.repeats):
                for name, turn in turns.items():
                    self._say(f"turn {number + 1} of {options.repeats}: {name}")
                    self._figures[name].add(*turn())
            clocks = smi(self._device) if self._device != CPU else None
            for name, group in self._groups.items():
                self._reports |= {f"{name} on {rig.name}": rig.close() for rig in group}
        self._free()
        return self._split_result(verified, clocks)

    def _free(self) -> None:
        for gpu in self._gpus:
            if gpu != CPU:
                import_cupy(gpu).get_default_memory_pool().free_all_blocks()

    def _find_parts(self) -> None:
        """Find where the file can be cut, in seconds after its first part's beginning."""
        self._say("looking for key frames")
        self._head.plan()
        info = self._head.info
        assert info is not None
        base = info.video_stream.time_base or Fraction(1, 1000)
        cuts = [
            float(part.start * base)
            for part in ranges.cut(self._head, ranges.SHORTEST_S)
            if part.start is not None
        ]
        begin = float(self._head.window()[0])
        self._starts = [0.0, *(cut - begin for cut in cuts)]

    def _excerpt(self, seconds: float, parts: int) -> dict[str, float]:
        """Return the decode option for so many seconds, of so many parts for each worker."""
        number = max(bisect_left(self._starts, seconds), parts * len(self._workers))
        return {"duration_s": self._starts[number]} if number < len(self._starts) else {}

    def _run(self, name: str, run: Watched) -> Watched:
        """Run it; keep its report."""
        self._reports[name] = run.run()
        return run

    def _split(self, models: Sequence[str], end: str, **others: Any) -> Watched:
        """Return a run on all workers.

        Args:
            models: of the graph; none to decode only.
            end: of `ENDS`.
            others: options of `_graph`, and "keep" of `Watched`.
        """
        keep = others.pop("keep", 0)
        graph = _graph(self._path, models, "encode" if end == "file" else "null", **others)
        graph.title = f"{graph.title}: to {end}"
        return Watched(graph, self._workers, host=end == "host", keep=keep, tracer=self._tracer)

    # -- verification ----------------------------------------------------------------------

    def _verify_split(self) -> dict[str, Any]:
        """Compare an excerpt with the CPU path: all times, and the first frames of each worker.

        Raises:
            VerificationError: they differ.
        """
        self._say("verifying against the CPU path")
        excerpt = self._excerpt(0.0, 2)
        run = self._run("verified", self._split(self._models, "null", keep=_KEPT, **excerpt))
        what = f"'{'+'.join(self._models)}' on {', '.join(map(str, self._workers))}"
        for watch in run.watches:
            if any(a >= b for a, b in pairwise(watch.times)):
                raise VerificationError(f"{what}: a worker gave frames out of order")
        kept = {f.pts * f.spec.time_base: on_host(f) for w in run.watches for f in w.kept}
        times: list[Fraction] = []
        least: float | None = None
        for frame in self._expected(excerpt, kept, times):
            value = least_psnr([kept[frame.pts * frame.spec.time_base]], [frame], what)
            if value is not None:
                least = value if least is None else min(least, value)
        same_times(sorted(time for watch in run.watches for time in watch.times), times, what)
        return {
            "frames": len(kept),
            "psnr_db": None if least is None else round(least, 2),
            "identical": least is None,
            "times_compared": len(times),
        }

    def _expected(
        self, excerpt: dict[str, float], wanted: Any, times: list[Fraction]
    ) -> Iterator[Frame]:
        """Yield the enhanced frames of the CPU path that are wanted; add the times of all."""

        def pick(frames: Iterator[Frame]) -> Iterator[Frame]:
            for frame in frames:
                times.append(frame.pts * frame.spec.time_base)
                if times[-1] in wanted:
                    yield frame

        decode = Decode(path=str(self._path), **excerpt)  # type: ignore[arg-type]
        return self._on_cpu(decode, pick)

    # -- each stage alone ------------------------------------------------------------------

    def _open_alone(self, folder: Path) -> None:
        """Open what runs alone: each model on each GPU, copies, an encoder for each worker."""
        rings = {gpu: self._decoded(gpu) for gpu in self._gpus}
        for model, label in zip(self._models, self._labels, strict=True):
            name = f"model {label}"
            for gpu in self._gpus:
                stage = Model(model=model, device=str(gpu))
                rig = self._open(name, gpu, Repeat(rings[gpu]), stage, Null())
                rings[gpu] = rig.keep(_RING)
        self._result_spec = rings[self._device][0].spec
        if self._device != CPU:
            for gpu in self._gpus:
                self._open("copy to the host", gpu, Repeat(rings[gpu]), HostNull())
        if "file" not in self._options.ends:
            return
        for number, gpu in enumerate(self._workers):
            sink = Encode(path=str(folder / f"alone{number}.mkv"))
            self._encoded_on = sink.device_for(rings[gpu][0].spec)
            ring = rings[gpu]
            if self._encoded_on == CPU:
                ring = [on_host(frame) for frame in ring]
            self._open("encode", gpu, Repeat(ring), sink)

    def _decoded(self, gpu: Device) -> list[Frame]:
        """Return copies of a file's first frames on a GPU."""
        rig = Rig("decode", Decode(path=str(self._path), device=str(gpu)), [], Null())
        try:
            return rig.keep(_RING)
        finally:
            rig.abort()

    def _open(self, name: str, gpu: Device, *parts: Any) -> Rig:
        source, *stages, sink = parts
        self._say(f"opening: {name} on {gpu}")
        title = f"{'+'.join(self._models)}: {name}"
        rig = Rig(title, source, stages, sink, self._tracer)
        self._groups.setdefault(name, []).append(rig)
        self._figures.setdefault(name, Figure(name, "stage"))
        return rig

    def _split_turns(self, folder: Path) -> dict[str, Callable[[], list[Burst]]]:
        """Warm up what runs alone; return what to do in each turn."""
        options = self._options
        turns: dict[str, Callable[[], list[Burst]]] = {}
        rate = self._rate()
        excerpt: dict[str, Any] = {}
        if options.frames is not None:
            excerpt = self._excerpt(options.frames / rate, _PARTS)
        turns["decode"] = self._split_turn("decode", (), "null", excerpt)
        for name, group in self._groups.items():
            self._say(f"warming up: {name}")
            frames = options.frames or frames_for(group[0].burst, options.seconds)
            turns[name] = _at_once(group, frames) if name == "encode" else _in_turn(group, frames)
        for end in options.ends:
            name = _ENDS["null" if self._device == CPU and end == "host" else end]
            if name in turns:
                continue
            self._figures[name] = Figure(name, "pipeline")
            length = excerpt
            if end == "file" and options.frames is None:
                fps = sum(burst.fps for burst in turns["encode"]())
                length = self._excerpt(_TO_FILE_S * fps / rate, _PARTS)
            if end == "file":
                length = {**length, "path": folder / "whole.mkv"}
            turns[name] = self._split_turn(name, self._models, end, length)
        return turns

    def _rate(self) -> float:
        """Return the file's frames per second of media time."""
        frames, length_s = self._head.expected_frames, self._head.expected_s
        return frames / length_s if frames and length_s else 25.0

    def _split_turn(
        self, name: str, models: Sequence[str], end: str, others: dict[str, Any]
    ) -> Callable[[], list[Burst]]:
        def turn() -> list[Burst]:
            run = self._run(name, self._split(models, end, **others))
            seen = [watch.seen for watch in run.watches]
            burst = together(seen)
            self._wholes.setdefault(name, []).append(whole_fps(seen))
            return [burst]

        return turn

    # -- the result ------------------------------------------------------------------------

    def _split_result(
        self, verified: dict[str, Any], clocks: dict[str, str] | None
    ) -> dict[str, Any]:
        figures, reports = self._figures, self._reports
        facts = reports["decode"].stage("source").facts
        figures["decode"].facts |= {"codec": facts["decoder"], "on": facts["decoded_on"]}
        for name, whole in self._wholes.items():
            figures[name].facts["whole_fps"] = round(median(whole), 3)
        for name, figure in figures.items():
            if figure.kind == "pipeline":
                figure.facts |= self._shares(name)
        spec = self._head.plan()
        return {
            "models": list(self._models),
            "workers": [str(worker) for worker in self._workers],
            "input": spec_facts(spec),
            "output": spec_facts(self._result_spec),
            "verified": verified,
            "figures": [figure.to_dict() for figure in sorted(figures.values(), key=order_of)],
            "steady": None,
            "nvidia_smi": clocks,
            "notes": sorted({n for report in reports.values() for n in report.notes}),
            "problems": sorted({p for report in reports.values() for p in report.problems}),
        }


def _in_turn(group: Sequence[Rig], frames: int) -> Callable[[], list[Burst]]:
    """Return a turn of rigs on different devices, one after the other."""
    return lambda: [rig.burst(frames) for rig in group]


def _at_once(group: Sequence[Rig], frames: int) -> Callable[[], list[Burst]]:
    """Return a turn of rigs that run at the same time."""

    def turn() -> list[Burst]:
        with ThreadPoolExecutor(len(group), "bench") as pool:
            bursts = pool.map(lambda rig: rig.burst(frames), group)
            # Each has seen the processor time of all.
            return [replace(b, processor_s=b.processor_s / len(group)) for b in bursts]

    return turn
