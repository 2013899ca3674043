"""Pictures and clips as 8-bit limited-range YCbCr 4:2:0, split for training and validation.

Every array here is NumPy on the host. A plane holds limited-range codes (luma 16..235, chroma
16..240) as uint8, in row-major (height, width) order, with even sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Plane = NDArray[np.uint8]

PHOTO_SUFFIXES = (".webp", ".png", ".jpg", ".jpeg", ".tif", ".bmp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".mpg", ".webm", ".mov")

# Whole photographs, one whole clip and the odd seconds of the other clips are never trained on.
VALIDATION_PHOTOS = frozenset(
    {
        "scenetext04",
        "valendas",
        "cincinnati-bridge",
        "european-honey-bee",
        "kite-2560x1600",
        "picture_1a_by_freespace",
        "wine_by_jakkub_mede",
    }
)
HELD_OUT_CLIPS = frozenset({"marathon"})
# An interlaced clip and a copy of another clip with dropped frames: useless as truth.
UNUSED_CLIPS = frozenset({"interlaced", "vfr"})

LENGTH = 20  # frames in a rendered clip

_WORDS = (  # noqa: SIM905
    "the of and to in is that for it was on are as with they at be this from have or by one had "
    "not but what all were when we there can an your which said if do will each about how up out "
    "LIVE NEWS 24 7 OPEN STOP EXIT 1080p 59.94 2026 +12% -0.6 HD TAXI Hotel Paris Tokyo Berlin"
).split()


@dataclass(frozen=True, slots=True)
class Picture:
    """One 4:2:0 picture: `y` uint8 (H, W), `u` and `v` uint8 (H/2, W/2), limited-range codes."""

    name: str
    y: Plane
    u: Plane
    v: Plane


def plane(frame: av.VideoFrame, index: int = 0) -> Plane:
    """A copy of one plane of a planar 8-bit frame, uint8 (H, W); luma is plane 0."""
    stored = frame.planes[index]
    rows = np.frombuffer(stored, np.uint8).reshape(-1, stored.line_size)
    return rows[: stored.height, : stored.width].copy()


def to_frame(picture: Picture) -> av.VideoFrame:
    """A yuv420p frame of a picture."""
    height, width = picture.y.shape
    packed = np.concatenate([p.reshape(-1) for p in (picture.y, picture.u, picture.v)])
    return av.VideoFrame.from_ndarray(packed.reshape(height * 3 // 2, width), "yuv420p")


def from_rgb(name: str, rgb: Image.Image) -> Picture:
    """Convert an RGB picture (any size) to BT.709 limited range (ITU-R BT.709-6, item 3)."""
    width, height = rgb.width // 4 * 4, rgb.height // 4 * 4
    pixels = np.asarray(rgb.convert("RGB"), dtype=np.float32)[:height, :width] / 255
    luma = pixels @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    blue = (pixels[..., 2] - luma) / 1.8556
    red = (pixels[..., 0] - luma) / 1.5748

    def halved(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        return plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3))

    def codes(plane: NDArray[np.float32], gain: float, offset: float) -> Plane:
        return np.clip(np.rint(plane * gain + offset), 0, 255).astype(np.uint8)

    return Picture(
        name, codes(luma, 219, 16), codes(halved(blue), 224, 128), codes(halved(red), 224, 128)
    )


def scaled(picture: Picture, factor: float) -> Picture:
    """The picture at `factor` of its size (Lanczos), sizes cut to multiples of 4."""
    width = int(picture.y.shape[1] * factor) // 4 * 4
    height = int(picture.y.shape[0] * factor) // 4 * 4

    def plane(values: Plane, size: tuple[int, int]) -> Plane:
        return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.LANCZOS))

    half = (width // 2, height // 2)
    return Picture(
        f"{picture.name}@{factor:g}",
        plane(picture.y, (width, height)),
        plane(picture.u, half),
        plane(picture.v, half),
    )


def load_photo(path: Path) -> Picture:
    """Read one still picture."""
    with Image.open(path) as image:
        return from_rgb(path.stem, image.convert("RGB"))


def read_clip(path: Path, parity: int | None = None, step: int = 1) -> Iterator[Picture]:
    """Decode a clip; `parity` 0 or 1 keeps even or odd seconds, `step` every step-th frame kept.

    The decoder's planes are taken as they are, so a clip must be 8-bit 4:2:0 of limited range.
    """
    with av.open(str(path)) as container:
        kept = 0
        start: float | None = None
        for frame in container.decode(video=0):
            start = frame.time if start is None else start
            if parity is not None and int(frame.time - start) % 2 != parity:
                continue
            kept += 1
            if (kept - 1) % step:
                continue
            height, width = frame.height // 4 * 4, frame.width // 4 * 4
            y = plane(frame)[:height, :width]
            u, v = (plane(frame, i)[: height // 2, : width // 2] for i in (1, 2))
            yield Picture(f"{path.stem}#{kept - 1}", y, u, v)


def _view(plane: Plane, box: tuple[float, ...], size: tuple[int, int]) -> Plane:
    exact = all(float(v).is_integer() for v in box) and size == (box[2] - box[0], box[3] - box[1])
    if exact:
        x0, y0, x1, y1 = map(int, box)
        return plane[y0:y1, x0:x1]
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC, box=box))


def render(picture: Picture, rng: np.random.Generator, width: int, height: int) -> list[Picture]:
    """A moving view of `width` x `height` over a still picture, `LENGTH` frames."""
    full_h, full_w = picture.y.shape
    limit = min(full_w / width, full_h / height)
    zoom = min(limit, float(rng.choice([1.0, rng.uniform(1.1, 1.6), rng.uniform(1.5, 2.6)])))
    kind = rng.choice(["still", "pan", "pan", "zoom"])
    speed = rng.normal(0, 3.0, 2) if kind != "still" else np.zeros(2)
    if zoom == 1.0 and rng.random() < 0.6:
        speed = np.rint(speed / 2) * 2
    growth = float(rng.uniform(-0.008, 0.008)) if kind == "zoom" else 0.0
    start = rng.random(2)
    frames = []
    for number in range(LENGTH):
        factor = float(np.clip(zoom * (1 + growth * number), 1.0, limit))
        view_w, view_h = width * factor, height * factor
        room = np.array([full_w - view_w, full_h - view_h])
        corner = np.clip(start * room + speed * number, 0, np.maximum(room, 0))
        if factor == 1.0 and np.all(speed == np.rint(speed)):
            corner = corner // 2 * 2
        x, y = float(corner[0]), float(corner[1])
        box = (x, y, x + view_w, y + view_h)
        box = (box[0], box[1], min(box[2], float(full_w)), min(box[3], float(full_h)))
        small = tuple(v / 2 for v in box)
        half = (width // 2, height // 2)
        frames.append(
            Picture(
                picture.name,
                _view(picture.y, box, (width, height)),
                _view(picture.u, small, half),
                _view(picture.v, small, half),
            )
        )
    return frames


def lettering(seed: int, width: int = 960, height: int = 540) -> Picture:
    """A page of text and line art, drawn at twice the size and reduced."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (2 * width, 2 * height))
    ramp = np.linspace(0, 1, 2 * height)[:, None, None]
    top, bottom = rng.integers(0, 256, (2, 3))
    page.paste(
        Image.fromarray(
            np.broadcast_to(top + (bottom - top) * ramp, (2 * height, 2 * width, 3)).astype(
                np.uint8
            )
        )
    )
    draw = ImageDraw.Draw(page)
    for _ in range(14):
        x, y = rng.integers(0, 2 * width), rng.integers(0, 2 * height)
        w, h = rng.integers(20, 700, 2)
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        kind = rng.integers(4)
        if kind == 0:
            draw.rectangle((x, y, x + w, y + h), fill=fill)
        elif kind == 1:
            draw.ellipse((x, y, x + w, y + h), fill=fill, outline="white", width=4)
        else:
            draw.line((x, y, x + w, y + h - 300), fill=fill, width=int(rng.integers(2, 12)))
    for _ in range(60):
        size = int(rng.choice([18, 22, 26, 32, 40, 56, 80, 120]))
        words = " ".join(rng.choice(_WORDS, rng.integers(2, 9)))
        tone = int(rng.choice([0, 0, 255, 255, rng.integers(256)]))
        x, y = rng.integers(-100, 2 * width - 50), rng.integers(0, 2 * height - 10)
        draw.text(
            (int(x), int(y)),
            words,
            fill=(tone, tone, tone),
            font=ImageFont.load_default(size),
            stroke_width=int(rng.integers(0, 3)) if size > 30 else 0,
            stroke_fill=(255 - tone,) * 3,
        )
    return from_rgb(f"lettering-{seed}", page.resize((width, height), Image.Resampling.BOX))


def files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """All files below `root` with one of the suffixes, sorted, so that runs are repeatable."""
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes)


def photos(root: Path, *, validation: bool) -> list[Path]:
    """Still pictures below `root` that belong to the training or to the validation part."""
    return [p for p in files(root, PHOTO_SUFFIXES) if (p.stem in VALIDATION_PHOTOS) == validation]


def clips(root: Path, *, validation: bool) -> list[Path]:
    """Clips below `root`: for training those not held out, for validation all usable ones."""
    usable = [p for p in files(root, CLIP_SUFFIXES) if p.stem not in UNUSED_CLIPS]
    return usable if validation else [p for p in usable if p.stem not in HELD_OUT_CLIPS]


def stable_seed(*parts: object) -> int:
    """A seed that is the same in every process and every run."""
    return zlib.crc32("/".join(map(str, parts)).encode())
