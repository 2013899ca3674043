"""Processor time of `vidpipe run` against decoding, model and encoding measured alone.

The parts are plain loops over the same libraries with the same settings: PyAV decoding to
frames, the ONNX Runtime session of the frame graph on planes already in memory, and PyAV
encoding of pictures already in memory. `network` is the model's own file on a float tensor,
without colour, chroma and rounding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np

import vidpipe
from vidpipe.api import build_graph
from vidpipe.frame import Frame
from vidpipe.media.convert import frame_from
from vidpipe.model.compile import compile_model, output_spec
from vidpipe.model.descriptor import describe, find_model
from vidpipe.model.session import CPU_PROVIDER, HostSession, default_threads, import_onnxruntime
from vidpipe.model.stage import DEFAULT_STRENGTH


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return processor seconds of each part and of the whole, and their ratio."""
    frames = list(vidpipe.read(clip))
    spec = frames[0].spec
    descriptor = describe(find_model(model))
    session = HostSession(compile_model(descriptor, spec), strength=DEFAULT_STRENGTH)
    out_spec = output_spec(descriptor, spec)
    buffers = [np.empty(s, spec.format.dtype) for s in out_spec.plane_shapes()]
    session.bind(0, buffers)

    pictures: list[Frame] = []
    for frame in frames:
        session.run(0, frame.planes)
        pictures.append(frame.replace([b.copy() for b in buffers], out_spec))
    _check(frames, pictures, model)

    network = _network(descriptor, spec.width, spec.height)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.mp4"
        report = _whole(clip, path, model)
        sink = report.stage("sink").facts
        _check_file(path, pictures)
        planes = [tuple(np.ascontiguousarray(p) for p in f.planes) for f in frames]
        parts: dict[str, Callable[[], object]] = {
            "decode": lambda: _decode(clip),
            "frame_graph": lambda: [session.run(0, p) for p in planes],
            "network": lambda: [network() for _ in frames],
            "encode": lambda: _encode(pictures, Path(folder) / "alone.mp4", sink),
            "whole": lambda: _whole(clip, path, model),
        }
        cpu_s: dict[str, list[float]] = {name: [] for name in parts}
        wall_s: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(rounds):
            for name, part in parts.items():
                wall, cpu = time.perf_counter(), time.process_time()
                part()
                cpu_s[name].append(time.process_time() - cpu)
                wall_s[name].append(time.perf_counter() - wall)
    cpu_median = {name: median(values) for name, values in cpu_s.items()}
    wall_median = {name: median(values) for name, values in wall_s.items()}
    alone = cpu_median["decode"] + cpu_median["frame_graph"] + cpu_median["encode"]
    bare = cpu_median["decode"] + cpu_median["network"] + cpu_median["encode"]
    return {
        "clip": clip.name,
        "model": model,
        "frames": len(frames),
        "threads": default_threads(),
        **{f"{name}_cpu_s": value for name, value in cpu_median.items()},
        "cpu_ratio": cpu_median["whole"] / alone,
        "cpu_ratio_to_bare_network": cpu_median["whole"] / bare,
        "whole_wall_s": wall_median["whole"],
        "whole_fps": len(frames) / wall_median["whole"],
        "frame_graph_fps": len(frames) / wall_median["frame_graph"],
    }


def _check(frames: list[Frame], pictures: list[Frame], model: str) -> None:
    """The pipeline gives the very pictures that the session alone gives."""
    streamed = list(vidpipe.stream(frames, model=model))
    if len(streamed) != len(pictures):
        raise RuntimeError(f"{len(streamed)} of {len(pictures)} frames came out")
    for one, two in zip(streamed, pictures, strict=True):
        for a, b in zip(one.planes, two.planes, strict=True):
            if not np.array_equal(a, b):
                raise RuntimeError(f"frame {one.pts} differs from the session's own output")


def _check_file(path: Path, pictures: list[Frame]) -> None:
    """The file holds every picture, as well as the encoder keeps it."""
    with av.open(str(path)) as container:
        decoded = [f.to_ndarray()[: f.height] for f in container.decode(video=0)]
    if len(decoded) != len(pictures):
        raise RuntimeError(f"{len(decoded)} of {len(pictures)} frames are in the file")
    errors = [
        np.square(d.astype(np.float32) - p.planes[0]).mean()
        for d, p in zip(decoded, pictures, strict=True)
    ]
    psnr = 10 * np.log10(255**2 / np.mean(errors))
    if psnr < 35:
        raise RuntimeError(f"the file is {psnr:.1f} dB from the pictures, expected over 35")


def _whole(clip: Path, path: Path, model: str) -> vidpipe.Report:
    graph = build_graph(clip, path, model=model, overwrite=True)
    report = vidpipe.Pipeline(graph).run()
    if report.problems:
        raise RuntimeError("; ".join(report.problems))
    return report


def _decode(clip: Path) -> None:
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for _ in container.decode(stream):
            pass


def _encode(pictures: list[Frame], path: Path, facts: dict[str, Any]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(facts["encoder"], options=facts["encoder_options"])
        spec = pictures[0].spec
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.format.name
        stream.codec_context.time_base = spec.time_base
        for picture in pictures:
            frame = frame_from(picture.planes, spec.format)
            frame.pts, frame.time_base = picture.pts, spec.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _network(descriptor: Any, width: int, height: int) -> Callable[[], object]:
    """Return a call that runs the model's own file on a grey picture of the clip's size."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(descriptor.path), options, providers=[CPU_PROVIDER])
    multiple = descriptor.multiple
    height, width = (-(-n // multiple) * multiple for n in (height, width))
    channels = 1 if descriptor.channels == "luma" else 3
    feeds = {i.name: np.ones(1, np.float32) for i in session.get_inputs()[1:]}
    feeds[session.get_inputs()[0].name] = np.full((1, channels, height, width), 0.5, np.float32)
    return lambda: session.run(None, feeds)
