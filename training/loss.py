"""Training losses: plain errors, local contrast, and two terms that follow VMAF-NEG.

VMAF-NEG is a regression on two kinds of figures, both blind here to any gain over the original:

- VIF, visual information fidelity, in the pixel domain at four scales (Sheikh and Bovik, "Image
  information and visual quality", IEEE TIP 15(2), 2006), with VMAF's windows and decimation; the
  gain of the estimated channel is limited to 1 (Li et al., "Toward a better quality metric
  for the video community: NEG", 2021).
- DLM, the detail loss measure, on a wavelet decomposition (Li, Zhang, Ma and Ngan, "Image quality
  assessment by separately evaluating detail losses and additive impairments", IEEE TMM 13(5),
  2011), with the contrast sensitivity of Watson et al. ("Visibility of wavelet quantization noise",
  IEEE TIP 6(8), 1997) at three picture heights of 1080 lines.

Both are pooled over groups of neighbouring crops, as a frame pools over its parts. Filters are
banded matrices without padding, so that one matrix product filters a whole batch; the products run
in float32, since variances are differences of large squares.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CHARBONNIER = 1e-3
LOG_FLOOR = 0.3 / 219  # a third of a code: errors that rounding hides need no work
CONTRAST_WEIGHT = 0.3
RELATIVE_FLOOR = 2 / 219
GROUP = 4  # crops that are pooled like one frame

# VIF: taps of the Gaussian windows, whose standard deviation is a fifth of them, and the variance
# of the eye's own noise in codes.
WINDOWS = (17, 9, 5, 3)
EYE_NOISE = 2.0

# DLM: the low-pass taps of Daubechies' wavelet with two vanishing moments (Daubechies 1988).
_ROOT = math.sqrt(3)
DB2 = tuple(v / (4 * math.sqrt(2)) for v in (1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT))
# Watson 1997, tables II and V, luma: threshold parameters and the basis functions' amplitudes for
# the details along one axis and for the diagonal ones.
WATSON = (0.495, 0.466, 0.401)
WATSON_SHIFT = (1.0, 0.534)
AMPLITUDES = ((0.67234, 0.72709), (0.41317, 0.49428), (0.22727, 0.28688), (0.11792, 0.15214))
PIXELS_PER_DEGREE = 3 * 1080 * math.pi / 180
CUBE_FLOOR = 1e-2  # keeps the slope of the cube root finite

# Points of VMAF-NEG per unit of VIF at scales 1 to 3 and of DLM: least squares over the outputs of
# the built-in models on the validation clips. Scale 0 got no weight.
VIF_POINTS = (40.0, 15.0, 5.0)
DLM_POINTS = 200.0


def loss_of(name: str, out: Tensor, truth: Tensor, coded: int, given: Tensor) -> Tensor:
    """The loss of planes (N, 1, H, W) in 0..1, of which the first `coded` were compressed.

    `given` is what the network was given; only `relative`, which is for scale 1, looks at it.

    `charbonnier`: a smooth mean absolute error. `mse`: the squared error.
    `log`: the mean over the crops of the logarithm of their squared error, so that every crop
    counts by its decibels and smooth pictures as much as rich ones.
    `contrast`: `log`, and on the coded crops the difference of the local standard deviations,
    against the flatness that a squared error alone favours where detail is lost.
    `relative`: each crop's squared error over that of what was given, so that a crop counts by
    the share of its error that goes, and one that is nearly perfect already by little.
    """
    error = out - truth
    squared = error * error
    if name == "charbonnier":
        return (squared + CHARBONNIER**2).sqrt().mean()
    if name == "mse":
        return 20 * squared.mean()
    if name == "relative":
        before = (given - truth).square().mean((1, 2, 3)) + RELATIVE_FLOOR**2
        return 0.01 * (squared.mean((1, 2, 3)) / before).mean()
    loss = 0.01 * torch.log(squared.mean((1, 2, 3)) + LOG_FLOOR**2).mean()
    if name == "contrast":
        difference = (_deviation(out[:coded]) - _deviation(truth[:coded])).abs().mean()
        loss = loss + CONTRAST_WEIGHT * coded / out.shape[0] * difference
    return loss


def _deviation(planes: Tensor) -> Tensor:
    """Standard deviation in windows of 8x8, four pixels apart."""
    mean = functional.avg_pool2d(planes, 8, 4)
    square = functional.avg_pool2d(planes * planes, 8, 4)
    return ((square - mean * mean).clamp(min=0) + 1e-5).sqrt()


class Fidelity:
    """About the points of VMAF-NEG that square planes lack; holds the filters for one size.

    All filters are built here, so that a call can be compiled and recorded in a CUDA graph.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.windows: list[tuple[Matrices, Matrices]] = []
        side = size
        for taps in WINDOWS[1:]:
            gauss = _gauss(taps)
            thinned = _matrices(side, (gauss,), 2, device)
            side = thinned[0].shape[0]
            self.windows.append((thinned, _matrices(side, (gauss,), 1, device)))
        self.wavelets: list[Matrices] = []
        side = size
        high = tuple((-1) ** i * tap for i, tap in enumerate(reversed(DB2)))
        for _ in AMPLITUDES:
            self.wavelets.append(_matrices(side, (DB2, high), 2, device))
            side = self.wavelets[-1][0].shape[0] // 2

    def __call__(self, out: Tensor, truth: Tensor) -> Tensor:
        """Of planes (N, 1, size, size) in 0..1, N a multiple of GROUP; a scalar, 0 where equal."""
        # Codes around the middle: the squares stay small.
        planes, original = (out[:, 0] - 0.5) * 219, (truth[:, 0] - 0.5) * 219
        lost = DLM_POINTS * (1 - self.dlm(planes, original)).mean()
        for points, value in zip(VIF_POINTS, self.vif(planes, original), strict=True):
            lost = lost + points * (1 - value).mean()
        return lost

    def vif(self, planes: Tensor, original: Tensor) -> list[Tensor]:
        """VIF with the gain limited to 1 at scales 1 to 3, (N / GROUP,), of codes (N, H, W)."""
        values = []
        for thinned, window in self.windows:
            planes, original = _filtered(planes, thinned), _filtered(original, thinned)
            mean_o, mean_p = _filtered(original, window), _filtered(planes, window)
            var_o = (_filtered(original * original, window) - mean_o * mean_o).clamp(min=0)
            var_p = (_filtered(planes * planes, window) - mean_p * mean_p).clamp(min=0)
            both = (_filtered(planes * original, window) - mean_o * mean_p).clamp(min=0)
            gain = both / (var_o + 1e-3)
            rest = (var_p - gain * both).clamp(min=0)
            gain = gain.clamp(max=1)
            # Where the original is below the eye's noise VMAF counts what the planes add.
            flat = var_o < EYE_NOISE
            kept = torch.log2(1 + gain * gain * var_o / (rest + EYE_NOISE))
            kept = torch.where(flat, 1 - var_p * (16 / 255**2), kept)
            full = torch.where(flat, torch.ones_like(kept), torch.log2(1 + var_o / EYE_NOISE))
            values.append(_pooled(kept) / _pooled(full))
        return values

    def dlm(self, planes: Tensor, original: Tensor) -> Tensor:
        """DLM over four scales, (N / GROUP,), of codes (N, H, W); nothing counts above 1."""
        kept, full = [], []
        for level, matrices in enumerate(self.wavelets):
            planes, *details = _quarters(_filtered(planes, matrices))
            original, *truths = _quarters(_filtered(original, matrices))
            weights = [_sensitivity(level, diagonal) for diagonal in (False, False, True)]
            restored, added = [], []
            for detail, truth, weight in zip(details, truths, weights, strict=True):
                low, high = truth.clamp(max=0), truth.clamp(min=0)
                part = torch.minimum(torch.maximum(detail, low), high)
                restored.append(weight * part)
                added.append(weight * (detail - part).abs())
            # What was added masks what is there: 1/30 of each neighbour and 1/15 of the place.
            around = (added[0] + added[1] + added[2])[:, None]
            mask = 0.3 * functional.avg_pool2d(around, 3, 1)[:, 0] + _inner(around[:, 0]) / 30
            floor = (mask.shape[1] * mask.shape[2] * GROUP / 32) ** (1 / 3)
            for part, truth, weight in zip(restored, truths, weights, strict=True):
                seen = (_inner(part.abs()) - mask).clamp(min=0)
                whole = weight * _inner(truth.abs())
                kept.append((_pooled(seen**3) + CUBE_FLOOR) ** (1 / 3) + floor)
                full.append((_pooled(whole**3) + CUBE_FLOOR) ** (1 / 3) + floor)
        return torch.stack(kept).sum(0) / torch.stack(full).sum(0)


Matrices = tuple[Tensor, Tensor]  # for the rows, from the left, and the columns, from the right


def _matrices(
    side: int, filters: tuple[tuple[float, ...], ...], step: int, device: torch.device
) -> Matrices:
    """Banded matrices that filter `side` pixels by one or more kernels, one after another."""
    taps = len(filters[0])
    outputs = (side - taps) // step + 1
    band = np.zeros((len(filters) * outputs, side), np.float32)
    for number, kernel in enumerate(filters):
        for i in range(outputs):
            band[number * outputs + i, i * step : i * step + taps] = kernel
    rows = torch.from_numpy(band).to(device)
    return rows, rows.T.contiguous()


def _filtered(planes: Tensor, matrices: Matrices) -> Tensor:
    return torch.matmul(matrices[0], planes @ matrices[1])


def _quarters(planes: Tensor) -> list[Tensor]:
    """Low-pass, details along each axis and diagonal details of one wavelet level."""
    half = planes.shape[1] // 2
    top, bottom = planes[:, :half], planes[:, half:]
    return [top[..., :half], top[..., half:], bottom[..., :half], bottom[..., half:]]


def _inner(planes: Tensor) -> Tensor:
    return planes[:, 1:-1, 1:-1]


def _pooled(planes: Tensor) -> Tensor:
    """Sums of planes (N, H, W) over groups of neighbouring crops, (N / GROUP,)."""
    return planes.sum((1, 2)).reshape(-1, GROUP).sum(1)


def _gauss(taps: int) -> tuple[float, ...]:
    weights = [math.exp(-((i - taps // 2) ** 2) / (2 * (taps / 5) ** 2)) for i in range(taps)]
    return tuple(w / sum(weights) for w in weights)


def _sensitivity(level: int, diagonal: bool) -> float:
    """1 over the visible step of a wavelet coefficient (Watson et al. 1997, eq. 11)."""
    a, k, f0 = WATSON
    shift = WATSON_SHIFT[diagonal]
    distance = math.log10(2 ** (level + 1) * f0 * shift / PIXELS_PER_DEGREE)
    return AMPLITUDES[level][diagonal] / float(2 * a * 10 ** (k * distance * distance))
