"""Bars of a benchmark's figures, as SVG or PNG.

Both are drawn here: an SVG is a text of boxes and words; a PNG is the same boxes, and words in
a small font of dots, written by FFmpeg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from vidpipe.compare import write_png
from vidpipe.errors import InputError, OutputError

_WIDTH, _ROW, _MARGIN, _LABEL, _VALUE = 960, 26, 16, 310, 220
_COLORS = {"stage": "#4878a8", "reference": "#a8b8c8", "pipeline": "#d08030"}
_TEXT, _GROUND, _RULE = "#202020", "#ffffff", "#c03030"


def check_chart(path: Path) -> None:
    """See that a chart can be written under this name.

    Raises:
        InputError: the suffix is not .svg or .png, or there is no such folder.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"'{path}' is not the name of a chart", hint="Use .svg or .png")
    if not path.parent.is_dir():
        raise InputError(f"the folder '{path.parent}' does not exist", hint="Make it first")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw what `vidpipe.bench.bench` returned; the suffix chooses SVG or PNG.

    One bar for each figure. A red rule marks the lowest stage of each chain: no pipeline can
    be faster.

    Raises:
        InputError, OutputError: the chart cannot be written.
    """
    check_chart(path)
    canvas = _Canvas()
    machine = result["machine"]
    gpu = machine.get("gpu")
    y = _MARGIN
    canvas.text(_MARGIN, y, gpu["name"] if gpu else machine["processor"], bold=True)
    y += _ROW
    for chain in result["chains"]:
        y = _chain(canvas, chain, y)
    canvas.height = y + _MARGIN
    try:
        if path.suffix.lower() == ".svg":
            path.write_text(canvas.svg(), encoding="utf-8")
        else:
            canvas.png(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def _chain(canvas: _Canvas, chain: dict[str, Any], y: int) -> int:
    """Draw one chain's bars from `y` on; return where they end."""
    one, two = chain["input"], chain["output"]
    title = (
        f"{' + '.join(chain['models'])}, {one['width']}x{one['height']} to "
        f"{two['width']}x{two['height']}, frames per second"
    )
    canvas.text(_MARGIN, y, title)
    y += _ROW
    kinds = list(_COLORS)
    figures = sorted(chain["figures"], key=lambda figure: kinds.index(figure["kind"]))
    room = _WIDTH - _LABEL - _VALUE - 2 * _MARGIN
    unit = room / max(figure["fps"] for figure in figures)
    left, top = _MARGIN + _LABEL, y
    for figure in figures:
        length = max(1, round(figure["fps"] * unit))
        canvas.text(_MARGIN, y, figure["name"])
        canvas.box(left, y + 3, length, _ROW - 8, _COLORS[figure["kind"]])
        value = f"{figure['fps']:.1f}"
        if "share_of_bound" in figure:
            value += f" ({figure['share_of_bound']:.2f} of what bounds it)"
        canvas.text(left + length + 6, y, value)
        y += _ROW
    lowest = [figure["lowest_fps"] for figure in figures if "lowest_fps" in figure]
    if lowest:
        canvas.box(left + round(max(lowest) * unit), top, 1, y - top, _RULE)
    return y + _ROW // 2


class _Canvas:
    """Boxes and lines of text, kept until they are written."""

    def __init__(self) -> None:
        self.height = 0
        self._boxes: list[tuple[int, int, int, int, str]] = []
        self._texts: list[tuple[int, int, str, bool]] = []

    def box(self, x: int, y: int, width: int, height: int, color: str) -> None:
        self._boxes.append((x, y, width, height, color))

    def text(self, x: int, y: int, text: str, bold: bool = False) -> None:
        self._texts.append((x, y, text, bold))

    def svg(self) -> str:
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {_WIDTH} {self.height}" font-family="sans-serif" font-size="14">',
            f'<rect width="100%" height="100%" fill="{_GROUND}"/>',
        ]
        for x, y, width, height, color in self._boxes:
            lines.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{color}"/>'
            )
        for x, y, text, bold in self._texts:
            weight = ' font-weight="bold"' if bold else ""
            lines.append(f'<text x="{x}" y="{y + 17}" fill="{_TEXT}"{weight}>{escape(text)}</text>')
        return "\n".join([*lines, "</svg>", ""])

    def png(self, path: Path) -> None:
        picture = np.empty((self.height * _ZOOM, _WIDTH * _ZOOM, 3), np.uint8)
        picture[:] = _rgb(_GROUND)
        for x, y, width, height, color in self._boxes:
            rows = slice(y * _ZOOM, (y + height) * _ZOOM)
            picture[rows, x * _ZOOM : (x + width) * _ZOOM] = _rgb(color)
        for x, y, text, _ in self._texts:
            drawn = _letters(text)[:, : (_WIDTH - x) * _ZOOM]
            top, left = (y + 6) * _ZOOM, x * _ZOOM
            place = picture[top : top + drawn.shape[0], left : left + drawn.shape[1]]
            place[drawn] = _rgb(_TEXT)
        write_png(path, picture)


_ZOOM = 2  # pixels of a PNG to one of the drawing
_DOT = 3  # pixels to a dot of a letter

# Seven rows of five dots, a digit to the base of 32 for each row.
_FONT = dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;+-/()%_&",
        (
            *("ehhvhhh", "uhhuhhu", "ehggghe", "uhhhhhu", "vgguggv", "vgguggg"),
            *("ehgnhhf", "hhhvhhh", "e44444e", "72222ic", "hikokih", "ggggggv", "hrllhhh"),
            *("hhpljhh", "ehhhhhe", "uhhuggg", "ehhhlid", "uhhukih", "fgge11u", "v444444"),
            *("hhhhhhe", "hhhhha4", "hhhllla", "hha4ahh", "hhha444", "v1248gv"),
            *("ehjlphe", "4c4444e", "eh1248v", "v2421he", "26aiv22", "vgu11he", "68guhhe"),
            *("v124888", "ehhehhe", "ehhf12c"),
            *("0000000", "00000cc", "0000448", "0cc0cc0", "0cc0448", "044v440", "000v000"),
            *("01248g0", "2488842", "8422248", "op248j3", "000000v", "cik8lid"),
        ),
        strict=True,
    )
)
_UNKNOWN = "vhhhhhv"


def _letters(text: str) -> np.ndarray[Any, Any]:
    """Return text as a mask of shape (7 dots, 6 dots a letter), in capitals."""
    rows = [[int(digit, 32) for digit in _FONT.get(c, _UNKNOWN)] for c in text.upper()]
    dots = np.array(rows)[:, :, None] >> np.arange(4, -2, -1).clip(0)[None, None] & 1
    dots[:, :, 5] = 0  # the gap to the next letter
    mask: np.ndarray[Any, Any] = dots.transpose(1, 0, 2).reshape(7, -1).astype(bool)
    return mask.repeat(_DOT, 0).repeat(_DOT, 1)


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))
