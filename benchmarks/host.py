"""Host time of a frame's way over a GPU: what the decode and the model stage take by themselves.

Processor time of the calling thread a frame, in microseconds. `plain` is a loop of PyAV over the
same decoder, `source` the decode stage, `model` the model stage on a frame that is there already,
a few at a time, so that the thread never waits for the GPU. `own` is what is not FFmpeg's: the
model, and the source beyond the plain loop. Where there is no GPU the CPU takes its place, and the
model's own work is in its figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import av

from vidpipe.bench import least_psnr
from vidpipe.bench.rig import on_host
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.errors import DeviceError, MissingExtraError
from vidpipe.frame import Frame
from vidpipe.media import nvdec
from vidpipe.media.decode import Decode
from vidpipe.model.stage import Model

_AT_ONCE = 5  # few enough for the GPU's queue
_RUNS = 20
_LEAD_IN = 8


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return microseconds a frame, after checking the first frame against the CPU's."""
    device = _device()
    source, stage = Decode(path=str(clip), device=str(device)), Model(model=model)
    spec = source.plan()
    stage.plan(spec)
    source.ring_depth = stage.ring_depth = 2 * _AT_ONCE
    source.open()
    stage.open()
    try:
        frames = source.frames()
        first = next(frames)
        frames.close()  # type: ignore[attr-defined]
        _check(clip, model, stage, first)
        rates: dict[str, list[float]] = {"plain": [], "source": [], "model": []}
        for _ in range(rounds):
            rates["plain"].append(_thread_us(_plain(clip, device)))
            rates["source"].append(_thread_us(source.frames()))
            rates["model"].append(_model_us(stage, first))
    finally:
        stage.close()
        source.close()
    found = {name: median(values) for name, values in rates.items()}
    return {
        "device": str(device),
        "model": model,
        "size": f"{spec.width}x{spec.height}",
        **{f"{name}_us": value for name, value in found.items()},
        "own_us": found["model"] + found["source"] - found["plain"],
    }


def _device() -> Device:
    with suppress(DeviceError, MissingExtraError):
        import_cupy(Device("cuda"))
        return Device("cuda")
    return CPU


def _check(clip: Path, model: str, stage: Model, frame: Frame) -> None:
    """Compare the stage's picture of a frame with the CPU's."""
    (made,) = stage.process(frame)
    made.synchronize()
    source, other = Decode(path=str(clip)), Model(model=model, device="cpu")
    other.plan(source.plan())
    other.open()
    (wanted,) = other.process(next(source.frames()))
    least_psnr([on_host(made)], [wanted], model)
    other.close()


def _plain(clip: Path, device: Device) -> Iterator[av.VideoFrame]:
    accelerator = None if device == CPU else nvdec.hardware(device)
    with av.open(str(clip), hwaccel=accelerator) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = 0 if device == CPU else nvdec.THREADS
        yield from container.decode(stream)


def _thread_us(frames: Iterator[Any]) -> float:
    """Return the thread's processor time for each frame behind the first ones."""
    begin = count = 0
    for number, frame in enumerate(frames):
        del frame
        if number == _LEAD_IN:
            begin = time.thread_time_ns()
        count = number - _LEAD_IN
    return (time.thread_time_ns() - begin) / max(count, 1) / 1000


def _model_us(stage: Model, frame: Frame) -> float:
    wait: Callable[[], None] = lambda: None  # noqa: E731
    if frame.spec.device != CPU:
        cupy = import_cupy(frame.spec.device)
        wait = cupy.cuda.Device(frame.spec.device.index).synchronize
    spent = 0
    for _ in range(_RUNS):
        begin = time.thread_time_ns()
        for _ in range(_AT_ONCE):
            for made in stage.process(frame):
                del made
        spent += time.thread_time_ns() - begin
        wait()
    return spent / (_RUNS * _AT_ONCE) / 1000
