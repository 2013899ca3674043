"""Crops side by side: the original, Lanczos and some models, as a PNG for the documentation.

    python -m training.sheet --clip CLIP --case crf27 --models A.onnx B.onnx --out sheet.png

The crops are those where Lanczos errs most in one frame of the clip's last odd second, not those
where a model looks best.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training import evaluate, pictures

HEADER = 18
GAP = 4


def sheet(
    clip: Path, case: str, models: list[Path], strength: float, crop: int, rows: int
) -> Image.Image:
    """One row of luma crops a place, one column a method, with a line of names on top."""
    scene = evaluate.validation_window(clip, 1)
    plain = "untouched" if case.startswith("same-") else "lanczos"
    methods = evaluate.methods(case, {path.stem: path for path in models}, strength, 2)
    methods.pop("bicubic", None)
    with tempfile.TemporaryDirectory() as folder:
        original, outputs, _ = evaluate.run(scene, case, methods, Path(folder))
        columns = {
            name: pictures.plane(evaluate.read(path)[0])
            for name, path in {"original": original, **outputs}.items()
        }
    truth = columns["original"]
    error = np.abs(columns[plain].astype(np.float32) - truth)
    down, across = error.shape[0] // crop, error.shape[1] // crop
    blocks = error[: down * crop, : across * crop].reshape(down, crop, across, crop).mean((1, 3))
    places = [divmod(int(i), across) for i in np.argsort(blocks.ravel())[::-1][:rows]]
    pitch = crop + GAP
    size = (len(columns) * pitch - GAP, HEADER + rows * pitch - GAP)
    picture = Image.new("L", size, 255)
    draw = ImageDraw.Draw(picture)
    for column, (name, plane) in enumerate(columns.items()):
        draw.text((column * pitch + 2, 2), name, fill=0, font=ImageFont.load_default(12))
        for row, (y, x) in enumerate(places):
            part = plane[y * crop : (y + 1) * crop, x * crop : (x + 1) * crop]
            full = np.clip((part.astype(np.float32) - 16) * 255 / 219, 0, 255)
            corner = (column * pitch, HEADER + row * pitch)
            picture.paste(Image.fromarray(np.rint(full).astype(np.uint8)), corner)
    return picture


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--case", default="clean")
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--rows", type=int, default=3)
    options = parser.parse_args()
    found = sheet(
        options.clip, options.case, options.models, options.strength, options.crop, options.rows
    )
    found.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
