"""Measure models on pictures that no training has seen.

    python -m training.evaluate --root DIR --models vidpipe/models/*2x.onnx --json report.json

Cases for x2 models: `clean` (each frame halved by FFmpeg's bicubic) and `crf27` and the like (then
encoded by libx264 at that CRF). Cases for x1 models: `same-crf32`, `same-noise10`. The original
frames, what each method is given and what it makes of it are lossless files (FFV1). Our models go
through `vidpipe.enhance`, and `vidpipe.compare` measures all: PSNR and VMAF-NEG of luma against the
original, and flicker, the mean absolute difference between the change from frame to frame and that
of the original, in codes.

What is measured (`--source`): `clips`, a window in each clip's last odd second; `earlier`, one in
each of its other odd seconds; `photos`, slow moves over the photographs kept for validation.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import onnxruntime
from av.video.reformatter import Interpolation

import vidpipe
from training import pictures
from training.pictures import Plane, to_frame
from vidpipe.compare import compare, has_vmaf
from vidpipe.model.descriptor import describe

Method = Callable[[Path, Path], float]
"""Makes one lossless file from another; returns the milliseconds of a frame."""
SOURCES = ("clips", "earlier", "photos")
PHOTO_SIZE = (960, 540)  # of the moves over photographs


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the frames of one scene."""

    psnr: float
    vmaf_neg: float
    flicker: float
    ms: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Neighbouring yuv420p frames; those from number `begin` on are measured.

    The frames before give an encoder its run-up.
    """

    name: str
    frames: list[av.VideoFrame]
    begin: int


def resize(frame: av.VideoFrame, factor: Fraction, method: Interpolation) -> av.VideoFrame:
    """FFmpeg's scaler."""
    return frame.reformat(
        width=int(frame.width * factor),
        height=int(frame.height * factor),
        format="yuv420p",
        interpolation=method,
    )


def write(path: Path, frames: Sequence[av.VideoFrame]) -> None:
    """Write yuv420p frames, exactly, as FFV1 in Matroska."""
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            # Frames may serve several times, and muxing wants pts and base of this stream.
            copy = av.VideoFrame.from_ndarray(frame.to_ndarray(), "yuv420p")
            copy.pts, copy.time_base = number, Fraction(1, 25)
            sink.mux(stream.encode(copy))
        sink.mux(stream.encode(None))


def read(path: Path) -> list[av.VideoFrame]:
    """All frames of a file."""
    with av.open(str(path), "r") as source:
        return list(source.decode(video=0))


def encoded(frames: Sequence[av.VideoFrame], crf: int) -> list[av.VideoFrame]:
    """The frames through libx264, preset medium."""
    # With AVX-512, x264 does not make the same stream of the same frames every time.
    settings = {"crf": str(crf), "x264-params": "asm=SSE4.2"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as sink:
        stream = sink.add_stream("libx264", rate=30, options=settings)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 30)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as source:
        return list(source.decode(video=0))


def gray(y: Plane) -> av.VideoFrame:
    """A yuv420p frame of luma (H, W) alone."""
    planes = np.full((y.shape[0] * 3 // 2, y.shape[1]), 128, np.uint8)
    planes[: y.shape[0]] = y
    return av.VideoFrame.from_ndarray(planes, "yuv420p")


def noisy(frame: av.VideoFrame, sigma: float, seed: int) -> av.VideoFrame:
    """The frame with white Gaussian noise on its luma."""
    rng = np.random.default_rng(seed)
    y = pictures.plane(frame)
    return gray(np.clip(np.rint(y + rng.normal(0, sigma, y.shape)), 0, 255).astype(np.uint8))


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


def _each(change: Callable[[av.VideoFrame], av.VideoFrame]) -> Method:
    """A method that changes frame by frame."""

    def method(source: Path, out: Path) -> float:
        frames = read(source)
        started = time.perf_counter()
        changed = [change(frame) for frame in frames]
        spent = (time.perf_counter() - started) * 1000 / len(frames)
        write(out, changed)
        return spent

    return method


def classical(method: Interpolation, scale: int) -> Method:
    """FFmpeg's enlargement, or the frame itself at scale 1."""
    return _each(lambda frame: frame if scale == 1 else resize(frame, Fraction(scale), method))


def network(path: Path, strength: float, threads: int) -> Method:
    """A model file on the CPU: a luma one as `vidpipe run` does it, or a foreign one.

    Foreign networks (RGB 0..1, one input) are run by themselves; only luma is kept.
    """
    model = describe(path)
    if model.channels != "luma":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return _each(lambda frame: _through_rgb(session, model.input, frame))

    def enhance(source: Path, out: Path) -> float:
        report = vidpipe.enhance(
            source,
            out,
            model=path,
            denoise=strength if model.strength else None,
            device="cpu",
            threads=threads,
            codec="ffv1",
        )
        if report.problems:
            raise RuntimeError(f"{path}: {'; '.join(report.problems)}")
        stage = report.stage("model")
        return stage.busy_s * 1000 / stage.frames_out

    return enhance


def _through_rgb(
    session: onnxruntime.InferenceSession, name: str, frame: av.VideoFrame
) -> av.VideoFrame:
    """BT.709 to RGB and back around a foreign network."""
    wide = frame.reformat(format="yuv444p", interpolation=Interpolation.BICUBIC).to_ndarray()
    y = (wide[0].astype(np.float32) - 16) / 219
    cb, cr = ((wide[i].astype(np.float32) - 128) / 224 for i in (1, 2))
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    rgb = np.clip(np.stack([red, green, blue]), 0, 1)[None]
    (out,) = session.run(None, {name: rgb.astype(np.float32)})
    luma_out = np.tensordot(np.array([0.2126, 0.7152, 0.0722]), np.clip(out[0], 0, 1), 1)
    return gray(np.clip(np.rint(luma_out * 219 + 16), 0, 255).astype(np.uint8))


def methods(
    case: str, models: Mapping[str, Path], strength: float, threads: int
) -> dict[str, Method]:
    """The classical methods and the models that fit a case, by name."""
    scale = 1 if case.startswith("same-") else 2
    found: dict[str, Method] = {}
    if scale == 2:
        found["bicubic"] = classical(Interpolation.BICUBIC, scale)
        found["lanczos"] = classical(Interpolation.LANCZOS, scale)
    else:
        found["untouched"] = classical(Interpolation.BICUBIC, scale)
    for name, model in models.items():
        if ("-1x" in name) == (scale == 1):
            found[name] = network(model, strength, threads)
    return found


def _windows(path: Path, count: int) -> list[tuple[int, int]]:
    """The middle of each odd second of a clip: its number, and the first of `count` frames."""
    with av.open(str(path)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    seconds: dict[int, list[int]] = {}
    for number, moment in enumerate(times):
        seconds.setdefault(int(moment - times[0]), []).append(number)
    return [
        (second, numbers[0] + max(0, (len(numbers) - count) // 2))
        for second, numbers in seconds.items()
        if second % 2 == 1
    ]


def validation_window(path: Path, count: int) -> Scene:
    """Up to `count` frames in the clip's last odd second, which no training has seen."""
    begin = _windows(path, count)[-1][1]
    frames = [to_frame(picture) for picture in pictures.read_clip(path)]
    return Scene(path.stem, frames[: begin + count], begin)


def _move(photo: pictures.Picture) -> list[pictures.Picture]:
    """A pan or a zoom over a photograph, the same one every time."""
    height, width = (
        min(have, limit) // 4 * 4
        for have, limit in zip(photo.y.shape, reversed(PHOTO_SIZE), strict=True)
    )
    first = pictures.stable_seed(photo.name)
    for seed in range(first, first + 20):
        frames = pictures.render(photo, np.random.default_rng(seed), width, height)
        if not np.array_equal(frames[0].y, frames[-1].y):
            return frames
    raise ValueError(
        f"{photo.name}: {photo.y.shape} leaves no room to move {width}x{height} over it"
    )


def scenes(root: Path, source: str, count: int) -> Iterator[Scene]:
    """All scenes of one of the `SOURCES`, `count` frames each to be measured."""
    if source == "photos":
        for path in pictures.photos(root, validation=True):
            frames = [to_frame(picture) for picture in _move(pictures.load_photo(path))]
            begin = (len(frames) - count) // 2
            if begin < 0:
                raise ValueError(f"got {count} frames, expected at most {len(frames)}")
            yield Scene(path.stem, frames[: begin + count], begin)
        return
    for path in pictures.clips(root, validation=True):
        if source == "clips":
            yield validation_window(path, count)
            continue
        frames = [to_frame(picture) for picture in pictures.read_clip(path)]
        for second, begin in _windows(path, count)[:-1]:
            yield Scene(f"{path.stem}@{second}s", frames[: begin + count], begin)


def run(
    scene: Scene, case: str, found: Mapping[str, Method], folder: Path
) -> tuple[Path, dict[str, Path], dict[str, float]]:
    """Run methods over a scene, from file to file in a folder.

    Returns the file of the original frames, and each method's file and milliseconds a frame.
    """
    original, given = folder / "original.mkv", folder / "given.mkv"
    write(original, scene.frames[scene.begin :])
    write(given, degraded(scene.frames, case)[scene.begin :])
    outputs = {name: folder / f"out-{number}.mkv" for number, name in enumerate(found)}
    return original, outputs, {name: found[name](given, out) for name, out in outputs.items()}


def measure(
    scene: Scene, case: str, found: Mapping[str, Method], *, vmaf: bool
) -> dict[str, Figures]:
    """Run methods over a scene, and compare what they made with the original."""
    with tempfile.TemporaryDirectory() as folder:
        original, outputs, ms = run(scene, case, found, Path(folder))
        scores = compare(original, list(outputs.values()), vmaf=vmaf).scores
    figures = {}
    for name, score in zip(found, scores, strict=True):
        if score.frames != len(scene.frames) - scene.begin:
            raise RuntimeError(f"{scene.name}, {case}: a method lost frames, {score.frames} left")
        figures[name] = Figures(score.psnr_db, score.vmaf_neg or 0.0, score.flicker, ms[name])
    return figures


Report = dict[str, dict[str, dict[str, Figures]]]  # case -> method -> scene


def evaluate(
    root: Path, models: dict[str, Path], cases: list[str], *, source: str, frames: int,
    threads: int, strength: float, vmaf: bool,
) -> Report:  # fmt: skip
    """Measure every model and the classical methods in every case on every scene."""
    report: Report = {case: {} for case in cases}
    prepared = {case: methods(case, models, strength, threads) for case in cases}
    for scene in scenes(root, source, frames):
        for case, found in prepared.items():
            for name, figures in measure(scene, case, found, vmaf=vmaf).items():
                report[case].setdefault(name, {})[scene.name] = figures
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
    parser.add_argument("--root", type=Path, required=True, help="folder of clips, of pictures")
    parser.add_argument("--source", choices=SOURCES, default="clips")
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--cases", nargs="+", default=["clean", "crf27"])
    parser.add_argument("--frames", type=int, default=12, help="consecutive frames a scene")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--no-vmaf", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.no_vmaf or has_vmaf()):
        parser.error("this PyAV has no libvmaf; use PyAV 19 (Python 3.12 and later), or --no-vmaf")
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
        source=options.source,
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
