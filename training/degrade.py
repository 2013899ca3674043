"""Degradations on the training device: halving by several kernels, blur, tone changes, noise.

Planes are float tensors (N, 1, H, W) of luma codes 0..255; `normalise` maps the limited range
16..235 to 0..1, which is what the networks see.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TAPS = 16
MARGIN = TAPS // 2 - 1  # pixels that a crop needs on each side before it is halved

# Probability of each halving kernel. FFmpeg's bicubic leads: most pictures that are halved
# today pass through it; the rest keeps the networks from relying on one kernel.
KERNEL_SHARES = {
    "bicubic-0.6": 0.70,
    "bicubic-0.5": 0.12,
    "lanczos3": 0.08,
    "area": 0.05,
    "bilinear": 0.05,
}
BLUR_SIGMAS = (0.0, 0.5, 0.8, 1.1)


def cubic(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel (Keys 1981, eq. 4) with parameter `a`; FFmpeg uses -0.6."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def halving_kernel(name: str, blur: float = 0.0) -> NDArray[np.float64]:
    """`TAPS` weights for output pixel i at source pixels 2i-7 .. 2i+8, summing to 1.

    `blur` is the standard deviation, in source pixels, of a Gaussian applied first.
    """
    distance = (np.arange(TAPS) - MARGIN - 0.5) / 2
    shapes: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "bicubic-0.6": lambda x: cubic(x, -0.6),
        "bicubic-0.5": lambda x: cubic(x, -0.5),
        "lanczos3": lambda x: np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0),
        "area": lambda x: (np.abs(x) < 0.5).astype(float),
        "bilinear": lambda x: np.maximum(0.0, 1 - np.abs(x)),
    }
    if name not in shapes:
        raise ValueError(f"got kernel {name!r}, expected one of {sorted(shapes)}")
    kernel = shapes[name](distance)
    if blur > 0:
        reach = np.arange(-4, 5)
        gauss = np.exp(-(reach**2) / (2 * blur**2))
        kernel = np.convolve(kernel, gauss / gauss.sum(), mode="same")
    normalised: NDArray[np.float64] = kernel / kernel.sum()
    return normalised


def halve(plane: NDArray[np.uint8], kernel: NDArray[np.float64]) -> NDArray[np.float32]:
    """Halve one host plane (H, W) with a kernel of `halving_kernel`; returns unrounded codes."""
    result = plane.astype(np.float32)
    for axis in (1, 0):
        size = result.shape[axis] // 2
        pad = [(0, 0), (0, 0)]
        pad[axis] = (MARGIN, MARGIN + 1)
        padded = np.pad(result, pad, mode="edge")
        total = np.zeros(1, np.float32)
        for tap, weight in enumerate(kernel):
            if weight:
                cut = [slice(None), slice(None)]
                cut[axis] = slice(tap, tap + 2 * size - 1, 2)
                total = total + np.float32(weight) * padded[tuple(cut)]
        result = total
    return result


class Halver:
    """Halves crops on the device, with a kernel drawn for each crop.

    Takes (N, 1, 2n + 2*MARGIN, 2n + 2*MARGIN), gives (N, 1, n, n), unrounded codes.
    """

    def __init__(self, size: int, device: torch.device, *, blurred: bool) -> None:
        rows, shares = [], []
        for name, share in KERNEL_SHARES.items():
            for sigma in BLUR_SIGMAS if blurred else (0.0,):
                rows.append(halving_kernel(name, sigma))
                shares.append(share * (0.85 if sigma == 0 else 0.05) if blurred else share)
        bank = np.zeros((len(rows), size, 2 * size + 2 * MARGIN), np.float32)
        for number, kernel in enumerate(rows):
            for i in range(size):
                bank[number, i, 2 * i : 2 * i + TAPS] = kernel[: 2 * size + 2 * MARGIN - 2 * i]
        self.bank = torch.from_numpy(bank).to(device)
        cdf = np.cumsum(shares) / np.sum(shares)
        self.cdf = torch.tensor(cdf, dtype=torch.float32, device=device)

    def __call__(self, crops: Tensor) -> Tensor:
        """See the class."""
        drawn = torch.rand(crops.shape[0], device=crops.device)
        pick = torch.searchsorted(self.cdf, drawn).clamp_(max=self.cdf.numel() - 1)
        matrix = self.bank[pick]
        return torch.bmm(torch.bmm(matrix, crops[:, 0]), matrix.transpose(1, 2))[:, None]


def vary_tone(crops: Tensor) -> Tensor:
    """Change contrast and brightness of a third of the crops and turn a tenth into negatives."""
    count, device = crops.shape[0], crops.device
    draw = torch.rand(4, count, 1, 1, 1, device=device)
    gain = torch.where(draw[0] < 0.33, 0.5 + 0.6 * draw[1], torch.ones_like(draw[1]))
    centre = 40 + 170 * draw[2]
    crops = (crops - centre) * gain + centre
    crops = torch.where(draw[3] < 0.1, 251 - crops, crops)
    return crops.clamp(0, 255)


def add_noise(crops: Tensor, sigma: Tensor) -> Tensor:
    """Add sensor-like noise of standard deviation about `sigma` (N, 1, 1, 1), in codes.

    Half of the crops get white noise; in the others the noise is coloured, as
    demosaicing and scaling leave it, or grows with the signal.
    """
    count, device = crops.shape[0], crops.device
    white = torch.randn_like(crops)
    soft = torch.nn.functional.avg_pool2d(white, 3, 1, 1, count_include_pad=False)
    coloured = (soft * 1.6 + white * 0.75) / math.sqrt(1.6**2 / 9 + 0.75**2 + 2 * 1.6 * 0.75 / 9)
    kind = torch.rand(2, count, 1, 1, 1, device=device)
    noise = torch.where(kind[0] < 0.3, coloured, white)
    shot = (0.35 + 1.2 * (crops / 255)).sqrt()
    noise = torch.where(kind[1] < 0.3, noise * shot, noise)
    return crops + noise * sigma


def rounded(crops: Tensor) -> Tensor:
    """Round to 8-bit codes."""
    return crops.round().clamp(0, 255)


def normalise(codes: Tensor) -> Tensor:
    """Limited-range luma codes to the networks' nominal 0..1."""
    return (codes - 16) / 219
