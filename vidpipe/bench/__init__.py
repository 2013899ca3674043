"""`vidpipe bench`: what each stage can do alone, and how much of that the pipeline keeps.

First the output is compared with the CPU path's; figures of a wrong output are not given.
Then, for each chain of models, every stage alone, through its real class, and the whole
pipelines, take turns in one process; a figure is the median over the turns. A stage alone is
fed with a few real frames that are on its device already, and ends where the others end: in a
sink that waits until each frame is ready.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from vidpipe.bench.clip import synthetic_clip
from vidpipe.bench.machine import machine_facts, smi
from vidpipe.bench.network import Network
from vidpipe.bench.rig import Burst, HostNull, Loop, Repeat, Rig, close_all, on_host
from vidpipe.clock import MonotonicClock
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.errors import InputError, VerificationError
from vidpipe.frame import Array, Frame, FrameSpec
from vidpipe.media.decode import Decode
from vidpipe.media.encode import Encode
from vidpipe.model.cuda import CudaSession
from vidpipe.model.descriptor import find_model
from vidpipe.model.stage import Model
from vidpipe.pipeline import Report
from vidpipe.stage import Null, Stage
from vidpipe.trace import Tracer
from vidpipe.transfer import Transfer

PSNR_DB = 50.0
"""Least PSNR of every plane against the CPU path, in dB."""

ENDS = ("null", "host", "file")
"""Where a pipeline can end: on the device, in host memory, in a file."""

# Of the clip that is made: 1,920 frames, and 4,800 where a GPU or several devices would often come
# to its end, and wait until it is opened anew.
_ROUNDS, _MORE_ROUNDS = 8, 20
_RING = 8
_VERIFIED = 4
_COMPARED_TIMES = 300
_MOST_FRAMES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        chains: the models of each chain; a chain is one pipeline.
        source: the file to read; a clip is made if None.
        device: where frames and models are.
        devices: workers that the file is split over, see `vidpipe.segments`; none for one
            pipeline on `device`.
        decoders: workers on each of `devices`; None for as many as prove worth it.
        size: width and height of the clip that is made.
        frames: timed frames of each turn; as many as take `seconds` if None.
        seconds: see `frames`.
        repeats: turns of everything, at least 3.
        ends: pipelines to measure, of `ENDS`; on a CPU, "host" is "null".
        steady: frames over which memory, host time and host waits are watched; 0 for none.
    """

    chains: tuple[tuple[str, ...], ...]
    source: Path | None = None
    device: Device = CPU
    devices: tuple[Device, ...] = ()
    decoders: int | None = 1
    size: tuple[int, int] = (1920, 1080)
    frames: int | None = None
    seconds: float = 0.4
    repeats: int = 3
    ends: tuple[str, ...] = ENDS
    steady: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 3:
            raise InputError(f"{self.repeats} repeats make no median", hint="Use 3 or more")
        if self.frames is not None and self.frames < 3:
            raise InputError(f"{self.frames} frames cannot be timed", hint="Use 3 or more")
        if self.devices and self.steady:
            raise InputError(
                "the steady state is watched in one pipeline, not over several devices",
                hint="Leave out --steady, or use one --device",
            )
        if not self.chains or not all(self.chains):
            raise InputError("no model to measure", hint="Name one with --model")
        if any(n < 64 or n % 2 for n in self.size):
            raise InputError(
                f"a clip of {self.size[0]}x{self.size[1]} cannot be made",
                hint="Use an even width and height of 64 or more",
            )


@dataclass(slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        name: what, for people.
        kind: "stage" (alone), "reference" (not a part of the pipeline) or "pipeline".
        runs: frames per second of each turn.
        frames: timed frames of a turn.
        cpu_ms: processor time of the process, a frame; median.
        facts: what else is known of it.
    """

    name: str
    kind: str
    runs: list[float] = field(default_factory=list)
    frames: int = 0
    cpu_ms: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fps(self) -> float:
        """Median frames per second."""
        return median(self.runs)

    def add(self, *bursts: Burst) -> None:
        """Take the result of one turn; of several devices, the sum of their rates."""
        self.runs.append(sum(burst.fps for burst in bursts))
        self.frames = sum(burst.frames for burst in bursts)
        self.cpu_ms.append(1000 * mean(burst.processor_s for burst in bursts))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-compatible values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "fps": round(self.fps, 3),
            "ms": round(1000 / self.fps, 4),
            "runs_fps": [round(fps, 3) for fps in self.runs],
            "frames": self.frames,
            "processor_ms": round(median(self.cpu_ms), 4),
            **self.facts,
        }


def bench(
    options: Options,
    *,
    say: Callable[[str], None] = lambda _: None,
    tracer: Tracer | None = None,
) -> dict[str, Any]:
    """Measure, and return everything as JSON-compatible values.

    Args:
        options: what.
        say: told in a few words what happens now.
        tracer: keeps a profile of every pipeline.

    Raises:
        VerificationError: the output differs from the CPU path's; nothing was timed.
        VidpipeError: something cannot be run.
    """
    clock = MonotonicClock()
    start_s = clock.now_s()
    for model in {model for chain in options.chains for model in chain}:
        find_model(model)
    if options.device != CPU:
        import_cupy(options.device)
    if options.source is None:
        say("making a clip")
        many = options.devices or options.device != CPU
        source = synthetic_clip(*options.size, rounds=_MORE_ROUNDS if many else _ROUNDS)
    else:
        source = options.source
    measured = _measured if not options.devices else _measured_split
    chains = [measured(options, source, models, say, tracer) for models in options.chains]
    result: dict[str, Any] = {
        "machine": machine_facts(options.device),
        "device": ",".join(map(str, options.devices)) or str(options.device),
        "clip": str(options.source) if options.source else "synthetic",
        "repeats": options.repeats,
        "profiled": tracer is not None,
        "elapsed_s": round(clock.now_s() - start_s, 1),
        "chains": chains,
    }
    return result


def _measured(options: Options, *others: Any) -> dict[str, Any]:
    """Measure one chain, in one pipeline."""
    return Chain(options, *others).measure()


def _measured_split(
    options: Options, source: Path, models: tuple[str, ...], *others: Any
) -> dict[str, Any]:
    """Measure one chain on several workers, or in one pipeline where one is what pays."""
    from vidpipe.bench.split import SplitChain, workers_for

    workers, notes = workers_for(options, source, models)
    if len(workers) > 1:
        result = SplitChain(options, workers, source, models, *others).measure()
    else:
        result = _measured(replace(options, device=workers[0]), source, models, *others)
    result["notes"] = [*notes, *result["notes"]]
    return result


class Chain:
    """The measurements of one chain of models."""

    def __init__(
        self,
        options: Options,
        source: Path,
        models: Sequence[str],
        say: Callable[[str], None],
        tracer: Tracer | None,
    ) -> None:
        self._options = options
        self._path = source
        self._models = tuple(models)
        # A model may stand in a chain twice.
        self._labels = [
            model if model not in models[:n] else f"{model} ({n + 1})"
            for n, model in enumerate(models)
        ]
        self._device = options.device
        self._say = say
        self._tracer = tracer
        self._rigs: dict[str, Rig] = {}
        self._figures: dict[str, Figure] = {}
        self._networks: dict[str, Network] = {}
        self._result_spec: FrameSpec
        self._encoded_on = CPU

    # -- parts -----------------------------------------------------------------------------

    def _loop(self) -> Loop:
        return Loop(Decode(path=str(self._path), device=str(self._device)))

    def _stages(self) -> list[Stage]:
        return [self._model(name) for name in self._models]

    def _model(self, name: str) -> Model:
        return Model(model=name, device=str(self._device))

    def _rig(self, name: str, kind: str, *parts: Any, **facts: Any) -> Rig:
        """Open a rig: source, stages, sink."""
        source, *stages, sink = parts
        self._say(f"opening: {name}")
        title = f"{'+'.join(self._models)}: {name}"
        rig = self._rigs[name] = Rig(title, source, stages, sink, self._tracer)
        self._figures[name] = Figure(name, kind, facts=facts)
        return rig

    # -- the whole -------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Open everything, verify, take turns, close everything."""
        options = self._options
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(lambda: close_all(list(self._rigs.values())))
            # On a CPU, frames that end nowhere end in host memory.
            on_cpu = self._device == CPU
            name = "pipeline to null" if on_cpu else "pipeline to the host"
            whole = self._rig(name, "pipeline", *self._whole(HostNull()))
            verified = self._verify(whole)
            self._open_stages(folder)
            self._open_pipelines(folder)
            turns = self._turns()
            for number in range(options.repeats):
                for name, turn in turns.items():
                    self._say(f"turn {number + 1} of {options.repeats}: {name}")
                    self._figures[name].add(turn())
            steady = self._steady() if options.steady else None
            clocks = smi(self._device) if self._device != CPU else None
            reports = self._close()
        return self._result(verified, steady, clocks, reports)

    def _whole(self, sink: Any) -> list[Any]:
        return [self._loop(), *self._stages(), sink]

    def _open_stages(self, folder: Path) -> None:
        device = self._device
        rig = self._rig("decode", "stage", self._loop(), Null())
        ring = rig.keep(_RING)
        host = [on_host(frame) for frame in ring]
        if device != CPU:
            upload = Transfer(device=str(device))
            self._rig("copy to the device", "reference", Repeat(host), upload, Null())
        for model, label in zip(self._models, self._labels, strict=True):
            stage = self._model(model)
            rig = self._rig(f"model {label}", "stage", Repeat(ring), stage, Null())
            spec = ring[0].spec
            ring = rig.keep(_RING)
            self._open_network(label, stage, spec)
            self._add_eager(label, stage)
        self._result_spec = ring[0].spec
        if device != CPU:
            self._rig("copy to the host", "stage", Repeat(ring), HostNull())
        if "file" in self._options.ends:
            sink = Encode(path=str(folder / "alone.mkv"))
            self._encoded_on = sink.device_for(ring[0].spec)
            if self._encoded_on == CPU:
                ring = [on_host(frame) for frame in ring]
            self._rig("encode", "stage", Repeat(ring), sink)

    def _open_network(self, label: str, stage: Model, spec: FrameSpec) -> None:
        if stage.descriptor.size not in (None, (spec.width, spec.height)):
            return  # of fixed size, and run in tiles: not one run a frame
        name = f"network {label}"
        self._say(f"opening: {name}")
        network = Network(stage.descriptor, spec.width, spec.height, self._device)
        self._networks[name] = network
        self._figures[name] = Figure(name, "reference")
        if network.graph:
            self._figures[f"{name}, eager"] = Figure(f"{name}, eager", "reference")

    def _add_eager(self, label: str, stage: Model) -> None:
        session = _cuda_session(stage)
        if session is not None and session.graph.used:
            name = f"model {label}, eager"
            self._figures[name] = Figure(name, "reference")

    def _open_pipelines(self, folder: Path) -> None:
        options = self._options
        if self._device == CPU:
            if not options.steady and not {"null", "host"} & {*options.ends}:
                del self._figures["pipeline to null"]
        else:
            if "null" in options.ends or options.steady:
                self._rig("pipeline to null", "pipeline", *self._whole(Null()))
            if "host" not in options.ends:
                del self._figures["pipeline to the host"]
        if "file" in options.ends:
            sink = Encode(path=str(folder / "whole.mkv"))
            self._rig("pipeline to a file", "pipeline", *self._whole(sink))

    def _turns(self) -> dict[str, Callable[[], Burst]]:
        """Warm everything up; return what to do in each turn."""
        turns: dict[str, Callable[[], Burst]] = {}
        for name in self._figures:
            self._say(f"warming up: {name}")
            base = name.removesuffix(", eager")
            eager = base != name
            run: Callable[[int], Burst]
            if base in self._networks:
                network = self._networks[base]
                run = _network_run(network, eager)
            else:
                run = _rig_run(self._rigs[base], eager)
            frames = self._options.frames or frames_for(run, self._options.seconds)
            turns[name] = _with_frames(run, frames)
        return turns

    def _close(self) -> dict[str, Report]:
        for network in self._networks.values():
            network.close()
        reports = {name: rig.close() for name, rig in self._rigs.items()}
        if self._device != CPU:  # for the next chain
            import_cupy(self._device).get_default_memory_pool().free_all_blocks()
        return reports

    # -- verification ----------------------------------------------------------------------

    def _verify(self, rig: Rig) -> dict[str, Any]:
        """Compare the first frames with the CPU path's, one stage after the other.

        Raises:
            VerificationError: they differ.
        """
        self._say("verifying against the CPU path")
        got = rig.keep(_VERIFIED)
        expected = list(self._reference(_VERIFIED))
        what = f"'{'+'.join(self._models)}' on {self._device}"
        same_times(times_of(got), times_of(expected), what)
        least = least_psnr(got, expected, what)
        compared = len(got)
        if self._device != CPU:
            times = self._decoded_times(str(self._device))
            same_times(times, self._decoded_times("cpu"), f"the decoder on {self._device}")
            compared = len(times)
        return {
            "frames": len(got),
            "psnr_db": None if least is None else round(least, 2),
            "identical": least is None,
            "times_compared": compared,
        }

    def _reference(self, count: int) -> Iterator[Frame]:
        """Yield the first enhanced frames of the CPU path."""
        decode = Decode(path=str(self._path))
        return self._on_cpu(decode, lambda frames: itertools.islice(frames, count), held=count)

    def _on_cpu(
        self,
        decode: Decode,
        pick: Callable[[Iterator[Frame]], Iterable[Frame]],
        held: int = 3,
    ) -> Iterator[Frame]:
        """Yield enhanced frames of the CPU path.

        Args:
            decode: the file, on the CPU.
            pick: gives those of its frames that are wanted.
            held: how many of the results the caller keeps.
        """
        stages = [Model(model=name, device="cpu") for name in self._models]
        try:
            spec = decode.plan()
            for stage in stages:
                spec = stage.plan(spec)
                stage.ring_depth = held + 1
            for actor in (decode, *stages):
                actor.open()
            for frame in pick(iter(decode.frames())):
                for stage in stages:
                    (frame,) = stage.process(frame)
                yield frame
        finally:
            for actor in (decode, *stages):
                actor.close()

    def _decoded_times(self, device: str) -> list[Fraction]:
        decode = Decode(path=str(self._path), device=device)
        try:
            decode.plan()
            decode.open()
            return times_of(itertools.islice(decode.frames(), _COMPARED_TIMES))
        finally:
            decode.close()

    # -- the steady state ------------------------------------------------------------------

    def _steady(self) -> dict[str, Any]:
        """Watch the pipeline to null over many frames."""
        rig = self._rigs["pipeline to null"]
        self._say(f"watching {self._options.steady} frames")
        burst = rig.burst(self._options.steady, detailed=True)
        begin, end, count = burst.begin, burst.end, burst.frames
        threads = {
            name.removeprefix("vidpipe-"): 1000 * used_s for name, used_s in burst.threads.items()
        }
        waits = {
            name.removeprefix("vidpipe-"): (seen - begin.waits.get(name, 0)) / count
            for name, seen in end.waits.items()
            if seen > begin.waits.get(name, 0)
        }
        growth = {key: end.pool[key] - begin.pool[key] for key in begin.pool}
        return {
            "frames": count,
            "fps": round(burst.fps, 3),
            "processor_ms": round(1000 * burst.processor_s, 4),
            "processor_ms_by_thread": {k: round(v, 4) for k, v in threads.items() if v >= 0.001},
            "host_waits_a_frame": {k: round(v, 4) for k, v in waits.items()},
            "pool_before": begin.pool,
            "pool_after": end.pool,
            "pool_growth": growth,
            "pool_flat": not any(growth.values()),
        }

    # -- the result ------------------------------------------------------------------------

    def _result(
        self,
        verified: dict[str, Any],
        steady: dict[str, Any] | None,
        clocks: dict[str, str] | None,
        reports: dict[str, Report],
    ) -> dict[str, Any]:
        figures = self._figures
        facts = reports["decode"].stage("source").facts
        figures["decode"].facts |= {"codec": facts["decoder"], "on": facts["decoded_on"]}
        for label in self._labels:
            facts = reports[f"model {label}"].stage("stage1").facts
            keys = ("nodes", "cuda_graph", "tiles", "ring_grown")
            figures[f"model {label}"].facts |= {k: facts[k] for k in keys if k in facts}
        if "encode" in reports:
            facts = reports["encode"].stage("sink").facts
            figures["encode"].facts |= {k: facts[k] for k in ("encoder", "encoder_options")}
        for name, figure in figures.items():
            if figure.kind == "pipeline":
                figure.facts |= self._shares(name)
        notes = sorted({n for report in reports.values() for n in report.notes})
        problems = sorted({p for report in reports.values() for p in report.problems})
        return {
            "models": list(self._models),
            "workers": [str(self._device)],
            "input": spec_facts(self._rigs["decode"].pipeline.specs["source"]),
            "output": spec_facts(self._result_spec),
            "verified": verified,
            "figures": [figure.to_dict() for figure in sorted(figures.values(), key=order_of)],
            "steady": steady,
            "nvidia_smi": clocks,
            "notes": notes,
            "problems": problems,
        }

    def _shares(self, name: str) -> dict[str, Any]:
        """Return a pipeline's rate as a share of what its stages allow."""
        figures = self._figures
        models = [f"model {label}" for label in self._labels]
        parts = ["decode", *models]
        to_file = name == "pipeline to a file"
        copied = not to_file or self._encoded_on == CPU
        if name != "pipeline to null" and self._device != CPU and copied:
            parts.append("copy to the host")
        if to_file:
            parts.append("encode")
        lowest = min(parts, key=lambda part: figures[part].fps)
        fps = figures[name].fps
        # One GPU runs one model at a time; on a CPU all stages share the cores.
        sharing = parts if self._device == CPU else models
        together = 1 / sum(1 / figures[part].fps for part in sharing)
        bound = min(together, *(figures[part].fps for part in parts))
        return {
            "lowest_stage": lowest,
            "lowest_fps": round(figures[lowest].fps, 3),
            "share_of_lowest": round(fps / figures[lowest].fps, 4),
            "sum_of": sharing,
            "sum_fps": round(together, 3),
            "share_of_sum": round(fps / together, 4),
            "share_of_bound": round(fps / bound, 4),
        }


def order_of(figure: Figure) -> int:
    """Sort by kind; pipelines by their ends, the rest as it was measured."""
    ends = [f"pipeline to {end}" for end in ("null", "the host", "a file")]
    if figure.kind == "pipeline":
        return 2 + ends.index(figure.name)
    return ("stage", "reference").index(figure.kind)


def frames_for(run: Callable[[int], Burst], seconds: float) -> int:
    """Run ever longer bursts; return how many frames take so many seconds, at least 3."""
    count = 2
    while True:
        seen = run(count)
        enough = max(3, min(_MOST_FRAMES, round(seconds * min(seen.fps, 1e6))))
        if seen.wall_s >= seconds / 2 or count >= _MOST_FRAMES:
            return enough
        count = max(2 * count, min(enough, 16 * count))


def _network_run(network: Network, eager: bool) -> Callable[[int], Burst]:
    return lambda frames: network.burst(frames, graph=not eager)


def _rig_run(rig: Rig, eager: bool) -> Callable[[int], Burst]:
    if not eager:
        return rig.burst
    (stage,) = rig.stages

    def run(frames: int) -> Burst:
        with _without_graphs(stage):
            return rig.burst(frames)

    return run


def _with_frames(run: Callable[[int], Burst], frames: int) -> Callable[[], Burst]:
    return lambda: run(frames)


def _cuda_session(stage: Stage) -> CudaSession | None:
    """Return a model stage's session on a GPU, also one that is run in tiles."""
    session: Any = getattr(stage, "_session", None)
    while session is not None and not isinstance(session, CudaSession):
        session = getattr(session, "_session", None)
    return session


@contextmanager
def _without_graphs(stage: Stage) -> Iterator[None]:
    """Let an idle model stage run without its CUDA graphs for a while."""
    session = _cuda_session(stage)
    assert session is not None
    replayed, session._options = session._options, {}
    try:
        yield
    finally:
        session._options = replayed


def times_of(frames: Iterable[Frame]) -> list[Fraction]:
    """Return the frames' times in seconds."""
    return [frame.pts * frame.spec.time_base for frame in frames]


def same_times(got: list[Fraction], expected: list[Fraction], what: str) -> None:
    """See that as many frames came as expected, at the same times.

    Raises:
        VerificationError: they did not.
    """
    if len(got) != len(expected):
        raise VerificationError(f"{what}: {len(got)} frames came, expected {len(expected)}")
    for one, two in zip(got, expected, strict=True):
        if one != two:
            raise VerificationError(
                f"{what}: a frame is at {float(one):.6f} s, expected {float(two):.6f} s"
            )


def least_psnr(got: Iterable[Frame], expected: Iterable[Frame], what: str) -> float | None:
    """Return the least PSNR of any component in dB, None where all are equal.

    Args:
        got, expected: as many frames, in host memory.
        what: whose they are, for the message.

    Raises:
        VerificationError: it is under `PSNR_DB`.
    """
    least: float | None = None
    for one, two in zip(got, expected, strict=True):
        for number, (a, b) in enumerate(zip(components(one), components(two), strict=True)):
            value = psnr(a, b, one.spec.format.bits)
            if value is not None and value < PSNR_DB:
                raise VerificationError(
                    f"{what}: component {number} of the frame at {one.time_s:.3f} s has "
                    f"{value:.2f} dB against the CPU path, expected over {PSNR_DB:g} dB",
                    hint="No speed is given of a wrong picture",
                )
            if value is not None:
                least = value if least is None else min(least, value)
    return least


def components(frame: Frame) -> list[Array]:
    """Return the components Y, Cb, Cr (or G, B, R) as code values.

    Returns:
        NumPy arrays of shape (h, w), uint8 or uint16, without the unused low bits.
    """
    planes = [plane >> frame.spec.format.shift for plane in frame.planes]
    if not frame.spec.format.interleaved:
        return planes
    return [planes[0], planes[1][..., 0], planes[1][..., 1]]


def psnr(one: Array, two: Array, bits: int) -> float | None:
    """Return the PSNR of two components in dB, None where they are equal.

    Args:
        one, two: code values, NumPy, of one shape.
        bits: of a code value; the peak is 2^bits - 1.
    """
    if one.shape != two.shape:
        return 0.0
    error = np.square(one.astype(np.float32) - two.astype(np.float32)).mean(dtype=np.float64)
    return None if error == 0 else float(10 * np.log10(((1 << bits) - 1) ** 2 / error))


def spec_facts(spec: FrameSpec) -> dict[str, Any]:
    """Return what a result says of a spec."""
    return {"width": spec.width, "height": spec.height, "format": str(spec.format)}
