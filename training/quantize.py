"""Make the int8 copies of the nano tier and measure what they lose against the truth.

    python -m training.quantize --root CLIPS --out vidpipe/models/int8

Calibrated on even seconds of the clips and on none of those that are measured, in the cases
that the network is for (`training.evaluate`), and on drawn pages of text where that costs little.
Weights are kept within 7 bits, so that one file serves processors with and without VNNI.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from training import evaluate
from training.pictures import lettering, read_clip, to_frame
from vidpipe.frame import Color, Frame, FrameSpec, Matrix, Range, pixel_format
from vidpipe.model.descriptor import describe, find_model
from vidpipe.model.quantize import convert

CASES = {
    "nano-2x": ("clean", "crf27"),
    "clean-2x-nano": ("clean", "crf27"),
    "clean-1x-nano": ("same-crf32", "same-noise10"),
}
CALIBRATE = {"nano-2x": ("clean",)}
PAGES = {"clean-1x-nano": 2, "clean-2x-nano": 2}
"""Pages of text to calibrate on as well. `nano-2x` would lose 0.2 dB on pictures by it."""

FIRST_PAGE = 1000  # a seed that no page of the training had
WINDOW = 8
PER_CLIP = 4


def planes(frame: av.VideoFrame) -> Frame:
    """A yuv420p picture of limited range as vidpipe's frame."""
    spec = FrameSpec(
        width=frame.width,
        height=frame.height,
        format=pixel_format("yuv420p"),
        color=Color(matrix=Matrix.BT709, range=Range.LIMITED),
        time_base=Fraction(1, 25),
        rate=Fraction(25),
    )
    stored = frame.to_ndarray().reshape(-1)
    found, at = [], 0
    for height, width in spec.plane_shapes():
        found.append(stored[at : at + height * width].reshape(height, width))
        at += height * width
    return Frame(tuple(found), spec, 0)


def even_frames(path: Path, count: int) -> list[av.VideoFrame]:
    """Frames of a clip's even seconds, evenly spread."""
    pictures = [to_frame(p) for p in read_clip(path)]
    with av.open(str(path)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    even = [i for i, t in enumerate(times) if int(t - times[0]) % 2 == 0]
    return [pictures[even[i]] for i in np.linspace(0, len(even) - 1, count).astype(int)]


def loss_db(original: Path, copy: Path, clips: Sequence[Path], case: str) -> dict[str, float]:
    """PSNR against the truth that is lost by the copy, in dB, for each clip."""
    found = {}
    files = {"original": original, "copy": copy}
    for clip in clips:
        scores = evaluate.measure(
            evaluate.validation_window(clip, WINDOW),
            case,
            {name: evaluate.network(path, 1.0, 2) for name, path in files.items()},
            vmaf=False,
        )
        found[clip.stem] = round(scores["original"].psnr - scores["copy"].psnr, 3)
    found["mean"] = round(float(np.mean(list(found.values()))), 3)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=sorted(CASES))
    options = parser.parse_args()
    names = ("bigbuckbunny.mp4", "city-night.mpg", "marathon.mp4", "motorway.mp4", "portrait60.mp4")
    clips = [options.root / name for name in names]
    for name in options.models:
        frames, held_out = [], []
        for clip in clips:
            pictures = even_frames(clip, PER_CLIP + 1)
            for case in CALIBRATE.get(name, CASES[name]):
                *seen, last = [planes(f) for f in evaluate.degraded(pictures, case)]
                frames += seen
                held_out.append(last)
        pages = (lettering(FIRST_PAGE + n, 640, 360) for n in range(PAGES.get(name, 0)))
        frames += [planes(to_frame(page)) for page in pages]
        model = describe(find_model(name))
        verdict = convert(
            model, options.out / f"{name}.onnx", "int8", frames, held_out, reduce_range=True
        )
        losses = {case: loss_db(model.path, verdict.path, clips, case) for case in CASES[name]}
        print(json.dumps({**verdict.to_dict(), "loss_db": losses}, indent=2))


if __name__ == "__main__":
    main()
