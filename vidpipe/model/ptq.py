"""Turn the convolutions of a float model into int8, by what real frames put through them.

The result is a QDQ graph: QuantizeLinear and DequantizeLinear around each convolution and its
activation, uint8 activations with one scale a tensor, int8 weights with one scale a channel.
ONNX Runtime and OpenVINO fuse these to integer kernels.

Four steps, each measured on the calibration frames:

1. Channels are brought to like ranges. A positive factor commutes with ReLU and LeakyReLU,
   so it can move from one convolution into the next (M. Nagel et al., "Data-Free Quantization
   Through Weight Equalization and Bias Correction", 2019; here with half its strength).
2. Ranges are cut where the mean squared error behind the activation is least: what lies below
   zero in front of a LeakyReLU matters little behind it.
3. Weights and biases are fitted again, layer by layer, so that on quantised input they come
   closest to the float layer's output (least squares).
4. Weights are rounded one input at a time, and the rest make up for each rounding
   (E. Frantar et al., "GPTQ", 2022, algorithm 1).

What carries the picture itself stays in float: convolutions on a branch without activations,
such as a fixed enlargement beside the network, sums and products behind the last convolution,
and a multiplication by a strength.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vidpipe.errors import ModelError
from vidpipe.model.session import CPU_PROVIDER, default_threads, first_line, import_onnxruntime

Array: TypeAlias = np.ndarray[Any, Any]
Feeds: TypeAlias = Sequence[Mapping[str, Array]]
Range: TypeAlias = tuple[float, float]

FLOAT_PARTS = ("", "last", "first and last")
"""Convolutions beside the linear branches that may stay in float, fewest first."""

_ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "Elu", "Gelu", "HardSwish")
_FUSED = ("Relu", "LeakyRelu")
_MOVES = ("Pad", "SpaceToDepth", "Identity", "Transpose", "Reshape", "Cast")
_POSITIONS = 2000
_FITTED_POSITIONS = 3000
_FITTED_WIDTH = 1200
_RIDGE = 1e-4
_GAIN_LIMIT = 3.0


@dataclass(frozen=True, slots=True)
class _Stats:
    """Samples (channels, n) of a tensor and its extremes over all frames."""

    samples: Array
    low: float
    high: float


class _Graph:
    """A model's nodes and who makes and reads their tensors."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants = {i.name: i for i in proto.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.after_activation: set[str] = set()
        self.before_activation: set[str] = set()
        for node in self.nodes:
            if any(i in self.after_activation for i in node.input) or node.op_type in _ACTIVATIONS:
                self.after_activation.update(node.output)
        for node in reversed(self.nodes):
            behind = [r for o in node.output for r in self.readers.get(o, ())]
            if any(r.op_type in _ACTIVATIONS or r.name in self.before_activation for r in behind):
                self.before_activation.add(node.name)

    def convolutions(self) -> list[onnx.NodeProto]:
        """Return those with constant weights that are not on a linear branch."""
        return [
            n
            for n in self.nodes
            if n.op_type == "Conv"
            and n.input[1] in self.constants
            and (len(n.input) < 3 or n.input[2] in self.constants)
            and (self._follows(n) or n.name in self.before_activation)
        ]

    def _follows(self, node: onnx.NodeProto) -> bool:
        return node.input[0] in self.after_activation

    def chosen(self, float_part: str) -> list[onnx.NodeProto]:
        """Return the nodes to quantise, in order."""
        convolutions = self.convolutions()
        if float_part:
            convolutions = [n for n in convolutions if n.name in self.before_activation]
        if float_part == "first and last":
            convolutions = [n for n in convolutions if self._follows(n)]
        names = {n.name for n in convolutions}
        for node in reversed(self.nodes):
            readers = [r for o in node.output for r in self.readers.get(o, ())]
            inner = bool(readers) and all(r.name in names for r in readers)
            if node.op_type in (*_FUSED, "Add") and inner and not self._constant_input(node):
                names.add(node.name)
        return [n for n in self.nodes if n.name in names]

    def _constant_input(self, node: onnx.NodeProto) -> bool:
        return any(name in self.constants for name in node.input)

    def copies_input(self, name: str, image: str) -> bool:
        """Say whether a tensor holds the input's own values, moved about."""
        while name != image:
            node = self.makers.get(name)
            if node is None or node.op_type not in _MOVES:
                return False
            name = node.input[0]
        return True


def quantize_graph(
    proto: onnx.ModelProto,
    feeds: Feeds,
    *,
    image: str,
    input_range: Range,
    reduce_range: bool,
    float_part: str = "",
) -> onnx.ModelProto:
    """Return a copy of the model with int8 convolutions.

    Args:
        proto: the model, float32, operator set 13 or later.
        feeds: for each calibration frame, the model's inputs by name.
        image: name of the image input.
        input_range: values that the image may take.
        reduce_range: keep weights within 7 bits: without VNNI, the sum of two products of
            full range does not fit x86 processors' 16-bit intermediate result.
        float_part: convolutions to leave in float32, one of `FLOAT_PARTS`.

    Raises:
        ModelError: there is no convolution to quantise, or ONNX Runtime cannot run the model.
    """
    proto = _copy(proto)
    _name_nodes(proto)
    _constants_to_initializers(proto)
    chosen = [n.name for n in _Graph(proto).chosen(float_part)]
    if not any(n.op_type == "Conv" and n.name in chosen for n in proto.graph.node):
        raise ModelError(
            "the model has no convolutions to run in int8",
            hint="It needs convolutions with constant weights, before or after an activation",
        )
    _equalize(proto, chosen, feeds)
    ranges = _ranges(proto, chosen, feeds, image, input_range)
    fitted, weights = _fit(proto, chosen, feeds, ranges, reduce_range)
    return _with_qdq(fitted, chosen, ranges, weights, reduce_range)


# -- running parts of the graph -----------------------------------------------------------


def prune(proto: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a copy that computes these float32 tensors and nothing else."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    needed, kept = set(outputs), []
    for node in reversed(proto.graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    for group in (graph.initializer, graph.input):
        rest = [value for value in group if value.name in needed]
        del group[:]
        group.extend(rest)
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    )
    return result


def evaluate(proto: onnx.ModelProto, name: str, feeds: Feeds) -> Iterator[Array]:
    """Yield the value of a tensor for each of the feeds.

    Raises:
        ModelError: ONNX Runtime cannot run the graph.
    """
    part = prune(proto, [name])
    given = {i.name for i in part.graph.input} - {i.name for i in part.graph.initializer}
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = default_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(
            part.SerializeToString(), options, providers=[CPU_PROVIDER], enable_fallback=0
        )
        for feed in feeds:
            (value,) = session.run([name], {k: v for k, v in feed.items() if k in given})
            yield value
    except ModelError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from None


def _stats(proto: onnx.ModelProto, name: str, feeds: Feeds) -> _Stats:
    random = np.random.default_rng(0)
    samples, low, high = [], math.inf, -math.inf
    for value in evaluate(proto, name, feeds):
        low, high = min(low, float(value.min())), max(high, float(value.max()))
        flat = value[0].reshape(value.shape[1], -1)
        samples.append(flat[:, random.integers(0, flat.shape[1], _POSITIONS)])
    return _Stats(np.concatenate(samples, axis=1), low, high)


# -- step 1 -------------------------------------------------------------------------------


def _equalize(proto: onnx.ModelProto, chosen: Sequence[str], feeds: Feeds) -> None:
    """Move factors from convolutions into the next ones, in place."""
    graph = _Graph(proto)
    for node in graph.nodes:
        if node.op_type != "Conv" or node.name not in chosen:
            continue
        readers = graph.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type not in _FUSED:
            continue
        following = graph.readers.get(readers[0].output[0], [])
        if not following or not all(_plain(n, graph) for n in following):
            continue
        samples = _stats(proto, node.output[0], feeds).samples
        span = np.maximum(
            np.quantile(samples, 0.9999, axis=1), -0.5 * np.quantile(samples, 0.0001, axis=1)
        )
        span = np.maximum(span, max(float(span.max()) * 1e-3, 1e-12))
        middle = np.exp(np.log(span).mean())
        gain = np.clip(np.sqrt(middle / span), 1 / _GAIN_LIMIT, _GAIN_LIMIT)
        _scale(graph, node.input[1], gain[:, None, None, None])
        if len(node.input) > 2:
            _scale(graph, node.input[2], gain)
        for name in {n.input[1] for n in following}:
            _scale(graph, name, 1 / gain[None, :, None, None])


def _plain(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Say whether a node is a convolution over all channels whose weights nobody else uses."""
    if node.op_type != "Conv" or node.input[1] not in graph.constants:
        return False
    return _attribute(node, "group", 1) == 1 and len(graph.readers[node.input[1]]) == 1


def _scale(graph: _Graph, name: str, factor: Array) -> None:
    tensor = graph.constants[name]
    array = numpy_helper.to_array(tensor) * factor.astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


# -- step 2 -------------------------------------------------------------------------------


def _ranges(
    proto: onnx.ModelProto, chosen: Sequence[str], feeds: Feeds, image: str, input_range: Range
) -> dict[str, Range]:
    """Return what each activation tensor's codes 0 and 255 stand for."""
    graph = _Graph(proto)
    found: dict[str, Range] = {}
    nodes = [n for n in graph.nodes if n.name in chosen]
    for node in nodes:  # pairs first: they decide about both sides
        maker = graph.makers.get(node.input[0])
        together = (
            maker is not None and maker.name in chosen and len(graph.readers[node.input[0]]) == 1
        )
        if node.op_type == "LeakyRelu" and together:
            stats = _stats(proto, node.input[0], feeds)
            before, after = _leaky_ranges(stats, _attribute(node, "alpha", 0.01))
            found[node.input[0]], found[node.output[0]] = before, after
        elif node.op_type == "Relu" and together:
            after = _cut(_stats(proto, node.output[0], feeds))
            found[node.input[0]] = found[node.output[0]] = after
    for node in nodes:
        for name in (*node.input[: 1 if node.op_type == "Conv" else None], *node.output):
            if name in found or name in graph.constants:
                continue
            if graph.copies_input(name, image):
                found[name] = input_range
            else:
                found[name] = _cut(_stats(proto, name, feeds))
    return found


def _snap(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point of a range that holds 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(high - low, 1e-12) / 255
    return step, round(-low / step)


def _as_range(step: float, zero: int) -> Range:
    return -zero * step, (255 - zero) * step


def _rounded(values: Array, step: float, zero: int) -> Array:
    result: Array = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    return result


def _flat(stats: _Stats, count: int = 100_000) -> Array:
    values = stats.samples.reshape(-1)
    if values.size > count:
        values = values[np.random.default_rng(0).integers(0, values.size, count)]
    return values


def _cut(stats: _Stats) -> Range:
    """Return the range of least mean squared error."""
    values = _flat(stats)
    best = (math.inf, 1.0, 0)
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        step, zero = _snap(stats.low * share, stats.high * share)
        best = min(
            best, (float(np.square(_rounded(values, step, zero) - values).mean()), step, zero)
        )
    return _as_range(*best[1:])


def _leaky_ranges(stats: _Stats, slope: float) -> tuple[Range, Range]:
    """Return the ranges before and after a LeakyReLU, for the least error behind it."""
    values = _flat(stats)
    high = max(stats.high, 1e-6)
    wanted = np.where(values > 0, values, slope * values)
    best: tuple[float, Range, Range] | None = None
    below = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.25, 1.6, 2, 3, 5, 8, 12])
    for top in high * np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]):
        for bottom in np.unique(np.minimum(max(-stats.low, 0.0), top * below)):
            step, zero = _snap(-bottom, top)
            seen = _rounded(values, step, zero)
            seen = np.where(seen > 0, seen, slope * seen)
            # Steps that divide the step before let positive codes pass unchanged.
            for after in (step, step / 2, (top + slope * bottom) / 255):
                after_zero = min(255, round(slope * bottom / after))
                error = float(np.square(_rounded(seen, after, after_zero) - wanted).mean())
                if best is None or error < best[0]:
                    best = error, _as_range(step, zero), _as_range(after, after_zero)
    assert best is not None
    return best[1:]


# -- steps 3 and 4 ------------------------------------------------------------------------


def _fit(
    proto: onnx.ModelProto,
    chosen: Sequence[str],
    feeds: Feeds,
    ranges: Mapping[str, Range],
    reduce_range: bool,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return the model with refitted weights on their grids, and the grids' scales by name."""
    fitted = _copy(proto)
    scales: dict[str, Array] = {}
    graph = _Graph(fitted)
    for node in graph.nodes:
        shape = _weight_shape(node, graph)
        if node.name not in chosen or shape is None or not _plain(node, graph):
            continue
        if math.prod(shape[1:]) > _FITTED_WIDTH:
            continue
        so_far = _with_qdq(fitted, chosen, ranges, scales, reduce_range)
        inner = next(n for n in so_far.graph.node if n.name == node.name).input[0]
        sums = _sums(node, shape, evaluate(so_far, inner, feeds), proto, feeds)
        weights = numpy_helper.to_array(graph.constants[node.input[1]]).astype(np.float64)
        matrix, bias, scale = _solve(
            sums, weights.reshape(shape[0], -1), 63 if reduce_range else 127
        )
        _set(graph, node.input[1], matrix.reshape(shape))
        if len(node.input) > 2:
            _set(graph, node.input[2], bias)
        scales[node.input[1]] = scale
    return fitted, scales


def _weight_shape(node: onnx.NodeProto, graph: _Graph) -> tuple[int, ...] | None:
    """Return the shape of a convolution's weights, or None if it is of another kind."""
    if node.op_type != "Conv" or node.input[1] not in graph.constants:
        return None
    shape = tuple(graph.constants[node.input[1]].dims)
    plain = all(set(_attribute(node, n, [1])) == {1} for n in ("strides", "dilations"))
    automatic = _attribute(node, "auto_pad", b"NOTSET") != b"NOTSET"
    return shape if len(shape) == 4 and plain and not automatic else None


def _sums(
    node: onnx.NodeProto,
    shape: tuple[int, ...],
    inputs: Iterator[Array],
    proto: onnx.ModelProto,
    feeds: Feeds,
) -> tuple[Array, Array, Array, Array]:
    """Return means of x, y, and of the products x x' and x y', centred, over sampled patches."""
    top, left, bottom, right = _attribute(node, "pads", [0, 0, 0, 0])
    rows, columns = shape[2:]
    width = math.prod(shape[1:])
    xx, xy = np.zeros((width, width)), np.zeros((width, shape[0]))
    x_sum, y_sum, count = np.zeros(width), np.zeros(shape[0]), 0
    random = np.random.default_rng(1)
    for x, y in zip(inputs, evaluate(proto, node.output[0], feeds), strict=True):
        padded = np.pad(x[0], ((0, 0), (top, bottom), (left, right)))
        i = random.integers(0, y.shape[2], _FITTED_POSITIONS)
        j = random.integers(0, y.shape[3], _FITTED_POSITIONS)
        taps = [padded[:, i + a, j + b] for a in range(rows) for b in range(columns)]
        patches = np.stack(taps, -1).transpose(1, 0, 2).reshape(len(i), -1).astype(np.float64)
        targets = y[0][:, i, j].T.astype(np.float64)
        xx += patches.T @ patches
        xy += patches.T @ targets
        x_sum += patches.sum(0)
        y_sum += targets.sum(0)
        count += len(i)
    x_mean, y_mean = x_sum / count, y_sum / count
    return (
        xx / count - np.outer(x_mean, x_mean),
        xy / count - np.outer(x_mean, y_mean),
        x_mean,
        y_mean,
    )


def _solve(
    sums: tuple[Array, Array, Array, Array], weights: Array, top: int
) -> tuple[Array, Array, Array]:
    """Return weights on their grids, biases, and the grids' scales."""
    xx, xy, x_mean, y_mean = sums
    width = len(xx)
    damped = xx + np.eye(width) * max(_RIDGE * np.trace(xx) / width, 1e-12)
    rest: Array = weights + np.linalg.solve(damped, xy - xx @ weights.T).T
    scale = (np.maximum(np.abs(rest).max(1), 1e-12) / top).astype(np.float32).astype(np.float64)
    order = np.argsort(-np.diag(xx))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    rest = rest[:, order]
    exact = np.zeros_like(rest)
    for i in range(width):
        exact[:, i] = np.clip(np.rint(rest[:, i] / scale), -top, top) * scale
        error = (rest[:, i] - exact[:, i]) / factor[i, i]
        rest[:, i + 1 :] -= np.outer(error, factor[i, i + 1 :])
    result = np.empty_like(exact)
    result[:, order] = exact
    return result, y_mean - result @ x_mean, scale


def _set(graph: _Graph, name: str, values: Array) -> None:
    tensor = graph.constants[name]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))


# -- the graph ----------------------------------------------------------------------------


def _with_qdq(
    proto: onnx.ModelProto,
    chosen: Sequence[str],
    ranges: Mapping[str, Range],
    scales: Mapping[str, Array],
    reduce_range: bool,
) -> onnx.ModelProto:
    """Return a copy with QuantizeLinear and DequantizeLinear around the chosen nodes."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    overrides: dict[str, Any] = {
        name: [
            {"quant_type": QuantType.QInt8, "scale": np.float32(s), "zero_point": np.int8(0)}
            | {"axis": 0}
            for s in scale
        ]
        for name, scale in scales.items()
    }
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        _copy(proto),
        True,
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, data),
        list(chosen),
        [],
        ["Conv", "Add", *_FUSED],
        {"TensorQuantOverrides": overrides},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    return result


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Give every node a name of its own."""
    taken: set[str] = set()
    for i, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"node{i}.{node.op_type}"
        taken.add(node.name)


def _constants_to_initializers(proto: onnx.ModelProto) -> None:
    """Turn Constant nodes of tensors into initializers."""
    graph, kept = proto.graph, []
    for node in graph.node:
        tensors = [a.t for a in node.attribute if a.name == "value"]
        if node.op_type == "Constant" and tensors:
            tensor = graph.initializer.add()
            tensor.CopyFrom(tensors[0])
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
