"""Tiny ONNX models for tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """Collects nodes; `save` writes the model."""

    def __init__(self, channels: int = 1, *, opset: int = 17, half: bool = False) -> None:
        self.channels = channels
        self.opset = opset
        self.dtype = np.float16 if half else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.value = "input"

    def add(self, op: str, *others: str, **attributes: Any) -> Net:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.value, *others], [out], **attributes))
        self.value = out
        return self

    def constant(self, array: Array) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, weights: Array, bias: Array | None = None, **attributes: Any) -> Net:
        others = [self.constant(weights.astype(self.dtype))]
        if bias is not None:
            others.append(self.constant(bias.astype(self.dtype)))
        k = weights.shape[2] // 2
        return self.add("Conv", *others, **{"pads": [k, k, k, k], **attributes})

    def save(
        self,
        path: Path,
        *,
        shape: Sequence[int | str | None] | None = None,
        out_shape: Sequence[int | str | None] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.nodes[-1].output[0] = "output"
        shape = shape or [1, self.channels, "height", "width"]
        out_shape = out_shape or [1, self.channels, "height_out", "width_out"]
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("input", kind, shape), *self.inputs],
            [helper.make_tensor_value_info("output", kind, out_shape)],
            self.initializers,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        helper.set_model_props(model, metadata or {})
        onnx.save(model, path)
        return path


def identity(path: Path, channels: int = 1, **options: Any) -> Path:
    """An identity by a 1x1 convolution."""
    return Net(channels).conv(np.eye(channels)[:, :, None, None]).save(path, **options)


def nearest(path: Path, scale: int, channels: int = 1, **options: Any) -> Path:
    """Repeats every pixel scale x scale times, by DepthToSpace."""
    weights = np.repeat(np.eye(channels), scale * scale, axis=0)[:, :, None, None]
    net = Net(channels).conv(weights)
    return net.add("DepthToSpace", blocksize=scale, mode="CRD").save(path, **options)


def random_net(
    path: Path,
    scale: int = 2,
    channels: int = 1,
    *,
    width: int = 16,
    depth: int = 5,
    seed: int = 0,
    unshuffle: int = 1,
    **options: Any,
) -> Path:
    """A random network of the nano tier's kind: 3x3 convolutions, ReLU, DepthToSpace.

    Its output is a nearest-neighbour enlargement plus a few per cent of random detail.
    """
    random = np.random.default_rng(seed)
    net = Net(channels)
    if unshuffle > 1:
        net.add("SpaceToDepth", blocksize=unshuffle)
    inner = channels * unshuffle * unshuffle
    shuffle = scale * unshuffle
    sizes = [inner, *[width] * depth, channels * shuffle * shuffle]
    shuffled = net.value
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weights = random.normal(0, (2.0 / (9 * a)) ** 0.5, (b, a, 3, 3))
        if i == depth:
            weights *= 0.1
        net.conv(weights, random.normal(0, 0.02, b))
        if i < depth:
            net.add("Relu")
    # Channels of SpaceToDepth are (y, x, c), those of DepthToSpace (c, y, x).
    repeat = np.zeros((channels, shuffle, shuffle, unshuffle, unshuffle, channels))
    for c, y, x in np.ndindex(channels, shuffle, shuffle):
        repeat[c, y, x, y // scale, x // scale, c] = 1.0
    detail, net.value = net.value, shuffled
    net.conv(repeat.reshape(-1, inner, 1, 1)).add("Add", detail)
    return net.add("DepthToSpace", blocksize=shuffle, mode="CRD").save(path, **options)


def strong(path: Path, *, gain: float = 0.25, **options: Any) -> Path:
    """Adds `gain` times its input `strength`, float32 [1], to every pixel."""
    net = Net(1)
    net.inputs.append(helper.make_tensor_value_info("strength", TensorProto.FLOAT, [1]))
    amount = net.constant(np.full(1, gain, np.float32))
    net.nodes.append(helper.make_node("Mul", ["strength", amount], ["change"]))
    return net.add("Add", "change").save(path, **options)
