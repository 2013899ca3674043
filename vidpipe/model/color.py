"""The arithmetic of colour: code values, matrices and where chroma samples sit.

Plain NumPy; `vidpipe.model.compile` turns it into graph nodes. Sources: ITU-T H.273
(equations for limited and full range, table 4), BT.601, BT.709 and BT.2020 for the matrices,
R. Keys, "Cubic convolution interpolation for digital image processing" (1981) for the kernel.

A luma sample k of a plane sits at coordinate k. A chroma sample j of a plane that is
subsampled by f sits at luma coordinate f * j + d, with d = o * (f - 1), where o in 0..1 is
`ChromaSite.offset`. Enlarging by s keeps the picture's edges in place: output luma sample k
sits at input luma coordinate (k + 1/2) / s - 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from vidpipe.errors import SpecError
from vidpipe.frame import (
    LUMA_COEFFICIENTS,
    ChromaSite,
    Color,
    FrameSpec,
    Matrix,
    PixelFormat,
    Range,
)

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How a nominal value becomes a code value: code = value * scale + zero.

    Nominal values are 0..1 for luma, R, G and B, and -0.5..0.5 for Cb and Cr.

    Attributes:
        scale: code values per unit.
        zero: code value of nominal 0.
        maximum: highest code value that the sample can hold.
    """

    scale: float
    zero: float
    maximum: int


def luma_quantizer(bits: int, code_range: int) -> Quantizer:
    """Return the quantiser of luma, R, G and B.

    H.273 equations 23 to 25 and 29 to 31: limited range puts 0..1 on 16..235 and full range
    on 0..255, in 8 bits; limited codes of n bits are those times 2^(n-8), full ones end at
    2^n - 1.
    """
    maximum = (1 << bits) - 1
    if code_range == Range.FULL:
        return Quantizer(float(maximum), 0.0, maximum)
    unit = float(1 << (bits - 8))
    return Quantizer(219.0 * unit, 16.0 * unit, maximum)


def chroma_quantizer(bits: int, code_range: int) -> Quantizer:
    """Return the quantiser of Cb and Cr.

    H.273 equations 26, 27, 32 and 33: neutral is 2^(n-1) in both ranges; one unit is
    224 * 2^(n-8) codes in limited range and 2^n - 1 in full range.
    """
    maximum = (1 << bits) - 1
    scale = float(maximum) if code_range == Range.FULL else 224.0 * (1 << (bits - 8))
    return Quantizer(scale, float(1 << (bits - 1)), maximum)


def rgb_to_ycc(k_r: float, k_b: float) -> Floats:
    """Return the 3x3 matrix from (R, G, B) to (Y, Cb, Cr), H.273 equations 38 to 40."""
    k_g = 1.0 - k_r - k_b
    cb = 0.5 / (1.0 - k_b)
    cr = 0.5 / (1.0 - k_r)
    return np.array(
        [
            [k_r, k_g, k_b],
            [-k_r * cb, -k_g * cb, 0.5],
            [0.5, -k_g * cr, -k_b * cr],
        ]
    )


def ycc_to_rgb(k_r: float, k_b: float) -> Floats:
    """Return the 3x3 matrix from (Y, Cb, Cr) to (R, G, B), the inverse of `rgb_to_ycc`."""
    k_g = 1.0 - k_r - k_b
    red, blue = 2.0 * (1.0 - k_r), 2.0 * (1.0 - k_b)
    return np.array(
        [
            [1.0, 0.0, red],
            [1.0, -blue * k_b / k_g, -red * k_r / k_g],
            [1.0, blue, 0.0],
        ]
    )


def working_coefficients(spec: FrameSpec) -> tuple[float, float]:
    """Return the (K_R, K_B) to convert between R, G, B and luma with.

    Formats that already hold R, G and B take those of BT.709 unless they name others: only
    how luma is split off depends on it.

    Raises:
        SpecError: the matrix is tagged, and is not one of R'G'B' to Y'CbCr.
    """
    color = spec.color
    if spec.format.model != "yuv":
        return LUMA_COEFFICIENTS.get(color.matrix, LUMA_COEFFICIENTS[Matrix.BT709])
    if color.matrix in LUMA_COEFFICIENTS:
        return LUMA_COEFFICIENTS[color.matrix]
    if color.matrix == Matrix.UNSPECIFIED:
        return spec.resolved_color().luma_coefficients()
    raise SpecError(
        f"matrix coefficients {color.matrix} cannot be converted to R, G and B",
        hint="Use a luma model, which leaves chroma alone, or tag the source as BT.601, "
        "BT.709 or BT.2020",
    )


def output_color(spec: FrameSpec, width: int, height: int) -> Color:
    """Return the colour tags of the picture that a model makes of `spec`.

    Tags stay as they are, with one exception. Players take an unspecified matrix to be
    BT.601 for small pictures and BT.709 for large ones. The samples still are what the input
    was, so where the new size would change that reading the matrix is written down.
    """
    color = spec.color
    if spec.format.model != "yuv" or color.matrix != Matrix.UNSPECIFIED:
        return color
    before = color.resolved(spec.width, spec.height).matrix
    after = color.resolved(width, height).matrix
    return color if before == after else replace(color, matrix=before)


def cubic(x: float) -> float:
    """Return the weight of Keys' cubic kernel with a = -1/2 (Catmull-Rom) at distance x."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@dataclass(frozen=True, slots=True)
class Filter:
    """A one-dimensional resampling filter with a fixed number of phases.

    Output sample n * i + p is the sum over t of weights[p, t] * input[step * i + first + t],
    for n phases p.

    Attributes:
        weights: shape (phases, taps), float64; every row sums to 1.
        first: index of the first tap relative to step * i, at most 0.
        step: input samples that i moves by.
    """

    weights: Floats
    first: int
    step: int = 1

    @property
    def phases(self) -> int:
        """Outputs for each step."""
        return len(self.weights)

    @property
    def taps(self) -> int:
        """Inputs of each output."""
        return len(self.weights[0])


def _filter(positions: Sequence[float], width: float = 1.0, step: int = 1) -> Filter:
    """Return the cubic filter whose phases look at these input positions."""
    reach = 2.0 * width
    first = min(math.floor(p - reach) + 1 for p in positions)
    last = max(math.ceil(p + reach) - 1 for p in positions)
    weights = np.array(
        [[cubic((t - p) / width) for t in range(first, last + 1)] for p in positions]
    )
    used = np.flatnonzero(np.abs(weights).max(axis=0) > 1e-12)
    first, weights = first + int(used[0]), weights[:, used[0] : used[-1] + 1]
    return Filter(weights / weights.sum(axis=1, keepdims=True), first, step)


def enlarge_filter(scale: int, factor: int, offset: float) -> Filter:
    """Return the filter that enlarges a chroma plane by `scale`, sites kept.

    Output chroma sample j sits at output luma coordinate f * j + d, that is at input chroma
    coordinate j / s + (d + 1/2) * (1/s - 1) / f.

    Args:
        scale: s, of luma and chroma alike.
        factor: f, the subsampling along this axis, 1 or 2.
        offset: o, the chroma site along this axis, 0..1.
    """
    shift = (offset * (factor - 1) + 0.5) * (1.0 / scale - 1.0) / factor
    return _filter([p / scale + shift for p in range(scale)])


def to_luma_filter(factor: int, offset: float) -> Filter:
    """Return the filter from chroma positions to luma positions: luma sample k at (k - d) / f."""
    d = offset * (factor - 1)
    return _filter([(p - d) / factor for p in range(factor)])


def to_chroma_filter(factor: int, offset: float) -> Filter:
    """Return the low-pass filter from luma positions to chroma positions.

    The cubic kernel stretched by f, centred on luma coordinate f * j + d, in steps of f.
    """
    d = offset * (factor - 1)
    return _filter([d], float(factor), factor)


def site_offsets(format_: PixelFormat, color: Color) -> tuple[float, float]:
    """Return the chroma site's offsets (x, y) in 0..1; 0 along an axis not subsampled."""
    x, y = ChromaSite(color.site).offset()
    return (x if format_.subsampling[0] else 0.0, y if format_.subsampling[1] else 0.0)
