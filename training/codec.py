"""Pairs of compressed and clean pictures, made with the real libx264 and libx265.

Short clips are rendered from photographs (panning, zooming, moving cut-outs) or cut from real
clips, halved, given sensor noise in a part of the cases, encoded, decoded, and a few frames of each
are kept: mostly from the middle of groups of pictures, seldom key frames.

    python -m training.codec --root DIR --out FOLDER --jobs N [--seconds S] [--workers N]

Writes banks `FOLDER/double-*` with the layers `lr` (decoded), `clean` (before noise and encoding)
and `hr` (scale 2), and `FOLDER/same-*` with `lr` and `clean` only, from clips encoded at their own
size.
"""

from __future__ import annotations

import argparse
import io
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from training import degrade, pictures
from training.data import BankWriter
from training.pictures import Picture, Plane, plane, render, to_frame

DOUBLE = {"lr": 1, "clean": 1, "hr": 2}
SAME = {"lr": 1, "clean": 1}


@dataclass(frozen=True, slots=True)
class Mix:
    """What a set is made of: mean and spread of libx264's CRF, share of clips of one size."""

    crf: tuple[float, float] = (27.5, 4.5)
    same: float = 0.25


@dataclass(frozen=True, slots=True)
class Encoding:
    """One setting of a real encoder."""

    codec: str
    crf: int
    preset: str
    keyint: int
    tune: str | None = None

    @staticmethod
    def draw(rng: np.random.Generator, mix: Mix) -> Encoding:
        """Mostly H.264 in its common settings; qualities weighted to the middle."""
        keyint = int(rng.choice([250, 250, 250, 12]))
        if rng.random() < 0.25:
            preset = str(rng.choice(["ultrafast", "superfast", "fast", "medium"]))
            return Encoding("libx265", int(rng.integers(20, 39)), preset, keyint)
        crf = int(np.clip(rng.normal(*mix.crf), 17, 39).round())
        preset = str(
            rng.choice(["ultrafast", "veryfast", "fast", "medium", "medium", "medium", "slow"])
        )
        tune = (
            None
            if preset == "ultrafast" or rng.random() < 0.75
            else str(rng.choice(["film", "animation"]))
        )
        return Encoding("libx264", crf, preset, keyint, tune)


def round_trip(frames: list[Picture], encoding: Encoding) -> tuple[list[Plane], list[bool]]:
    """Encode and decode; returns the decoded luma planes and which of them are key frames."""
    height, width = frames[0].y.shape
    options = {"crf": str(encoding.crf), "preset": encoding.preset, "g": str(encoding.keyint)}
    if encoding.tune:
        options["tune"] = encoding.tune
    if encoding.codec == "libx265":
        options["x265-params"] = (
            f"log-level=none:pools=none:frame-threads=1:keyint={encoding.keyint}"
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as sink:
        stream = sink.add_stream(encoding.codec, rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(frames):
            frame = to_frame(picture)
            frame.pts = number
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as source:
        source.streams.video[0].thread_count = 1
        decoded = list(source.decode(video=0))
    planes = [plane(frame) for frame in decoded]
    if len(planes) != len(frames):
        raise RuntimeError(f"{encoding}: got {len(planes)} frames back, expected {len(frames)}")
    return planes, [bool(frame.key_frame) for frame in decoded]


def overlay(
    frames: list[Picture], cutout: list[Picture], rng: np.random.Generator
) -> list[Picture]:
    """Move an elliptic cut-out of another moving picture over the frames."""
    height, width = frames[0].y.shape
    radius = rng.uniform(0.12, 0.35, 2) * min(height, width)
    centre = rng.uniform(0.2, 0.8, 2) * (height, width)
    speed = rng.normal(0, 4, 2)
    rows, columns = np.ogrid[:height, :width]
    result = []
    for number, (below, above) in enumerate(zip(frames, cutout, strict=True)):
        cy, cx = centre + speed * number
        reach = ((rows - cy) / radius[0]) ** 2 + ((columns - cx) / radius[1]) ** 2
        alpha = np.clip((1.05 - reach) / 0.1, 0, 1).astype(np.float32)
        half = alpha[::2, ::2]

        def mix(a: Plane, b: Plane, weight: NDArray[np.float32]) -> Plane:
            return np.rint(a + weight * (b.astype(np.float32) - a)).astype(np.uint8)

        result.append(
            Picture(
                below.name,
                mix(below.y, above.y, alpha),
                mix(below.u, above.u, half),
                mix(below.v, above.v, half),
            )
        )
    return result


def _noisy(picture: Picture, sigma: float, rng: np.random.Generator) -> Picture:
    def plane(values: Plane, strength: float) -> Plane:
        noise = rng.standard_normal(values.shape, np.float32) * np.float32(strength)
        return np.clip(np.rint(values + noise), 0, 255).astype(np.uint8)

    return Picture(
        picture.name,
        plane(picture.y, sigma),
        plane(picture.u, 0.7 * sigma),
        plane(picture.v, 0.7 * sigma),
    )


def _halved(picture: Picture, kernel: NDArray[np.float64]) -> Picture:
    def plane(values: Plane) -> Plane:
        return np.clip(np.rint(degrade.halve(values, kernel)), 0, 255).astype(np.uint8)

    return Picture(picture.name, *(plane(p) for p in (picture.y, picture.u, picture.v)))


def _chosen(rng: np.random.Generator, keys: list[bool], count: int) -> list[int]:
    middle = [i for i, key in enumerate(keys) if not key and i >= 2]
    heads = [i for i, key in enumerate(keys) if key]
    count = min(count, len(middle))
    picked = [int(i) for i in rng.choice(middle, count, replace=False)] if middle else []
    if heads and (not picked or rng.random() < 0.5):
        picked.append(int(rng.choice(heads)))
    return picked


def _draw_kernel(rng: np.random.Generator) -> NDArray[np.float64]:
    names = list(degrade.KERNEL_SHARES)
    name = names[int(rng.choice(len(names), p=list(degrade.KERNEL_SHARES.values())))]
    blur = float(rng.uniform(0.4, 0.9)) if rng.random() < 0.08 else 0.0
    return degrade.halving_kernel(name, blur)


def _add(
    writer: BankWriter, truth: list[Picture], small: list[Picture], rng: np.random.Generator,
    count: int, weight: float, mix: Mix,
) -> None:  # fmt: skip
    """Encode `small` and store some frames; `truth` is `small` itself for banks of one size."""
    sent = small
    # Faint noise cannot be told from grain that belongs to the picture, so none is taught.
    if rng.random() < 0.1:
        sigma = float(rng.uniform(3, 12))
        sent = [_noisy(picture, sigma, rng) for picture in small]
    decoded, keys = round_trip(sent, Encoding.draw(rng, mix))
    for i in _chosen(rng, keys, count):
        planes = {"lr": decoded[i], "clean": small[i].y, "hr": truth[i].y}
        writer.add(weight * decoded[i].size, **{name: planes[name] for name in writer.layers})


@lru_cache(maxsize=6)
def _photo(path: Path) -> Picture:
    return pictures.load_photo(path)


@lru_cache(maxsize=2)
def _clip(path: Path) -> tuple[tuple[Picture, ...], ...]:
    """The even seconds of a clip, each second apart."""
    seconds: list[list[Picture]] = []
    last = -2
    for picture in pictures.read_clip(path, 0):
        number = int(picture.name.rsplit("#", 1)[1])
        if not seconds or number != last + 1 or len(seconds[-1]) >= 25:
            seconds.append([])
        seconds[-1].append(picture)
        last = number
    return tuple(tuple(s) for s in seconds if len(s) >= 8)


def _still_job(
    job: int, seed: int, root: Path, double: BankWriter, same: BankWriter, mix: Mix
) -> None:
    rng = np.random.default_rng((seed, job))
    stills = pictures.photos(root, validation=False)
    path = stills[int(rng.integers(len(stills)))]
    if rng.random() < 0.08:
        picture = pictures.lettering(int(rng.integers(1 << 30)), 1280, 720)
    else:
        picture = _photo(path)
    own_size = rng.random() < mix.same
    width, height = (448, 320) if own_size else (768, 576)
    if picture.y.shape[0] < height or picture.y.shape[1] < width:
        return
    frames = render(picture, rng, width, height)
    if rng.random() < 0.3:
        other = _photo(stills[int(rng.integers(len(stills)))])
        if other.y.shape[0] >= height and other.y.shape[1] >= width:
            frames = overlay(frames, render(other, rng, width, height), rng)
    if own_size:
        _add(same, frames, frames, rng, 4, 1.0, mix)
    else:
        kernel = _draw_kernel(rng)
        _add(double, frames, [_halved(picture, kernel) for picture in frames], rng, 4, 1.0, mix)


def _clip_job(
    job: int, seed: int, root: Path, double: BankWriter, same: BankWriter, mix: Mix
) -> None:
    rng = np.random.default_rng((seed, job))
    paths = pictures.clips(root, validation=False)
    seconds = _clip(paths[job % len(paths)])
    frames = list(seconds[int(rng.integers(len(seconds)))])
    factor = float(rng.choice([1.0, 1.0, 0.75, 0.5]))
    height, width = (int(n * factor) // 4 * 4 for n in frames[0].y.shape)
    if factor != 1.0 and min(height, width) >= 320:
        frames = [pictures.scaled(picture, factor) for picture in frames]
    height, width = frames[0].y.shape
    own_size = rng.random() < mix.same
    cut_h, cut_w = min(height, 640 if own_size else 720), min(width, 960)
    top = int(rng.integers(height - cut_h + 1)) // 4 * 4
    left = int(rng.integers(width - cut_w + 1)) // 4 * 4

    def cut(picture: Picture) -> Picture:
        y = picture.y[top : top + cut_h, left : left + cut_w]
        rows, columns = slice(top // 2, (top + cut_h) // 2), slice(left // 2, (left + cut_w) // 2)
        return Picture(picture.name, y, picture.u[rows, columns], picture.v[rows, columns])

    frames = [cut(picture) for picture in frames]
    if own_size:
        _add(same, frames, frames, rng, 4, 0.6, mix)
    else:
        kernel = _draw_kernel(rng)
        _add(double, frames, [_halved(picture, kernel) for picture in frames], rng, 6, 1.0, mix)


def _work(arguments: tuple[int, int, int, int, Path, Path, float, Mix]) -> int:
    worker, workers, jobs, seed, root, out, deadline, mix = arguments
    double = BankWriter(out / f"double-{worker}", DOUBLE)
    same = BankWriter(out / f"same-{worker}", SAME)
    for job in range(worker, jobs, workers):
        if time.monotonic() > deadline:
            break
        # Every fourth job of a worker, and different clips for neighbouring workers.
        if (job // workers) % 4 == 2:
            _clip_job(job, seed, root, double, same, mix)
        else:
            _still_job(job, seed, root, double, same, mix)
    double.close()
    same.close()
    return len(double.index) + len(same.index)


def make_pairs(
    root: Path, out: Path, jobs: int, seed: int, seconds: float, workers: int, mix: Mix
) -> None:
    """Run all jobs, or as many as `seconds` allow, and mark the folder complete."""
    deadline = time.monotonic() + seconds
    started = time.monotonic()
    parts = [(w, workers, jobs, seed, root, out, deadline, mix) for w in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        made = sum(pool.map(_work, parts))
    (out / "DONE").touch()
    print(f"pairs {out}: {made} frames in {time.monotonic() - started:.0f} s")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4000, help="clips to render and encode")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no new clip after this time"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--crf", type=float, nargs=2, default=Mix().crf, help="mean and spread of libx264's CRF"
    )
    parser.add_argument(
        "--same", type=float, default=Mix().same, help="share of clips encoded at their own size"
    )
    options = parser.parse_args()
    make_pairs(
        options.root,
        options.out,
        options.jobs,
        options.seed,
        options.seconds,
        options.workers,
        Mix((options.crf[0], options.crf[1]), options.same),
    )


if __name__ == "__main__":
    main()
