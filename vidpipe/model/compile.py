"""Build one ONNX graph of static shapes around a model: decoded planes in, planes out.

The graph's inputs are the planes of a link as they lie in memory, as 4-D tensors that alias
them: (1, 1, h, w) for a plane of (h, w), (1, h, w, 2) for interleaved chroma. Its outputs
are such planes of the output spec. In between:

    planes -> nominal values -> [R, G, B] -> model -> [Y, Cb, Cr] -> code values -> planes

A luma model sees luma alone; chroma is enlarged beside it, in code values, by the cubic
filter of `vidpipe.model.color`, one convolution to all phases. At scale 1 chroma is copied.
An RGB model sees chroma brought to luma positions; its output's chroma is low-passed back to
the chroma sites. Grey pictures go to RGB models as three equal channels.

Code values are rounded to the nearest, ties to even, and clipped to what the sample can
hold: head- and footroom are kept.

Planes are first extended by their edges to whole chroma samples and to the model's size
multiple, so everything in between is of even size; the surplus is cropped at the end.

Convolutions and transposes stand for Resize and DepthToSpace, which ONNX Runtime's CPU
provider runs many times slower than the work they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vidpipe.errors import ModelError, SpecError
from vidpipe.frame import FrameSpec
from vidpipe.model import color
from vidpipe.model.color import Filter, Quantizer
from vidpipe.model.descriptor import Descriptor
from vidpipe.model.precision import narrow_graph, widen_graph

OPSET = 13
"""Oldest operator set that the nodes around the model are written for."""

_OURS = "vidpipe/"
_CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a compiled graph.

    Attributes:
        name: as in the graph.
        shape: 4-D, static.
        plane_shape: shape of the plane that it aliases, (h, w) or (h, w, 2).
        dtype: uint8 or uint16.
    """

    name: str
    shape: tuple[int, ...]
    plane_shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A graph ready for a session.

    Attributes:
        proto: the ONNX model.
        inputs, outputs: one tensor for each plane, in plane order.
        strength: name of the float32 input for the model's strength, or None.
        strength_shape: its shape, () or (1,) and the like.
        spec: what the graph takes.
        out: what it gives.
    """

    proto: onnx.ModelProto
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    strength: str | None
    strength_shape: tuple[int, ...]
    spec: FrameSpec
    out: FrameSpec


def output_spec(model: Descriptor, spec: FrameSpec) -> FrameSpec:
    """Return what the model makes of frames of `spec`.

    Raises:
        SpecError: it cannot take them.
    """
    if model.channels != "luma":
        color.working_coefficients(spec)
    width, height = spec.width * model.scale, spec.height * model.scale
    return replace(spec, width=width, height=height, color=color.output_color(spec, width, height))


def alignment(model: Descriptor, spec: FrameSpec) -> tuple[int, int]:
    """Return the (x, y) multiples that the padded picture's size must have."""
    sub_x, sub_y = spec.format.subsampling
    return math.lcm(model.multiple, 1 << sub_x), math.lcm(model.multiple, 1 << sub_y)


def compile_model(
    model: Descriptor,
    spec: FrameSpec,
    *,
    portable: bool = False,
    widen: bool = True,
    half: bool = False,
) -> Compiled:
    """Compile the graph that takes frames of `spec`.

    Args:
        model: the model.
        spec: what comes in; its size is that of the graph, tiles included.
        portable: spell the last step, to code values, as plain arithmetic, which every
            execution provider runs. Otherwise as QuantizeLinear, one pass over the data on
            the CPU provider. The results are the same.
        widen: run float16 nodes in float32; the CPU provider has no float16 kernels and
            would convert before and after every node.
        half: run the model's own float32 nodes in float16, where that is possible.

    Raises:
        ModelError: the file cannot be used.
        SpecError: the model cannot take such frames.
    """
    out = output_spec(model, spec)
    align_x, align_y = alignment(model, spec)
    width, height = -(-spec.width // align_x) * align_x, -(-spec.height // align_y) * align_y
    if model.size is not None and (width, height) != model.size:
        raise SpecError(
            f"model '{model.name}' takes {model.size[0]}x{model.size[1]} only, got {width}x{height}"
        )
    proto = load_static(model, width, height, widen=widen)
    if half:
        narrow_graph(proto.graph)
    builder = _Builder(model, spec, out, width, height, proto, portable)
    return builder.build()


def load_static(model: Descriptor, width: int, height: int, *, widen: bool) -> onnx.ModelProto:
    """Load the model with its size fixed and its operator set recent enough.

    Raises:
        ModelError: the operator set is too old to be converted.
    """
    proto = convert_opset(onnx.load(str(model.path)), model.name)
    graph = proto.graph
    del graph.value_info[:]
    for value in graph.input:
        if value.name == model.input:
            shape = _nhwc((1, model.plane_count, height, width), model.layout)
            for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                dim.dim_value = size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    if widen:
        widen_graph(graph)
    return proto


def convert_opset(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model in operator set `OPSET`, or as it is where that is newer.

    Raises:
        ModelError: the operator set is too old to be converted.
    """
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)
    if opset >= OPSET:
        return proto
    from onnx import version_converter

    try:
        return version_converter.convert_version(proto, OPSET)
    except Exception as error:  # it raises whatever it stumbles over
        raise ModelError(
            f"model '{name}' is of ONNX operator set {opset}, which cannot be "
            f"converted: {str(error).splitlines()[0]}",
            hint=f"Export it again with opset {OPSET} or later",
        ) from None


def _ends_quantized(model: Descriptor, graph: onnx.GraphProto) -> bool:
    """Say whether the model's own last operators may work on DequantizeLinear's results."""
    makers = {name: node for node in graph.node for name in node.output}
    if all(node.op_type != "DequantizeLinear" for node in makers.values()):
        return False
    last = makers[model.output]
    if last.op_type == "DepthToSpace":
        last = makers.get(last.input[0], last)
    fixed = {i.name for i in graph.initializer}
    given = [makers.get(name) for name in last.input if name not in fixed]
    in_float = any(node is not None and node.op_type != "DequantizeLinear" for node in given)
    return not (model.channels == "luma" and last.op_type == "Add" and in_float)


def _nhwc(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    n, c, h, w = shape
    return shape if layout == "NCHW" else (n, h, w, c)


class _Builder:
    """Writes the nodes before and after the model's own."""

    def __init__(
        self,
        model: Descriptor,
        spec: FrameSpec,
        out: FrameSpec,
        width: int,
        height: int,
        proto: onnx.ModelProto,
        portable: bool,
    ) -> None:
        self.model = model
        self.spec = spec
        self.out = out
        self.width = width
        self.height = height
        self.proto = proto
        # Between a DequantizeLinear and a QuantizeLinear, ONNX Runtime takes an operator to be
        # meant in int8. So none is put in front of a model, and none behind one that ends so.
        self.portable = portable or _ends_quantized(model, proto.graph)
        self.format = spec.format
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self.nodes = self.before
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._aliases: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._count = 0
        self._unit = 255.0 if model.range == "0..255" else 1.0
        code_range = spec.resolved_color().range
        self._luma = color.luma_quantizer(self.format.bits, code_range)
        self._chroma = color.chroma_quantizer(self.format.bits, code_range)
        self._sites = color.site_offsets(self.format, spec.color)
        self._factors = (1 << self.format.subsampling[0], 1 << self.format.subsampling[1])

    # -- the whole graph ------------------------------------------------------------------

    def build(self) -> Compiled:
        """Return the compiled graph."""
        self._declare()
        if self.format.model == "gray":
            self._gray()
        elif self.format.model == "rgb":
            self._rgb_planes()
        elif self.model.channels == "luma":
            self._luma_beside_chroma()
        else:
            self._yuv_through_rgb()
        return self._finish()

    def _declare(self) -> None:
        """Name the graph's inputs and outputs after the planes."""
        for spec, tensors, kind in (
            (self.spec, self.inputs, "in"),
            (self.out, self.outputs, "out"),
        ):
            for i, shape in enumerate(spec.plane_shapes()):
                full = (1, 1, *shape) if len(shape) == 2 else (1, *shape)
                tensors.append(Tensor(f"{_OURS}{kind}{i}", full, shape, spec.format.dtype))

    def _finish(self) -> Compiled:
        graph = self.proto.graph
        kept, strength_shape = take_strength(graph, self.model.strength)
        nodes = [*self.before, *graph.node, *self.after]
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self.initializers)
        for field, tensors in ((graph.input, self.inputs), (graph.output, self.outputs)):
            del field[:]
            field.extend(
                helper.make_tensor_value_info(
                    t.name, helper.np_dtype_to_tensor_dtype(t.dtype), t.shape
                )
                for t in tensors
            )
        graph.input.extend(kept)
        # Before version 4 of the format, constants had to be inputs too.
        self.proto.ir_version = max(self.proto.ir_version, 8)
        if not self.portable and all(o.domain != _CONTRIB for o in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        return Compiled(
            self.proto,
            tuple(self.inputs),
            tuple(self.outputs),
            self.model.strength,
            strength_shape,
            self.spec,
            self.out,
        )

    # -- one kind of picture each ---------------------------------------------------------

    def _gray(self) -> None:
        value = self._align(self._nominal(self.inputs[0].name, self._luma))
        if self.model.channels == "luma":
            self._write_luma(*self._through_model(value))
        else:
            value, _ = self._through_model(self.add("Concat", value, value, value, axis=1))
            self._write_luma(self._luma_of(value))

    def _luma_beside_chroma(self) -> None:
        value = self._align(self._nominal(self.inputs[0].name, self._luma))
        self._write_luma(*self._through_model(value))
        scale = self.model.scale
        if scale == 1:
            for plane, result in zip(self.inputs[1:], self.outputs[1:], strict=True):
                self.add("Identity", plane.name, out=result.name)
            return
        x, y = (
            color.enlarge_filter(scale, factor, offset)
            for factor, offset in zip(self._factors, self._sites, strict=True)
        )
        codes = self._nominal(self._chroma_planes(), Quantizer(1.0, 0.0, self._luma.maximum))
        value = self._enlarge(codes, x, y)
        value = self._quantize(value, Quantizer(1.0, 0.0, self._luma.maximum))
        width, height = self.format.chroma_size(self.spec.width, self.spec.height)
        if self.format.interleaved:
            value = self._reshape(value, 2, scale * scale, height, width)
            value = self.add("Transpose", value, perm=[1, 0, 2, 3])
            value = self._interleave(value, 1, scale, 2 * scale, height, width)
        else:
            value = self._interleave(value, 2, scale, scale, height, width)
        self._write_chroma(value, height * scale, width * scale)

    def _yuv_through_rgb(self) -> None:
        k_r, k_b = color.working_coefficients(self.spec)
        factor_x, factor_y = self._factors
        width, height = self.width // factor_x, self.height // factor_y
        chroma = self._nominal(self._chroma_planes(), self._chroma)
        w, h = self.format.chroma_size(self.spec.width, self.spec.height)
        chroma = self._edges(chroma, (0, height - h), (0, width - w))
        x, y = (
            color.to_luma_filter(factor, offset)
            for factor, offset in zip(self._factors, self._sites, strict=True)
        )
        # R, G, B = Y + (their shares of Cb and Cr): the matrix is part of the convolution.
        shares = color.ycc_to_rgb(k_r, k_b)[:, 1:]
        if factor_x == factor_y == 1:
            beside = self._mix(chroma, shares, height, width)
        else:
            beside = self._resample(chroma, shares, x, y)
            beside = self._interleave(beside, 3, factor_y, factor_x, height, width)
        luma = self._align(self._nominal(self.inputs[0].name, self._luma))
        value, _ = self._through_model(self.add("Add", luma, beside))
        self._write_luma(self._luma_of(value))

        x, y = (
            color.to_chroma_filter(factor, offset)
            for factor, offset in zip(self._factors, self._sites, strict=True)
        )
        chroma = self._mix(value, color.rgb_to_ycc(k_r, k_b)[1:], *self._enlarged())
        chroma = self._shrink(chroma, x, y)
        chroma = self._quantize(chroma, self._chroma)
        width, height = (width * self.model.scale, height * self.model.scale)
        if self.format.interleaved:
            chroma = self.add("Transpose", chroma, perm=[0, 2, 3, 1])
        self._write_chroma(chroma, height, width)

    def _rgb_planes(self) -> None:
        green, blue, red = (t.name for t in self.inputs)
        value = self.add("Concat", red, green, blue, axis=1)
        value = self._align(self._nominal(value, self._luma))
        if self.model.channels == "luma":
            value = self._luma_of_rgb(value)
        else:
            value, _ = self._through_model(value)
        value = self._quantize(value, self._luma)
        height, width = self.out.height, self.out.width
        for index, channel in enumerate((1, 2, 0)):
            self._slice(value, ((1, channel, 1), (2, 0, height), (3, 0, width)), index)

    def _luma_of_rgb(self, value: str) -> str:
        """Send the luma of R, G, B through the model and chroma beside it; return R, G, B."""
        k_r, k_b = color.working_coefficients(self.spec)
        to_ycc = color.rgb_to_ycc(k_r, k_b)
        scale = self.model.scale
        x = color.enlarge_filter(scale, 1, 0.0)
        shares = color.ycc_to_rgb(k_r, k_b)[:, 1:] @ to_ycc[1:]
        if scale == 1:
            beside = self._mix(value, shares, self.height, self.width)
        else:
            beside = self._resample(value, shares, x, x)
        beside = self._interleave(beside, 3, scale, scale, self.height, self.width)
        luma, phases = self._through_model(self._mix(value, to_ycc[:1], self.height, self.width))
        luma = self._interleave(luma, 1, phases, phases, *self._before_phases(phases))
        return self.add("Add", luma, beside)

    # -- steps ----------------------------------------------------------------------------

    def _chroma_planes(self) -> str:
        """Return both chroma planes as one tensor of (1, 2, h, w), in codes."""
        if self.format.interleaved:
            return self.add("Transpose", self.inputs[1].name, perm=[0, 3, 1, 2])
        return self.add("Concat", self.inputs[1].name, self.inputs[2].name, axis=1)

    def _nominal(self, codes: str, quantizer: Quantizer) -> str:
        """Turn codes into float32 nominal values, times the model's unit."""
        factor = 1 << self.format.shift
        scale = self._unit_of(quantizer) / (quantizer.scale * factor)
        value = self.add("Cast", codes, to=TensorProto.FLOAT)
        if scale != 1.0:
            value = self.add("Mul", value, self.constant(np.float32(scale)))
        if quantizer.zero != 0.0:
            offset = -quantizer.zero * factor * scale
            value = self.add("Add", value, self.constant(np.float32(offset)))
        return value

    def _quantize(self, value: str, quantizer: Quantizer) -> str:
        """Turn nominal values, times the model's unit, into codes."""
        step = self._unit_of(quantizer) / quantizer.scale
        sample = self.format.dtype.type
        shift = np.float32(1 << self.format.shift)
        if not self.portable:
            if quantizer.maximum != np.iinfo(sample).max:
                top = (quantizer.maximum - quantizer.zero) * step
                value = self.add("Min", value, self.constant(np.float32(top)))
            domain = self._quantization_domain()
            zero = self.constant(sample(round(quantizer.zero)))
            step_of = self.constant(np.float32(step))
            value = self.add("QuantizeLinear", value, step_of, zero, domain=domain)
            if not self.format.shift:
                return value
            none = self.constant(sample(0))
            value = self.add("DequantizeLinear", value, self.constant(shift), none, domain=domain)
            return self._cast(value)
        if step != 1.0:
            value = self.add("Mul", value, self.constant(np.float32(1.0 / step)))
        if quantizer.zero != 0.0:
            value = self.add("Add", value, self.constant(np.float32(quantizer.zero)))
        low, high = np.float32(0.0), np.float32(quantizer.maximum)
        value = self.add("Clip", value, self.constant(low), self.constant(high))
        value = self.add("Round", value)
        if self.format.shift:
            value = self.add("Mul", value, self.constant(shift))
        return self._cast(value)

    def _cast(self, value: str) -> str:
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(self.format.dtype))

    def _unit_of(self, quantizer: Quantizer) -> float:
        """Return what nominal 1 is inside the graph; codes that stay codes have no unit."""
        return 1.0 if quantizer.scale == 1.0 else self._unit

    def _quantization_domain(self) -> str:
        # The standard operators take uint16 only from operator set 21 on.
        return "" if self.format.dtype == np.uint8 else _CONTRIB

    def _align(self, value: str) -> str:
        """Extend luma or R, G, B by its edges to the aligned size."""
        return self._edges(
            value, (0, self.height - self.spec.height), (0, self.width - self.spec.width)
        )

    def _edges(self, value: str, rows: tuple[int, int], columns: tuple[int, int]) -> str:
        """Extend a picture by its edges, (before, after) along each axis."""
        if not any((*rows, *columns)):
            return value
        pads = [0, 0, rows[0], columns[0], 0, 0, rows[1], columns[1]]
        return self.add("Pad", value, self.constant(np.array(pads, np.int64)), mode="edge")

    def _enlarge(self, value: str, x: Filter, y: Filter) -> str:
        """Resample both chroma planes to all phases, edges replicated: (channel, y, x phase).

        One axis after the other and each channel alone: half the time of one convolution.
        """
        value = self._edges(value, _reach(y), _reach(x))
        down = np.tile(y.weights[:, None, :, None], (2, 1, 1, 1)).astype(np.float32)
        across = np.tile(x.weights[:, None, None, :], (2 * y.phases, 1, 1, 1)).astype(np.float32)
        value = self.add("Conv", value, self.constant(down), group=2)
        return self.add("Conv", value, self.constant(across), group=2 * y.phases)

    def _shrink(self, value: str, x: Filter, y: Filter) -> str:
        """Low-pass and subsample two planes, (1, 2, h, w), edges replicated."""
        for axis, shape in ((y, (2, 1, -1, 1)), (x, (2, 1, 1, -1))):
            if axis.step == 1:
                continue
            vertical = axis is y
            rows, columns = (_reach(y), (0, 0)) if vertical else ((0, 0), _reach(x))
            weights = np.repeat(axis.weights, 2, axis=0).reshape(shape).astype(np.float32)
            value = self.add(
                "Conv",
                self._edges(value, rows, columns),
                self.constant(weights),
                group=2,
                strides=[axis.step, 1] if vertical else [1, axis.step],
            )
        return value

    def _resample(self, value: str, matrix: color.Floats, x: Filter, y: Filter) -> str:
        """Mix channels and resample, edges replicated: one convolution to all phases.

        The output's channels are the phases of each channel of `matrix`, in the order
        (channel, y phase, x phase).
        """
        weights = np.einsum("oi,py,qx->opqiyx", matrix, y.weights, x.weights)
        weights = weights.reshape(-1, matrix.shape[1], y.taps, x.taps)
        return self.add(
            "Conv",
            self._edges(value, _reach(y), _reach(x)),
            self.constant(weights.astype(np.float32)),
        )

    def _mix(self, value: str, matrix: color.Floats, height: int, width: int) -> str:
        """Mix the channels of (1, C, h, w).

        A product of matrices: the CPU provider would lay a 1x1 convolution out anew, in
        blocks of sixteen channels.
        """
        value = self._reshape(value, matrix.shape[1], height * width)
        value = self.add("MatMul", self.constant(matrix.astype(np.float32)), value)
        return self._reshape(value, 1, matrix.shape[0], height, width)

    def _luma_of(self, value: str) -> str:
        """Return the luma of the model's R, G, B."""
        matrix = color.rgb_to_ycc(*color.working_coefficients(self.spec))
        return self._mix(value, matrix[:1], *self._enlarged())

    def _enlarged(self) -> tuple[int, int]:
        """Return (height, width) of the model's output."""
        return self.height * self.model.scale, self.width * self.model.scale

    def _interleave(self, value: str, count: int, y: int, x: int, height: int, width: int) -> str:
        """Lay phases side by side: (1, count * y * x, h, w) to (1, count, h * y, w * x)."""
        if x == y == 1:
            return value
        if x > 1:
            value = self._reshape(value, count * y, x, height, width)
            value = self.add("Transpose", value, perm=[0, 2, 3, 1])
        if y > 1:
            value = self._reshape(value, count, y, height, width * x)
            value = self.add("Transpose", value, perm=[0, 2, 1, 3])
        shape = (count, height, y, width * x)
        result = self._reshape(value, 1, count, height * y, width * x)
        self._aliases[result] = value, shape
        return result

    def _before_phases(self, phases: int) -> tuple[int, int]:
        scale = self.model.scale
        return self.height * scale // phases, self.width * scale // phases

    def _through_model(self, value: str) -> tuple[str, int]:
        """Feed the model; return its output, (1, C, h, w) float32, and its pending phases.

        A luma model's final DepthToSpace is taken off, so that it can be done on code values:
        phases n > 1 say that the output is (1, n * n, h / n, w / n).
        """
        model, graph = self.model, self.proto.graph
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        kind = kinds[model.input]
        if model.channels == "bgr":
            value = self._reverse_channels(value)
        if model.layout == "NHWC":
            value = self.add("Transpose", value, perm=[0, 2, 3, 1])
        if kind != TensorProto.FLOAT:
            value = self.add("Cast", value, to=kind)
        self._rename(value, model.input)
        self.nodes = self.after
        shape = _nhwc((1, model.plane_count, self.height, self.width), model.layout)
        graph.value_info.append(helper.make_tensor_value_info(model.input, kind, shape))
        value, phases = model.output, 1
        last = next(n for n in reversed(graph.node) if value in n.output)
        used = [n for n in graph.node if value in n.input]
        if last.op_type == "DepthToSpace" and model.channels == "luma" and not used:
            graph.node.remove(last)
            value = last.input[0]
            phases = next(a.i for a in last.attribute if a.name == "blocksize")
        if kinds[model.output] != TensorProto.FLOAT:
            value = self.add("Cast", value, to=TensorProto.FLOAT)
        if model.layout == "NHWC":
            value = self.add("Transpose", value, perm=[0, 3, 1, 2])
        if model.channels == "bgr":
            value = self._reverse_channels(value)
        return value, phases

    def _reverse_channels(self, value: str) -> str:
        return self.add("Gather", value, self.constant(np.array([2, 1, 0], np.int64)), axis=1)

    def _write_luma(self, value: str, phases: int = 1) -> None:
        value = self._quantize(value, self._luma)
        value = self._interleave(value, 1, phases, phases, *self._before_phases(phases))
        height, width = self.out.height, self.out.width
        scale = self.model.scale
        if (width, height) == (self.width * scale, self.height * scale):
            self._emit(value, 0)
        else:
            self._slice(value, ((2, 0, height), (3, 0, width)), 0)

    def _write_chroma(self, value: str, height: int, width: int) -> None:
        """Crop codes of (1, 2, h, w), or anything that aliases (1, h, w, 2), to the planes."""
        out_width, out_height = self.format.chroma_size(self.out.width, self.out.height)
        if self.format.interleaved:
            if (width, height) == (out_width, out_height):
                self._emit(value, 1)
            else:
                value = self._reshape(value, 1, height, width, 2)
                self._slice(value, ((1, 0, out_height), (2, 0, out_width)), 1)
            return
        for channel in (0, 1):
            crop = ((1, channel, 1), (2, 0, out_height), (3, 0, out_width))
            self._slice(value, crop, 1 + channel)

    # -- nodes ----------------------------------------------------------------------------

    def add(
        self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node and return the name of its output."""
        self._count += 1
        name = f"{_OURS}{self._count}.{op}"
        out = out or name
        node = helper.make_node(op, list(inputs), [out], name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return out

    def constant(self, array: np.generic | np.ndarray[Any, Any]) -> str:
        """Add an initializer and return its name."""
        self._count += 1
        name = f"{_OURS}{self._count}.constant"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _reshape(self, value: str, *shape: int) -> str:
        return self.add("Reshape", value, self.constant(np.array(shape, np.int64)))

    def _slice(self, value: str, ranges: Sequence[tuple[int, int, int]], index: int) -> None:
        """Write the output plane `index` from a slice: (axis, start, size) each."""
        axes = np.array([r[0] for r in ranges], np.int64)
        starts = np.array([r[1] for r in ranges], np.int64)
        ends = np.array([r[1] + r[2] for r in ranges], np.int64)
        bounds = (self.constant(a) for a in (starts, ends, axes))
        self.add("Slice", value, *bounds, out=self.outputs[index].name)

    def _emit(self, value: str, index: int) -> None:
        """Let the node that makes `value` write the output plane `index`."""
        tensor = self.outputs[index]
        if value in self._aliases:  # a Reshape into an output would be a copy
            self.nodes.pop()
            value, shape = self._aliases[value]
            self.outputs[index] = replace(tensor, shape=shape)
        self._rename(value, tensor.name)

    def _rename(self, old: str, new: str) -> None:
        for node in (*self.before, *self.proto.graph.node, *self.after):
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new


def _reach(axis: Filter) -> tuple[int, int]:
    """Return the samples that a filter reads (before, after) a picture."""
    return max(0, -axis.first), max(0, axis.first + axis.taps - axis.step)


def take_strength(
    graph: onnx.GraphProto, name: str | None
) -> tuple[list[onnx.ValueInfoProto], tuple[int, ...]]:
    """Let callers give a model's strength as float32 of a fixed shape, whatever it computes in.

    Args:
        graph: the model's; gets a Cast in front where it computes in something else.
        name: of the strength input, or None.

    Returns:
        The input to declare and its shape; none and () where the model has no strength.
    """
    for value in graph.input:
        if value.name != name:
            continue
        kind = value.type.tensor_type.elem_type
        shape = tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)
        if kind != TensorProto.FLOAT:
            inner = f"{_OURS}strength"
            for node in graph.node:
                for i, read in enumerate(node.input):
                    if read == name:
                        node.input[i] = inner
            cast = helper.make_node("Cast", [value.name], [inner], name=f"{inner}.Cast", to=kind)
            graph.node.insert(0, cast)
        return [helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape)], shape
    return [], ()
