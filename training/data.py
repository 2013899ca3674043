"""Banks: all training planes in one flat uint8 buffer on the training device, cropped there.

On disk a bank is a folder with `index.json` (a list of `[offset, height, width, weight]`) and one
raw file a layer. Layers of one bank share the index: a layer of scale s stores each plane s times
as wide and as high, at s*s times the offset.

    python -m training.data --root DIR --out BANK [--workers N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import pictures
from training.pictures import Picture, Plane

# Share of the crops that each kind of source gets, whatever its size in bytes.
SHARES = {"photo": 0.55, "frame": 0.12, "clip": 0.25, "lettering": 0.08}
PHOTO_FACTORS = (1.0, 0.72, 0.5)
CLIP_FACTORS = (1.0, 0.75, 0.5)


class Bank:
    """Planes of many sizes in flat buffers, cropped by one gather per layer.

    `layers` maps a name to its scale; every flat buffer is uint8 on `device`.
    """

    def __init__(
        self, folders: Iterable[Path], layers: dict[str, int], device: torch.device
    ) -> None:
        self.scales = layers
        self.device = device
        rows: list[tuple[float, int, int, float]] = []
        chunks: dict[str, list[np.ndarray]] = {name: [] for name in layers}
        base = 0
        for folder in folders:
            index = json.loads((folder / "index.json").read_text())
            rows += [(base + o, h, w, weight) for o, h, w, weight in index]
            for name in layers:
                chunks[name].append(np.fromfile(folder / f"{name}.u8", np.uint8))
            base += sum(h * w for _, h, w, _ in index)
        if not rows:
            raise ValueError("no planes: expected at least one folder with a filled index.json")
        self.flat = {}
        for name in layers:
            self.flat[name] = torch.cat([torch.from_numpy(c).to(device) for c in chunks[name]])
        offset, height, width, weight = zip(*rows, strict=True)
        self.offset = torch.tensor(offset, dtype=torch.int64, device=device)
        self.height = torch.tensor(height, dtype=torch.int64, device=device)
        self.width = torch.tensor(width, dtype=torch.int64, device=device)
        share = torch.tensor(weight, dtype=torch.float64)
        self.cdf = (share.cumsum(0) / share.sum()).float().to(device)

    def crop(self, count: int, size: int, margin: int = 0, even: bool = True) -> dict[str, Tensor]:
        """Random crops of every layer, mirrored and transposed alike.

        Returns for each layer of scale s a float32 tensor (count, 1, s*size + 2*margin,
        s*size + 2*margin) of codes 0..255; past the picture's edge the margin repeats it.
        """
        device = self.device
        pick = torch.searchsorted(self.cdf, torch.rand(count, device=device))
        pick = pick.clamp_(max=self.cdf.numel() - 1)
        height, width = self.height[pick], self.width[pick]
        place = torch.rand(2, count, device=device)
        top = (place[0] * (height - size + 1).clamp(min=1)).long()
        left = (place[1] * (width - size + 1).clamp(min=1)).long()
        if even:
            top, left = top // 2 * 2, left // 2 * 2
        flips = torch.rand(3, count, device=device) < 0.5
        result = {}
        for name, scale in self.scales.items():
            span = torch.arange(-margin, scale * size + margin, device=device)
            back = span.flip(0)

            def axis(
                start: Tensor, limit: Tensor, flip: Tensor, *, s: int = scale, a: Tensor = span,
                b: Tensor = back,
            ) -> Tensor:  # fmt: skip
                steps = torch.where(flip[:, None], b, a)
                return (start[:, None] * s + steps).clamp(min=0).minimum(limit[:, None] * s - 1)

            rows = axis(top, height, flips[0])
            columns = axis(left, width, flips[1])
            stride = (width * scale)[:, None, None]
            plain = rows[:, :, None] * stride + columns[:, None, :]
            turned = rows[:, None, :] * stride + columns[:, :, None]
            place_in = torch.where(flips[2][:, None, None], turned, plain)
            place_in += (self.offset[pick] * scale * scale)[:, None, None]
            result[name] = self.flat[name][place_in].float()[:, None]
        return result


class BankWriter:
    """Writes one bank folder; `add` takes one plane per layer."""

    def __init__(self, folder: Path, layers: dict[str, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.layers = folder, layers
        self.files = {name: (folder / f"{name}.u8").open("wb") for name in layers}
        self.index: list[tuple[int, int, int, float]] = []
        self.size = 0

    def add(self, weight: float, **planes: Plane) -> None:
        """Append planes of uint8 codes; a layer of scale s is (s*H, s*W)."""
        shapes = {name: planes[name].shape for name in self.layers}
        height, width = next((h // s, w // s) for (h, w), s in self._scaled(shapes))
        for (h, w), s in self._scaled(shapes):
            if (h, w) != (height * s, width * s):
                raise ValueError(f"layers disagree: got {shapes}, expected scales {self.layers}")
        for name, file in self.files.items():
            file.write(np.ascontiguousarray(planes[name]).tobytes())
        self.index.append((self.size, height, width, weight))
        self.size += height * width

    def _scaled(self, shapes: dict[str, tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
        return [(shapes[name], scale) for name, scale in self.layers.items()]

    def close(self) -> None:
        """Finish the files; the index is written last, so a bank with an index is whole."""
        for file in self.files.values():
            file.close()
        (self.folder / "index.json").write_text(json.dumps(self.index))


def _variants(job: tuple[str, Path, bool]) -> list[tuple[str, Plane]]:
    kind, path, validation = job
    if kind == "lettering":
        return [(kind, pictures.lettering(int(path.name)).y)]
    if kind == "clip":
        parity = 1 if validation else 0
        sources = list(pictures.read_clip(path, parity, step=3))
        factors: tuple[float, ...] = CLIP_FACTORS
    else:
        sources = [pictures.load_photo(path)]
        factors = PHOTO_FACTORS if kind == "photo" else (1.0,)
    planes = []
    for picture in sources:
        for factor in factors:
            chosen: Picture = picture if factor == 1 else pictures.scaled(picture, factor)
            if min(chosen.y.shape) >= 256:
                planes.append((kind, chosen.y))
    return planes


def build(root: Path, out: Path, workers: int, lettering_pages: int = 40) -> None:
    """Write the training bank of high-resolution luma planes (one layer, `hr`)."""
    jobs: list[tuple[str, Path, bool]] = []
    for path in pictures.photos(root, validation=False):
        jobs.append(("frame" if path.parent.name == "frames" else "photo", path, False))
    jobs += [("clip", path, False) for path in pictures.clips(root, validation=False)]
    jobs += [("lettering", Path(str(seed)), False) for seed in range(lettering_pages)]
    planes: list[tuple[str, Plane]] = []
    with ProcessPoolExecutor(workers) as pool:
        for found in pool.map(_variants, jobs):
            planes += found
    area = dict.fromkeys(SHARES, 0)
    for kind, plane in planes:
        area[kind] += plane.size
    writer = BankWriter(out, {"hr": 1})
    for kind, plane in planes:
        writer.add(SHARES[kind] * plane.size / area[kind], hr=plane)
    writer.close()
    print(f"bank {out}: {len(planes)} planes, {writer.size / 1e6:.0f} MB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of pictures and clips")
    parser.add_argument("--out", type=Path, required=True, help="bank folder to write")
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    build(options.root, options.out, options.workers)


if __name__ == "__main__":
    main()
