"""Float16 to float32 and back, inside a model's graph."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def widen_graph(graph: onnx.GraphProto) -> None:
    """Turn every float16 constant, cast and boundary of a graph into float32."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT

    def tensor(value: onnx.TensorProto) -> None:
        if value.data_type == half:
            array = numpy_helper.to_array(value).astype(np.float32)
            value.CopyFrom(numpy_helper.from_array(array, value.name))

    del graph.value_info[:]
    for initializer in graph.initializer:
        tensor(initializer)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensor(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                widen_graph(attribute.g)
            elif attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = single


_KEEPS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs of operators that are float32 whatever the data are."""

_NOT_IN_HALF = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "If", "Loop", "Scan"),
        *("Range", "CumSum", "NonMaxSuppression", "RandomNormal", "RandomUniform", "EyeLike"),
    }
)


def narrow_graph(graph: onnx.GraphProto) -> bool:
    """Turn the float32 constants, casts and boundary of a model into float16, in place.

    Returns:
        Whether it was done. A model with control flow, with its own quantisation, or with
        constants beyond float16's range stays as it is.
    """
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    if any(
        node.op_type in _NOT_IN_HALF or node.domain not in ("", "ai.onnx") for node in graph.node
    ):
        return False
    fixed = {
        node.input[i]
        for node in graph.node
        for i in _KEEPS_FLOAT.get(node.op_type, ())
        if i < len(node.input)
    }
    constants = [i for i in graph.initializer if i.data_type == single and i.name not in fixed]
    for node in graph.node:
        if node.op_type in ("Constant", "ConstantOfShape") and node.output[0] not in fixed:
            constants += [
                a.t
                for a in node.attribute
                if a.type == onnx.AttributeProto.TENSOR and a.t.data_type == single
            ]
    arrays = [numpy_helper.to_array(c) for c in constants]
    largest = np.finfo(np.float16).max
    if any(array.size and np.abs(array).max() > largest for array in arrays):
        return False
    for constant, array in zip(constants, arrays, strict=True):
        constant.CopyFrom(numpy_helper.from_array(array.astype(np.float16), constant.name))
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = half
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == single:
                attribute.i = half
    return True
