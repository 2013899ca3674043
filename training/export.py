"""Write a checkpoint as an ONNX file that any runtime loads, and check it.

    python -m training.export CHECKPOINT... --out vidpipe/models
    python -m training.export OLD NEW... --shares 0.5 0.5... --out vidpipe/models

With `--shares` the checkpoints, all of one network and each but the first trained on from the one
before, become one file whose weights are their weighted mean. `--correction` multiplies what the
network adds to its fixed enlargement.

The graph is built node by node: Pad, SpaceToDepth, Conv, Relu or LeakyRelu, Add, Mul, DepthToSpace
and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from training.networks import SPECS, NetSpec, PlaneNet, cubic_phases
from training.train import state_of

VERSION = "1.3.0"
OPSET = 18
IR_VERSION = 10
DESCRIPTIONS = {
    "upscale": "Doubles clean luma planes.",
    (
        "clean",
        1,
    ): "Removes coding artefacts and noise; strength 0 returns the input, 1 cleans fully.",
    (
        "clean",
        2,
    ): "Restores and doubles compressed luma planes; strength 0 is the cubic enlargement.",
}


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def convolution(self, x: str, name: str, weight: Tensor, bias: Tensor | None, pad: int) -> str:
        inputs = [x, self.weight(f"{name}.weight", weight.numpy().astype(np.float32))]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias.numpy().astype(np.float32)))
        return self.node("Conv", inputs, name, kernel_shape=[3, 3], pads=[pad] * 4)


def build(spec: NetSpec, weights: dict[str, Tensor]) -> onnx.ModelProto:
    """The network of `spec` with these weights as an ONNX model, dynamic in height and width."""
    graph = _Graph()
    pads = graph.weight("pads", np.array([0, 0, 2, 2, 0, 0, 2, 2], np.int64))
    x = graph.node("Pad", ["input", pads], "padded", mode="edge")
    split = graph.node("SpaceToDepth", [x], "split", blocksize=2)

    def layer(x: str, name: str, *, pad: int = 1, active: bool = True) -> str:
        raw = graph.convolution(x, name, weights[f"{name}.weight"], weights[f"{name}.bias"], pad)
        if not active:
            return raw
        if spec.slope == 0:
            return graph.node("Relu", [raw], f"{name}.relu")
        return graph.node("LeakyRelu", [raw], f"{name}.relu", alpha=spec.slope)

    features = layer(split, "head", pad=0)
    for i in range(spec.plain):
        features = layer(features, f"plain.{i}")
    for i in range(spec.blocks):
        inner = layer(layer(features, f"blocks.{i}.0"), f"blocks.{i}.1", active=False)
        features = graph.node("Add", [features, inner], f"blocks.{i}.sum")
    correction = layer(features, "tail", active=False)
    if spec.strength:
        correction = graph.node("Mul", [correction, "strength"], "scaled")
    if spec.scale == 2:
        base = graph.convolution(split, "cubic", cubic_phases(), None, 0)
        total = graph.node("Add", [base, correction], "sum")
        graph.node("DepthToSpace", [total], "output", blocksize=4)
    else:
        change = graph.node("DepthToSpace", [correction], "change", blocksize=2)
        graph.node("Add", ["input", change], "output")

    def plane(name: str, rows: str, columns: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, rows, columns])

    inputs = [plane("input", "height", "width")]
    if spec.strength:
        inputs.append(helper.make_tensor_value_info("strength", TensorProto.FLOAT, [1]))
    enlarged = spec.scale == 2
    output = plane(
        "output", "height_2x" if enlarged else "height", "width_2x" if enlarged else "width"
    )
    model = helper.make_model(
        helper.make_graph(graph.nodes, spec.name, inputs, [output], graph.weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="vidpipe training",
    )
    key = "upscale" if spec.task == "upscale" else (spec.task, spec.scale)
    metadata = {
        "name": spec.name,
        "scale": str(spec.scale),
        "channels": "luma",
        "range": "0..1",
        "multiple": "2",
        "overlap": str(spec.overlap),
        "tier": spec.tier,
        "task": spec.task,
        "version": VERSION,
        "license": "Apache-2.0",
        "description": DESCRIPTIONS[key],
    }
    helper.set_model_props(model, {f"vidpipe.{k}": v for k, v in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _half_precision_error(net: PlaneNet, x: Tensor, strength: Tensor | None) -> float:
    """Largest error, in 8-bit codes, with weights and every layer's output in float16."""
    half = PlaneNet(net.spec)
    half.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})

    def shorten(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return output.half().float()

    for module in half.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(shorten)
    with torch.no_grad():
        short = half(x.half().float(), strength)
        return float((short - net(x, strength)).abs().max() * 219)


def mixed(states: Sequence[dict[str, Any]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The mean of the checkpoints' averaged weights, weighted by `shares`, which add up to 1."""
    models = {state["model"] for state in states}
    if len(models) != 1:
        raise ValueError(f"got checkpoints of {', '.join(sorted(models))}, expected one network")
    if len(shares) != len(states) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"got shares {list(shares)} for {len(states)} checkpoints, expected sum 1")
    pairs = list(zip(shares, (state["average"] for state in states), strict=True))
    return {name: sum(share * average[name] for share, average in pairs) for name in pairs[0][1]}


def export(
    checkpoints: Sequence[Path], shares: Sequence[float], correction: float, folder: Path
) -> Path:
    """Export a mean of checkpoints of one network and compare the file with the network."""
    states = [state_of(path) for path in checkpoints]
    weights = mixed(states, shares)
    for name in ("tail.weight", "tail.bias"):
        weights[name] = weights[name] * correction
    spec = SPECS[states[0]["model"]]
    net = PlaneNet(spec)
    net.load_state_dict(weights)
    model = build(spec, weights)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{spec.name}.onnx"
    onnx.save(model, path)
    rng = np.random.default_rng(0)
    x = rng.random((1, 1, 54, 70), np.float32)
    x[..., :20] = np.linspace(-0.07, 1.09, 54, dtype=np.float32)[:, None]
    feed = {"input": x}
    strength = None
    if spec.strength:
        feed["strength"] = np.ones(1, np.float32)
        strength = torch.ones(1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, feed)
    with torch.no_grad():
        expected = net(torch.from_numpy(x), strength).numpy()
    error = float(np.abs(got - expected).max())
    if got.shape != expected.shape or not error < 1e-4:
        raise RuntimeError(f"{path}: got {got.shape}, off by {error}, expected {expected.shape}")
    half = _half_precision_error(net, torch.from_numpy(x), strength)
    print(
        f"{path}: {path.stat().st_size / 1e3:.0f} kB, {states[-1]['steps']} steps, "
        f"float16 off by at most {half:.2f} codes on noise"
    )
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shares", type=float, nargs="+", help="mix the checkpoints into one file; sum 1"
    )
    parser.add_argument("--correction", type=float, default=1.0, help="factor on the last layer")
    options = parser.parse_args()
    if options.shares:
        export(options.checkpoints, options.shares, options.correction, options.out)
        return
    for checkpoint in options.checkpoints:
        export([checkpoint], [1.0], options.correction, options.out)


if __name__ == "__main__":
    main()
