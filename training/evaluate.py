"""Measure models on the validation part of a folder of clips.

    python -m training.evaluate --root DIR --models vidpipe/models/*-2x.onnx --json report.json

Cases for x2 models: `clean` (each frame halved by FFmpeg's bicubic) and `crf27` and the like (then
encoded by libx264 at that CRF). Cases for x1 models: `same-crf32`, `same-noise10`. Every figure is
for luma: PSNR and VMAF-NEG against the original frames, and flicker, the mean absolute difference
between the change from frame to frame and that of the original, in codes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import onnxruntime
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from training import pictures

Plane = NDArray[np.uint8]
Enlarge = Callable[[av.VideoFrame], Plane]


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the frames of one clip."""

    psnr: float
    vmaf_neg: float
    flicker: float
    ms: float


def luma(frame: av.VideoFrame) -> Plane:
    """The Y plane of a planar 8-bit frame, uint8 (H, W)."""
    plane = frame.planes[0]
    stored = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return stored[: frame.height, : frame.width].copy()


def to_frame(picture: pictures.Picture) -> av.VideoFrame:
    """A yuv420p frame of a picture."""
    height, width = picture.y.shape
    packed = np.concatenate([p.reshape(-1) for p in (picture.y, picture.u, picture.v)])
    return av.VideoFrame.from_ndarray(packed.reshape(height * 3 // 2, width), "yuv420p")


def resize(frame: av.VideoFrame, factor: Fraction, method: Interpolation) -> av.VideoFrame:
    """FFmpeg's scaler."""
    return frame.reformat(
        width=int(frame.width * factor),
        height=int(frame.height * factor),
        format="yuv420p",
        interpolation=method,
    )


def encoded(frames: Sequence[av.VideoFrame], crf: int) -> list[av.VideoFrame]:
    """The frames through libx264, preset medium."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as sink:
        stream = sink.add_stream("libx264", rate=30, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 30)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as source:
        return list(source.decode(video=0))


def noisy(frame: av.VideoFrame, sigma: float, seed: int) -> av.VideoFrame:
    """The frame with white Gaussian noise on its luma."""
    rng = np.random.default_rng(seed)
    y = luma(frame)
    y = np.clip(np.rint(y + rng.normal(0, sigma, y.shape)), 0, 255).astype(np.uint8)
    planes = np.full((frame.height * 3 // 2, frame.width), 128, np.uint8)
    planes[: frame.height] = y
    return av.VideoFrame.from_ndarray(planes, "yuv420p")


def degraded(frames: list[av.VideoFrame], case: str) -> list[av.VideoFrame]:
    """What a model is given in the case of this name."""
    match = re.fullmatch(r"(same-)?(clean|crf|noise)(\d*)", case)
    if not match:
        raise ValueError(f"got case {case!r}, expected e.g. clean, crf27, same-crf32, same-noise10")
    same, kind, number = match.groups()
    if not same:
        frames = [resize(f, Fraction(1, 2), Interpolation.BICUBIC) for f in frames]
    if kind == "crf":
        return encoded(frames, int(number))
    if kind == "noise":
        return [noisy(f, float(number), i) for i, f in enumerate(frames)]
    return frames


def classical(method: Interpolation, scale: int) -> Enlarge:
    """FFmpeg's enlargement, or the frame itself at scale 1."""
    return lambda frame: luma(frame if scale == 1 else resize(frame, Fraction(scale), method))


def network(path: Path, strength: float, threads: int) -> Enlarge:
    """A model file: one of ours (luma) or a foreign one (RGB 0..1, one input)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    if session.get_inputs()[0].shape[1] == 3:
        return lambda frame: _through_rgb(session, names[0], frame)

    def enlarge(frame: av.VideoFrame) -> Plane:
        x = (luma(frame).astype(np.float32) - 16) / np.float32(219)
        feed = {"input": x[None, None]}
        if "strength" in names:
            feed["strength"] = np.array([strength], np.float32)
        (y,) = session.run(["output"], feed)
        return np.clip(np.rint(y[0, 0] * 219 + 16), 0, 255).astype(np.uint8)

    return enlarge


def _through_rgb(session: onnxruntime.InferenceSession, name: str, frame: av.VideoFrame) -> Plane:
    """BT.709 to RGB and back around a foreign network."""
    wide = frame.reformat(format="yuv444p", interpolation=Interpolation.BICUBIC).to_ndarray()
    y = (wide[0].astype(np.float32) - 16) / 219
    cb, cr = ((wide[i].astype(np.float32) - 128) / 224 for i in (1, 2))
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    rgb = np.clip(np.stack([red, green, blue]), 0, 1)[None]
    (out,) = session.run(None, {name: rgb.astype(np.float32)})
    luma_out = np.tensordot(np.array([0.2126, 0.7152, 0.0722]), np.clip(out[0], 0, 1), 1)
    return np.clip(np.rint(luma_out * 219 + 16), 0, 255).astype(np.uint8)


def psnr(reference: Plane, picture: Plane) -> float:
    """Peak signal-to-noise ratio in dB with peak 255; identical planes give 100."""
    error = float(np.mean((reference.astype(np.float64) - picture) ** 2))
    return 100.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def flicker(reference: Sequence[Plane], planes: Sequence[Plane]) -> float:
    """Mean absolute difference of the changes between neighbouring frames, in codes."""
    total = []
    for i in range(1, len(planes)):
        change = planes[i].astype(np.float32) - planes[i - 1]
        truth = reference[i].astype(np.float32) - reference[i - 1]
        total.append(float(np.abs(change - truth).mean()))
    return float(np.mean(total)) if total else 0.0


def vmaf_neg(reference: Sequence[Plane], planes: Sequence[Plane]) -> float:
    """Mean VMAF-NEG (model vmaf_v0.6.1neg) from the libvmaf of imageio-ffmpeg's program."""
    height, width = reference[0].shape
    width, height = width // 2 * 2, height // 2 * 2
    chroma = bytes([128]) * (width * height // 2)
    with tempfile.TemporaryDirectory() as folder:
        for name, group in (("ref", reference), ("out", planes)):
            with (Path(folder) / f"{name}.yuv").open("wb") as file:
                for plane in group:
                    # As yuv420p: FFmpeg would rescale gray, which it takes to be full range.
                    file.write(plane[:height, :width].tobytes() + chroma)
        raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}", "-r", "25"]
        graph = "[0:v][1:v]libvmaf=model=version=vmaf_v0.6.1neg:log_fmt=json:log_path=vmaf.json"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
        for name in ("out", "ref"):
            command += [*raw, "-i", f"{name}.yuv"]
        command += ["-lavfi", graph, "-f", "null", "-"]
        subprocess.run(command, cwd=folder, check=True)
        report = json.loads((Path(folder) / "vmaf.json").read_text())
    return float(report["pooled_metrics"]["vmaf"]["mean"])


def validation_window(path: Path, count: int) -> tuple[list[av.VideoFrame], int]:
    """Frames of a clip up to the end of a window of `count` frames, and where the window begins.

    The window lies in the clip's last odd second, which no training has seen.
    """
    whole = [to_frame(picture) for picture in pictures.read_clip(path)]
    with av.open(str(path)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    odd = [i for i, t in enumerate(times) if int(t - times[0]) % 2 == 1]
    last = odd[-1]
    begin = last
    while begin - 1 in set(odd):
        begin -= 1
    begin = begin + max(0, (last - begin + 1 - count) // 2)
    return whole[: begin + count], begin


def measure(
    reference: Sequence[Plane], sources: Sequence[av.VideoFrame], enlarge: Enlarge, vmaf: bool
) -> Figures:
    """Run one method over a window of frames."""
    started = time.perf_counter()
    planes = [enlarge(frame) for frame in sources]
    spent = (time.perf_counter() - started) * 1000 / len(planes)
    return Figures(
        psnr=float(np.mean([psnr(a, b) for a, b in zip(reference, planes, strict=True)])),
        vmaf_neg=vmaf_neg(reference, planes) if vmaf else 0.0,
        flicker=flicker(reference, planes),
        ms=spent,
    )


Report = dict[str, dict[str, dict[str, Figures]]]  # case -> method -> clip


def evaluate(
    root: Path, models: dict[str, Path], cases: list[str], *, frames: int, threads: int,
    strength: float, vmaf: bool,
) -> Report:  # fmt: skip
    """Measure every model and the classical methods in every case on every clip."""
    report: Report = {case: {} for case in cases}
    for path in pictures.clips(root, validation=True):
        whole, begin = validation_window(path, frames)
        reference = [luma(frame) for frame in whole[begin:]]
        for case in cases:
            scale = 1 if case.startswith("same-") else 2
            sources = degraded(whole, case)[begin:]
            methods: dict[str, Enlarge] = {}
            if scale == 2:
                methods["bicubic"] = classical(Interpolation.BICUBIC, scale)
                methods["lanczos"] = classical(Interpolation.LANCZOS, scale)
            else:
                methods["untouched"] = classical(Interpolation.BICUBIC, scale)
            for name, model in models.items():
                if ("-1x" in name) == (scale == 1):
                    methods[name] = network(model, strength, threads)
            for name, enlarge in methods.items():
                found = measure(reference, sources, enlarge, vmaf)
                report[case].setdefault(name, {})[path.stem] = found
    return report


def table(report: Report) -> str:
    """Gains over the baseline (Lanczos, or the untouched frames) as a Markdown table."""
    lines = []
    for case, methods in report.items():
        baseline = methods["untouched" if case.startswith("same-") else "lanczos"]
        clips = sorted(baseline)
        lines += [f"\n### {case}", "| method | " + " | ".join(clips) + " | mean | flicker | ms |"]
        lines.append("|---" * (len(clips) + 4) + "|")
        for name, found in methods.items():
            ours = found is baseline
            cells, gains = [], []
            for clip in clips:
                f, b = found[clip], baseline[clip]
                pair = (f.psnr, f.vmaf_neg) if ours else (f.psnr - b.psnr, f.vmaf_neg - b.vmaf_neg)
                gains.append(pair)
                cells.append(
                    f"{pair[0]:.2f} / {pair[1]:.1f}" if ours else f"{pair[0]:+.2f} / {pair[1]:+.1f}"
                )
            mean = np.mean(gains, axis=0)
            cells.append(
                f"{mean[0]:.2f} / {mean[1]:.1f}" if ours else f"{mean[0]:+.2f} / {mean[1]:+.1f}"
            )
            ratio = np.mean([found[c].flicker / max(baseline[c].flicker, 1e-6) for c in clips])
            cells.append(f"{ratio:.3f}")
            cells.append(f"{np.mean([found[c].ms for c in clips]):.0f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of clips")
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--cases", nargs="+", default=["clean", "crf27"])
    parser.add_argument("--frames", type=int, default=12, help="consecutive frames a clip")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--no-vmaf", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [p.stem for p in options.models]
    # Files of one name in several folders: tell them apart by the folder.
    labels = [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, options.models, strict=True)
    ]
    report = evaluate(
        options.root,
        dict(zip(labels, options.models, strict=True)),
        options.cases,
        frames=options.frames,
        threads=options.threads,
        strength=options.strength,
        vmaf=not options.no_vmaf,
    )
    print(table(report))
    if options.json:
        plain = {
            case: {m: {c: asdict(f) for c, f in clips.items()} for m, clips in methods.items()}
            for case, methods in report.items()
        }
        options.json.write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
