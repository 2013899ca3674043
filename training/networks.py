"""The networks: small plain convolution chains on the luma plane, at half its size.

All of them take `x`, float32 (N, 1, H, W) with H and W even and nominal range 0..1, and those that
clean also take `strength`, float32 (1,) in 0..1. They return float32 (N, 1, scale*H, scale*W).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.degrade import cubic

CUBIC_A = -0.6  # FFmpeg's bicubic, so that strength 0 is the enlargement people know
SLOPE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class NetSpec:
    """Shape of one network.

    `blocks` counts pairs of convolutions with a skip around each pair. `slope` is that of the
    activation below zero: 0, a plain ReLU, costs nothing in int8 and leaves all codes to what lies
    above; wider networks have none and learn better with some.
    """

    name: str
    task: str
    tier: str
    scale: int
    channels: int
    plain: int
    blocks: int = 0
    slope: float = SLOPE

    @property
    def strength(self) -> bool:
        """Whether the network has the second input."""
        return self.task == "clean"

    @property
    def convolutions(self) -> int:
        """3x3 convolutions in a row, the first and last included."""
        return 2 + self.plain + 2 * self.blocks

    @property
    def overlap(self) -> int:
        """Radius of the receptive field in input pixels, even: tiles must overlap by as much."""
        return 2 * self.convolutions + 2

    @property
    def macs_per_block(self) -> int:
        """Multiply-adds per 2x2 block of input pixels."""
        out = 4 * self.scale**2
        inner = (self.plain + 2 * self.blocks) * self.channels**2
        base = 4 * out if self.scale == 2 else 0
        return 9 * (4 * self.channels + inner + self.channels * out + base)


_UP = NetSpec(name="", task="upscale", tier="", scale=2, channels=64, plain=6)
_NANO = replace(_UP, tier="nano", channels=32, plain=3, slope=0.0)
_QUALITY = replace(_UP, tier="quality", channels=96, plain=1, blocks=6)
SPECS = {
    spec.name: spec
    for spec in (
        replace(_NANO, name="nano-2x"),
        replace(_UP, name="fast-2x", tier="fast"),
        replace(_QUALITY, name="quality-2x"),
        replace(_NANO, name="clean-1x-nano", task="clean", scale=1),
        replace(_UP, name="clean-1x-fast", task="clean", tier="fast", scale=1),
        replace(_NANO, name="clean-2x-nano", task="clean"),
        replace(_UP, name="clean-2x-fast", task="clean", tier="fast"),
        replace(_QUALITY, name="clean-2x-quality", task="clean"),
    )
}


def cubic_phases() -> Tensor:
    """Weights (16, 4, 3, 3) that enlarge a space-to-depth plane x2 by the fixed cubic kernel.

    Input channel 2*i+j is pixel (i, j) of a 2x2 block, output channel 4*p+q is pixel (p, q) of the
    4x4 block over it.
    """
    taps = np.zeros((4, 6))  # output phase, source pixel -2..3 relative to the block
    for phase in range(4):
        position = (phase + 0.5) / 2 - 0.5
        taps[phase] = cubic(np.arange(-2, 4) - position, CUBIC_A)
    taps /= taps.sum(1, keepdims=True)
    grid = taps.reshape(4, 3, 2)  # phase, block, pixel in block
    weights = np.einsum("pyi,qxj->pqijyx", grid, grid).reshape(16, 4, 3, 3)
    return torch.tensor(weights, dtype=torch.float32)


def _convolution(inputs: int, outputs: int, padding: int, gain: float, identity: bool) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=padding)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.mul_(gain)
        layer.bias.zero_()
        if identity:
            layer.weight[:, :, 1, 1] += torch.eye(outputs)
    return layer


class PlaneNet(nn.Module):
    """Space-to-depth, 3x3 convolutions with (Leaky)ReLU, depth-to-space, on top of a fixed cubic.

    A chain's inner convolutions start as the identity plus a small random part, which is
    an identity branch folded into the weights: nothing needs folding at export.
    With `strength` the network's correction is multiplied by it, so 0 gives the input (scale
    1) or its cubic enlargement (scale 2). `slope` may be another than the spec's while a network
    is led from one activation to another.

    With `coded` it computes as int8 will: weights in 7 bits, one scale a channel, activations in 8,
    one scale a tensor, and gradients pass the rounding unchanged. The scales are learned (S. Esser
    et al., "Learned Step Size Quantization", 2020), as logarithms; `calibrate` sets the first ones.
    """

    slope: Tensor

    def __init__(self, spec: NetSpec, *, coded: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.coded = coded
        self._seen: list[Tensor] | None = None
        if coded:
            if spec.blocks:
                raise ValueError(f"{spec.name} has blocks, expected a plain chain of convolutions")
            self.steps = nn.Parameter(torch.zeros(2 + spec.plain))
        width = spec.channels
        self.head = _convolution(4, width, 0, 1.0, identity=False)
        self.plain = nn.ModuleList(
            _convolution(width, width, 1, 0.4, identity=True) for _ in range(spec.plain)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    _convolution(width, width, 1, 1.0, identity=False),
                    _convolution(width, width, 1, 0.2, identity=False),
                )
            )
            for _ in range(spec.blocks)
        )
        self.tail = _convolution(width, 4 * spec.scale**2, 1, 0.02, identity=False)
        self.register_buffer("slope", torch.tensor(spec.slope), persistent=False)
        if spec.scale == 2:
            self.register_buffer("cubic", cubic_phases(), persistent=False)

    def forward(self, x: Tensor, strength: Tensor | None = None) -> Tensor:
        """See the module's docstring for shapes and ranges."""
        # The input is not exact in bfloat16: first layer, base and sum stay out of autocast.
        with torch.autocast(x.device.type, enabled=False):
            split = functional.pixel_unshuffle(functional.pad(x, (2, 2, 2, 2), mode="replicate"), 2)
            features = self._active(self._convolve(self.head, split), 0)
        for number, layer in enumerate(self.plain, 1):
            features = self._active(self._convolve(layer, features), number)  # type: ignore[arg-type]
        for first, second in self.blocks:  # type: ignore[misc]
            features = features + second(self._active(first(features), 0))
        correction = self._convolve(self.tail, features).float()
        if self.coded:
            correction = self._in_codes(correction, len(self.plain) + 1, -128, 127)
        if strength is not None:
            correction = correction * strength
        with torch.autocast(x.device.type, enabled=False):
            if self.spec.scale == 1:
                return x + functional.pixel_shuffle(correction, 2)
            base = functional.conv2d(split, self.get_buffer("cubic"))
            return functional.pixel_shuffle(base + correction, 4)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the scales so that nothing of what a batch puts through the network is cut."""
        self._seen = []
        self(x, torch.ones(1, device=x.device))
        self.steps.copy_(torch.stack(self._seen).clamp_min(1e-6).log())
        self._seen = None

    def _convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        if not self.coded:
            result: Tensor = layer(x)
            return result
        weight = layer.weight
        step = weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-9) / 63
        weight = _rounded(weight / step) * step
        return functional.conv2d(x, weight, layer.bias, padding=layer.padding)

    def _active(self, features: Tensor, number: int) -> Tensor:
        features = torch.maximum(features, features * self.slope.to(features.dtype))
        return self._in_codes(features, number, 0, 255) if self.coded else features

    def _in_codes(self, values: Tensor, number: int, low: int, high: int) -> Tensor:
        if self._seen is not None:
            self._seen.append(values.abs().amax() / high)
            return values
        step = self.steps[number].exp()
        return _rounded((values / step).clamp(low, high)) * step


def _rounded(values: Tensor) -> Tensor:
    """Round, and let gradients pass as if it had not been."""
    return values + (values.round() - values).detach()


def parameters(net: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in net.parameters())
