"""What `--device auto` means on this machine, for one model at one size.

A GPU with CUDA is taken where there is one with memory to spare: it is faster than any
processor by an order of magnitude. Among the providers whose frames are in host memory, a
short measurement decides, kept under the user's cache folder: a second start measures
nothing, and a machine with one provider never does.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vidpipe.clock import Clock, MonotonicClock
from vidpipe.device import Device, import_cupy
from vidpipe.errors import DeviceError, OutputError, SpecError, VidpipeError
from vidpipe.frame import Color, FrameSpec, pixel_format
from vidpipe.model.cache import Cache
from vidpipe.model.descriptor import Descriptor, describe, find_model
from vidpipe.model.variant import check_int8, variant
from vidpipe.providers import Target, all_providers
from vidpipe.providers.base import PREFERENCES, Found, Provider, all_devices, device_kind, find
from vidpipe.providers.runtime import RUNTIMES, default_threads, import_onnxruntime, threads_for

TYPICAL_SIZE = (960, 540)
"""Size that is measured where the source's is not known."""

LEAST_GPU_BYTES = 1 << 30
"""Free memory below which a GPU is not chosen."""

MARGIN = 0.05
"""A provider must be so much faster than the CPU provider, which starts at once."""

_RUN_S = 0.05
_ROUNDS = 3
_ROUNDS_S = 1.0
_SMALL = (160, 96)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the models of a run are to run on.

    Attributes:
        device: what a model stage's `device` option takes.
        kind: "cpu", "gpu" or "npu".
        reason: one line for the report; "" where the user named the device.
    """

    device: str
    kind: str
    reason: str = ""

    @property
    def place(self) -> Device:
        """Where the frames are to be."""
        return Target.parse(self.device).place


def choose(
    device: str | None,
    model: str,
    size: tuple[int, int] | Callable[[], tuple[int, int] | None] | None = None,
    *,
    prefer: str = "speed",
    precision: str = "auto",
    threads: int = 0,
    clock: Clock | None = None,
) -> Choice:
    """Return what `--device` means here.

    Args:
        device: what the user asked for; None and "auto" leave the choice.
        model: name of a built-in model, or path of an ONNX file: what is measured.
        size: (width, height) of the source, or a function that finds it; it is called only
            if it matters.
        prefer: "speed", "latency" or "efficiency".
        precision: what the models compute in, see `variant`; int8 is measured as such.
        threads: threads that the models may use; 0 for all.
        clock: for tests.

    Raises:
        DeviceError: there is no such device; nothing can run models here.
        ModelError: the model cannot be used.
    """
    if prefer not in PREFERENCES:
        raise SpecError(f"prefer is '{prefer}', expected {', '.join(PREFERENCES)}")
    if device not in (None, "auto"):
        target = Target.parse(str(device))
        return Choice(str(target), target.kind)
    possible = [p for p in all_providers() if p.candidate and p.installed()]
    if [p.name for p in possible] == ["cpu"]:
        return Choice("cpu", "cpu", "auto: cpu, no other provider is installed")
    if not possible:
        import_onnxruntime()
    passed_over: list[str] = []
    for provider in (p for p in possible if p.memory == "cuda"):
        try:
            if precision == "int8":
                check_int8(provider.name)
            return _gpu(provider.name)
        except (DeviceError, SpecError) as error:
            passed_over.append(f"{provider.name} not used: {error.message}")
    host = [p for p in possible if p.memory == "cpu"]
    descriptor = describe(find_model(model))
    if precision == "int8":
        descriptor = variant(descriptor, precision, on_cpu=True).model
    given = (size() if callable(size) else size) or TYPICAL_SIZE
    threads = threads or threads_for(prefer)
    facts = _facts(descriptor, given, prefer, threads, host)
    choice = kept_choice(
        facts,
        lambda: _on_host(host, descriptor, given, prefer, threads, clock or MonotonicClock()),
    )
    return Choice(choice.device, choice.kind, "; ".join([choice.reason, *passed_over]))


def _gpu(name: str) -> Choice:
    """Return the GPU with the most free memory.

    Raises:
        DeviceError: there is none, or too little of it.
    """
    ort = import_onnxruntime()
    target = Target.parse(name)
    find(target.provider, ort)
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    try:
        free = {}
        for index in range(runtime.getDeviceCount()):
            with cupy.cuda.Device(index):
                free[index] = int(runtime.memGetInfo()[0])
    except runtime.CUDARuntimeError as error:
        raise DeviceError(str(error)) from None
    best = max(free, key=lambda index: (free[index], -index))
    if free[best] < LEAST_GPU_BYTES:
        raise DeviceError(
            f"{name}:{best} has {free[best] / 2**20:.0f} MiB free, "
            f"of {LEAST_GPU_BYTES / 2**20:.0f} that a model may need"
        )
    if reason := target.provider.refuses(Device("cuda", best)):
        raise DeviceError(reason)
    title = runtime.getDeviceProperties(best)["name"].decode()
    label = f"{name}:{best}" if len(free) > 1 else name
    return Choice(label, "gpu", f"auto: {label}, {title} with {free[best] / 2**30:.1f} GiB free")


def _on_host(
    providers: Sequence[Provider],
    model: Descriptor,
    size: tuple[int, int],
    prefer: str,
    threads: int,
    clock: Clock,
) -> Choice:
    """Measure the providers that take NumPy arrays, where there are several."""
    found: dict[str, Found] = {}
    failed: dict[str, str] = {}
    for provider in providers:
        try:
            found |= _kinds_of(provider)
        except DeviceError as error:
            failed[provider.name] = error.message
    if not found:
        raise DeviceError(_not_used(failed), hint="See vidpipe doctor")
    if len(found) == 1:
        ((label, only),) = found.items()
        return Choice(label, only.kind, f"auto: {label}, the only provider with a device here")
    trial = measure(model, size, found, prefer=prefer, threads=threads, clock=clock)
    kinds = {label: one.kind for label, one in found.items()}
    label = pick(trial.times_ms, kinds, prefer)
    others = [f"{ms:.1f} ms on {name}" for name, ms in trial.times_ms.items() if name != label]
    reason = f"auto: {label}, {trial.times_ms[label]:.1f} ms"
    if others:
        reason += f" against {', '.join(others)}"
    if trial.size != size:
        reason += f" at {trial.size[0]}x{trial.size[1]}"
    notes = (reason, _not_used(trial.failed))
    return Choice(label, kinds[label], "; ".join(filter(None, notes)))


def _kinds_of(provider: Provider) -> dict[str, Found]:
    """Return each kind of device of a provider, by what `--device` takes.

    Raises:
        DeviceError: it has none.
    """
    ort = import_onnxruntime()
    if provider.package is None:
        return {provider.name: find(provider, ort)}
    kinds = sorted({device_kind(d) for d in all_devices(provider, ort)})
    parts = kinds if len(kinds) > 1 else [""]
    return {str(Target(provider, part)): find(provider, ort, part) for part in parts}


def _not_used(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} not used: {why}" for name, why in reasons.items())


def pick(times_ms: dict[str, float], kinds: dict[str, str], prefer: str) -> str:
    """Return the label to use, from the time of a frame on each.

    The fastest, unless the CPU provider comes within `MARGIN` of it. For efficiency an NPU,
    or else a GPU, may take up to twice the time of the fastest.
    """
    fastest = min(times_ms, key=lambda label: times_ms[label])
    if prefer == "efficiency":
        for kind in ("npu", "gpu"):
            able = [
                name
                for name, ms in times_ms.items()
                if kinds[name] == kind and ms <= 2 * times_ms[fastest]
            ]
            if able:
                return min(able, key=lambda label: times_ms[label])
    if times_ms.get("cpu", float("inf")) * (1 - MARGIN) <= times_ms[fastest]:
        return "cpu"
    return fastest


@dataclass(frozen=True, slots=True)
class Trial:
    """What a measurement found.

    Attributes:
        times_ms: least time of a frame by label.
        failed: why a provider cannot run the model, by label.
        size: (width, height) that was measured: the given one, or less where that is slow.
    """

    times_ms: dict[str, float]
    failed: dict[str, str]
    size: tuple[int, int]


def measure(
    model: Descriptor,
    size: tuple[int, int],
    found: Mapping[str, Found],
    *,
    prefer: str = "speed",
    threads: int = 0,
    clock: Clock,
) -> Trial:
    """Time a model on several providers, in turns.

    The picture is made so small that the first provider takes about `_RUN_S`. Each provider
    runs it once, and up to `_ROUNDS` times more as long as all that fits in `_ROUNDS_S`; so one
    that is far slower than the first runs once. Loading the model takes what it takes.

    Args:
        model: the model.
        size: (width, height) of the source.
        found: providers that take NumPy arrays, by label.
        prefer, threads: see `HostSession`.
        clock: tells the time.

    Raises:
        DeviceError: no provider runs the model.
    """
    runs: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}

    def ready(one: Found, at: tuple[int, int]) -> Callable[[], float]:
        return _runner(model, at, one, prefer, threads, clock)

    small = (min(size[0], _SMALL[0]), min(size[1], _SMALL[1]))
    for one in found.values() if model.size is None else ():
        with suppress(VidpipeError):  # it fails again below, and is named there
            size = _affordable(size, small, ready(one, small))
            break
    times: dict[str, list[float]] = {}
    for label, one in found.items():
        try:
            runs[label] = ready(one, size)
            times[label] = [runs[label]()]  # allocates too
        except VidpipeError as error:
            runs.pop(label, None)
            failed[label] = error.message
    if not runs:
        raise DeviceError("; ".join(failed.values()), hint="See vidpipe doctor")
    spent_s = sum(sum(t) for t in times.values())
    for _ in range(_ROUNDS):
        for label, run in runs.items():
            if spent_s + min(times[label]) <= _ROUNDS_S:
                times[label].append(run())
                spent_s += times[label][-1]
    return Trial({label: round(1000 * min(t), 3) for label, t in times.items()}, failed, size)


def _affordable(
    size: tuple[int, int], small: tuple[int, int], run: Callable[[], float]
) -> tuple[int, int]:
    """Return the size, or one of its shape at which a run takes about `_RUN_S`."""
    run()
    per_pixel = min(run(), run()) / (small[0] * small[1])
    share = (_RUN_S / (per_pixel * size[0] * size[1])) ** 0.5 if per_pixel > 0 else 1.0
    if share >= 1:
        return size
    width, height = (max(least, int(n * share)) for n, least in zip(size, small, strict=True))
    return min(size[0], width // 16 * 16 or 16), min(size[1], height // 16 * 16 or 16)


def _runner(
    model: Descriptor,
    size: tuple[int, int],
    found: Found,
    prefer: str,
    threads: int,
    clock: Clock,
) -> Callable[[], float]:
    """Return a function that runs one frame and says how long it took, in seconds."""
    from vidpipe.model.compile import compile_model
    from vidpipe.model.session import HostSession

    spec = FrameSpec(
        width=size[0],
        height=size[1],
        format=pixel_format("yuv420p"),
        color=Color(),
        time_base=Fraction(1, 25),
    )
    wanted = found.provider
    compiled = compile_model(
        model, spec, portable=wanted.portable, half=wanted.half, widen=wanted.widen
    )
    session = HostSession(compiled, found, threads=threads, strength=1.0, prefer=prefer)
    random = np.random.default_rng(0)
    inputs = [random.integers(16, 236, t.plane_shape, t.dtype) for t in compiled.inputs]
    outputs = [np.empty(t.plane_shape, t.dtype) for t in compiled.outputs]
    session.bind(0, outputs)

    def run() -> float:
        assert outputs  # the session holds their addresses only
        begin_s = clock.now_s()
        session.run(0, inputs)
        return clock.now_s() - begin_s

    return run


def kept_choice(facts: Mapping[str, Any], decide: Callable[[], Choice]) -> Choice:
    """Return the choice kept for such facts, or decide and keep it.

    A cache that cannot be written is no error: the next run decides again.
    """
    cache = Cache()
    kept = cache.read("choice", facts)
    if isinstance(kept, dict) and kept.keys() == {"device", "kind", "reason"}:
        return Choice(**kept)
    choice = decide()
    with suppress(OutputError):
        cache.write("choice", facts, asdict(choice))
    return choice


def _facts(
    model: Descriptor,
    size: tuple[int, int],
    prefer: str,
    threads: int,
    providers: Sequence[Provider],
) -> dict[str, Any]:
    """Return all that the times depend on. Loads no runtime."""
    cards = Path("/sys/class/drm")
    packages = [*RUNTIMES, *(p.package.replace("_", "-") for p in providers if p.package)]
    return {
        "model": model.name,
        "sha256": hashlib.sha256(model.path.read_bytes()).hexdigest(),
        "size": size,
        "prefer": prefer,
        "threads": threads,
        "processor": [platform.machine(), processor_name(), default_threads()],
        "system": platform.version(),
        "cards": sorted(p.name for p in cards.iterdir()) if cards.is_dir() else [],
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
