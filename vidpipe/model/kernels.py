"""CUDA kernels that stand for the nodes around a luma model, and the session that uses them.

ONNX Runtime runs the steps from code values to the model and back as a dozen passes over the
enlarged picture. On a GPU two kernels do the same arithmetic in one pass each: luma in; luma
out with the last DepthToSpace, and chroma beside it. The model between them is a graph
of its own, with one fixed input and output, so one captured CUDA graph serves every slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from onnx import helper

from vidpipe.device import Event, Stream
from vidpipe.frame import Array, FrameSpec
from vidpipe.model import color
from vidpipe.model.compile import (
    Compiled,
    Tensor,
    alignment,
    load_static,
    output_spec,
    take_strength,
)
from vidpipe.model.cuda import CudaSession, GraphUse, copy_plane
from vidpipe.model.descriptor import Descriptor
from vidpipe.model.precision import narrow_graph
from vidpipe.providers.base import Found

_BLOCK = (32, 8)

_SOURCE = r"""
typedef {sample} sample_t;
typedef {body} body_t;

__device__ __forceinline__ float from_body(float v) {{ return v; }}
__device__ __forceinline__ float from_body(unsigned short v) {{
    float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f;
}}
__device__ __forceinline__ void to_body(float v, float* out) {{ *out = v; }}
__device__ __forceinline__ void to_body(float v, unsigned short* out) {{
    unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); *out = h;
}}
__device__ __forceinline__ sample_t code(float v) {{
    v = rintf(fminf(fmaxf(v, 0.0f), {maximum}));
    return (sample_t)__fmul_rn(v, {shift});
}}

extern "C" __global__ void luma_in(
    const sample_t* __restrict__ plane, long long pitch, body_t* __restrict__ out)
{{
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= {body_width} || y >= {body_height}) return;
    float v = (float)plane[min(y, {height} - 1) * pitch + min(x, {width} - 1)];
    v = __fadd_rn(__fmul_rn(v, {in_scale}), {in_offset});
    to_body(v, out + (long long)y * {body_width} + x);
}}

__device__ __forceinline__ void write_luma(
    const body_t* __restrict__ in, sample_t* __restrict__ plane)
{{
    const int width = {out_width}, height = {out_height};
    const long long size = {result_width}LL * {result_height};
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= {result_width} || y >= {result_height}) return;
    long long at = (long long)y * {result_width} + x;
    #pragma unroll
    for (int row = 0; row < {phases}; row++) {{
        int to_y = y * {phases} + row;
        if (to_y >= height) return;
        #pragma unroll
        for (int column = 0; column < {phases}; column++) {{
            int to_x = x * {phases} + column;
            float v = from_body(in[(row * {phases} + column) * size + at]);
            v = __fadd_rn(__fmul_rn(v, {out_scale}), {out_offset});
            if (to_x < width) plane[(long long)to_y * width + to_x] = code(v);
        }}
    }}
}}

__constant__ float weights_x[{scale}][{taps_x}] = {weights_x};
__constant__ float weights_y[{scale}][{taps_y}] = {weights_y};

__device__ __forceinline__ void write_chroma(
    const sample_t* __restrict__ in_u, const sample_t* __restrict__ in_v, long long pitch,
    sample_t* __restrict__ out_u, sample_t* __restrict__ out_v)
{{
    const int width = {chroma_width}, height = {chroma_height};
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    #pragma unroll
    for (int which = 0; which < 2; which++) {{
        const sample_t* in = which ? in_v : in_u;
        sample_t* out = which ? out_v : out_u;
        float sums[{scale}][{scale}] = {{}};
        #pragma unroll
        for (int i = 0; i < {taps_x}; i++) {{
            int from_x = min(max(x + ({first_x}) + i, 0), width - 1);
            float column[{scale}] = {{}};
            #pragma unroll
            for (int j = 0; j < {taps_y}; j++) {{
                int from_y = min(max(y + ({first_y}) + j, 0), height - 1);
                float v = __fmul_rn((float)in[from_y * pitch + from_x * {step}], {unshift});
                #pragma unroll
                for (int p = 0; p < {scale}; p++) column[p] += weights_y[p][j] * v;
            }}
            #pragma unroll
            for (int p = 0; p < {scale}; p++)
                #pragma unroll
                for (int q = 0; q < {scale}; q++) sums[p][q] += weights_x[q][i] * column[p];
        }}
        #pragma unroll
        for (int p = 0; p < {scale}; p++)
            #pragma unroll
            for (int q = 0; q < {scale}; q++)
                out[((long long)(y * {scale} + p) * width * {scale} + x * {scale} + q) * {step}]
                    = code(sums[p][q]);
    }}
}}

extern "C" __global__ void luma_out(
    const body_t* __restrict__ in, sample_t* __restrict__ plane)
{{
    write_luma(in, plane);
}}

// Blocks of the second layer of the grid write chroma: one launch costs the host half of two.
extern "C" __global__ void planes_out(
    const body_t* __restrict__ in, sample_t* __restrict__ plane,
    const sample_t* __restrict__ in_u, const sample_t* __restrict__ in_v, long long pitch,
    sample_t* __restrict__ out_u, sample_t* __restrict__ out_v)
{{
    if (blockIdx.z == 0) write_luma(in, plane);
    else write_chroma(in_u, in_v, pitch, out_u, out_v);
}}
"""


def suits(model: Descriptor, spec: FrameSpec) -> bool:
    """Return whether the kernels can stand for the nodes around this model."""
    return model.channels == "luma" and spec.format.model in ("yuv", "gray")


@dataclass(frozen=True, slots=True)
class Body:
    """A luma model without what lies around it.

    Attributes:
        compiled: its graph: one input (1, 1, h, w) and one output (1, n * n, h', w'), float16
            or float32, in the model's own unit.
        phases: n of the DepthToSpace that was taken off its end, or 1.
    """

    compiled: Compiled
    phases: int


def compile_body(model: Descriptor, spec: FrameSpec, *, half: bool = True) -> Body:
    """Return the graph of a luma model for frames of `spec`.

    Args:
        model: the model.
        spec: what comes in; its size is padded to the model's multiple.
        half: run it in float16, where that is possible.

    Raises:
        ModelError: the file cannot be used.
        SpecError: the model cannot take such frames.
    """
    out = output_spec(model, spec)
    align_x, align_y = alignment(model, spec)
    width, height = -(-spec.width // align_x) * align_x, -(-spec.height // align_y) * align_y
    proto = load_static(model, width, height, widen=not half)
    if half:
        narrow_graph(proto.graph)
    graph = proto.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    name, phases = model.output, 1
    last = next(n for n in reversed(graph.node) if name in n.output)
    if last.op_type == "DepthToSpace" and not any(name in n.input for n in graph.node):
        phases = next(a.i for a in last.attribute if a.name == "blocksize")
        graph.node.remove(last)
        name = last.input[0]
    scale = model.scale
    shapes = (
        (1, 1, height, width),
        (1, phases**2, height * scale // phases, width * scale // phases),
    )
    if model.layout == "NHWC":
        shapes = tuple((n, h, w, c) for n, c, h, w in shapes)  # type: ignore[assignment]
    tensors = [
        Tensor(tensor, shape, shape, np.dtype(helper.tensor_dtype_to_np_dtype(kinds[key])))
        for tensor, key, shape in zip(
            (model.input, name), (model.input, model.output), shapes, strict=True
        )
    ]
    kept, strength_shape = take_strength(graph, model.strength)
    for field, tensor in ((graph.input, tensors[0]), (graph.output, tensors[1])):
        del field[:]
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        field.append(helper.make_tensor_value_info(tensor.name, kind, tensor.shape))
    graph.input.extend(kept)
    proto.ir_version = max(proto.ir_version, 8)
    compiled = Compiled(
        proto, (tensors[0],), (tensors[1],), model.strength, strength_shape, spec, out
    )
    return Body(compiled, phases)


class LumaSession:
    """A luma model on an NVIDIA GPU between kernels of ours; a `Session` for CuPy arrays.

    Args:
        body: the model.
        model: what it promises.
        session: runs the body, on the stream that the frames' work is queued on.
        stream: that stream.
    """

    def __init__(self, body: Body, model: Descriptor, session: CudaSession, stream: Any) -> None:
        import cupy

        self._cupy = cupy
        self._session = session
        self._stream = stream
        self._scale = model.scale
        (result,) = body.compiled.outputs
        with stream:
            self._result = cupy.empty(result.plane_shape, result.dtype)
        session.bind(0, [self._result])
        self._slots: dict[int, Sequence[Array]] = {}
        self.note = session.note
        sizes = _sizes(body)
        self._in_grid, self._luma_grid = _grid(*sizes.body), _grid(*sizes.result)
        columns, rows = map(max, self._luma_grid, _grid(*sizes.chroma))
        self._planes_grid = (columns, rows, 2)
        module = cupy.RawModule(code=_source(body, model, sizes), options=("-std=c++17",))
        names = ("luma_in", "luma_out", "planes_out")
        self._luma_in, self._luma_out, self._planes_out = map(module.get_function, names)

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        self._slots[slot] = outputs

    def prepare(self) -> GraphUse:
        """See `CudaSession.prepare`."""
        return self._session.prepare()

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`; `stream` is the one the session was made with."""
        assert stream is self._stream
        outputs = self._slots[slot]
        queue: Any = self._stream
        self._take(inputs[0])
        self._session.launch(0)
        if len(inputs) == 1 or self._scale == 1:
            places = (self._result.data.ptr, outputs[0].data.ptr)
            self._luma_out(self._luma_grid, _BLOCK, places, stream=queue)
            for source, target in zip(inputs[1:], outputs[1:], strict=True):
                copy_plane(self._cupy, source, target, queue)
        else:
            self._give_all(inputs[1:], outputs[0], outputs[1:])
        event: Event = queue.record()
        return event

    def _take(self, plane: Array) -> None:
        (target,) = self._session.inputs
        places = (plane.data.ptr, plane.strides[0] // plane.itemsize, target.data.ptr)
        self._luma_in(self._in_grid, _BLOCK, places, stream=self._stream)

    def _give_all(self, inputs: Sequence[Array], luma: Array, chroma: Sequence[Array]) -> None:
        """Write luma from the model's result, and enlarged chroma from the input's."""
        item = luma.itemsize
        if len(inputs) == 1:  # Cb and Cr take turns
            u, v, to_u, to_v = (
                p.data.ptr + c * item for p in (inputs[0], chroma[0]) for c in (0, 1)
            )
        else:
            u, v, to_u, to_v = (p.data.ptr for p in (*inputs, *chroma))
        pitch = inputs[0].strides[0] // item
        places = (self._result.data.ptr, luma.data.ptr, u, v, pitch, to_u, to_v)
        self._planes_out(self._planes_grid, _BLOCK, places, stream=self._stream)

    def set_strength(self, value: float) -> None:
        """See `Session.set_strength`."""
        self._session.set_strength(value)

    def nodes_by_provider(self) -> dict[str, int]:
        """See `Session.nodes_by_provider`."""
        return self._session.nodes_by_provider()

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()
        self._slots.clear()


def gpu_session(
    model: Descriptor,
    compiled: Compiled,
    *,
    stream: Any,
    found: Found | None = None,
    strength: float | None = None,
    half: bool = True,
    kernels: bool = True,
    memory_bytes: int | None = None,
) -> LumaSession | CudaSession:
    """Return the session that runs a model on frames of an NVIDIA GPU.

    The caller binds every slot of its ring, then calls `prepare`, before the first frame.

    Args:
        model: the model.
        compiled: its graph for the frames, run as it is where the kernels do not suit.
        stream: what the work is queued on.
        found: the execution provider; CUDA's own if not given.
        strength: first value of the strength input, where the model has one.
        half: run the model in float16, where that is possible.
        kernels: let the kernels stand for the nodes around the model, where they suit.
        memory_bytes: the most that the provider may allocate; None for all there is.

    Raises:
        See `CudaSession`.
    """
    spec = compiled.spec
    body = compile_body(model, spec, half=half) if kernels and suits(model, spec) else None
    session = CudaSession(
        compiled if body is None else body.compiled,
        device=spec.device,
        stream=stream,
        found=found,
        strength=strength,
        memory_bytes=memory_bytes,
        name=model.name,
    )
    return session if body is None else LumaSession(body, model, session, stream)


class _Sizes(NamedTuple):
    """Sizes that the kernels are compiled for, (width, height).

    Attributes:
        body: of the model's input; result: of a channel of its output.
        chroma: of the chroma planes that come in.
    """

    body: tuple[int, int]
    result: tuple[int, int]
    chroma: tuple[int, int]


def _sizes(body: Body) -> _Sizes:
    compiled = body.compiled
    (taken,), (given,), spec = compiled.inputs, compiled.outputs, compiled.spec
    return _Sizes(
        _plane_size(taken),
        _plane_size(given, body.phases),
        spec.format.chroma_size(spec.width, spec.height),
    )


def _plane_size(tensor: Tensor, phases: int = 1) -> tuple[int, int]:
    """Return (width, height) of one plane of a 4-D tensor, NCHW or with one channel last."""
    channels = phases**2
    _, a, b, c = tensor.shape
    return (c, b) if a == channels else (b, a)


def _grid(width: int, height: int) -> tuple[int, int]:
    return -(-width // _BLOCK[0]), -(-height // _BLOCK[1])


def _source(body: Body, model: Descriptor, sizes: _Sizes) -> str:
    """Return the kernels' text for one model and format."""
    spec = body.compiled.spec
    format = spec.format
    luma = color.luma_quantizer(format.bits, spec.resolved_color().range)
    unit = 255.0 if model.range == "0..255" else 1.0
    factor = 1 << format.shift
    in_scale = unit / (luma.scale * factor)
    sites = color.site_offsets(format, spec.color)
    factors = (1 << format.subsampling[0], 1 << format.subsampling[1])
    x, y = (
        color.enlarge_filter(model.scale, f, offset)
        for f, offset in zip(factors, sites, strict=True)
    )
    half = body.compiled.inputs[0].dtype == np.float16
    out = body.compiled.out
    return _SOURCE.format(
        width=spec.width,
        height=spec.height,
        body_width=sizes.body[0],
        body_height=sizes.body[1],
        result_width=sizes.result[0],
        result_height=sizes.result[1],
        out_width=out.width,
        out_height=out.height,
        chroma_width=sizes.chroma[0],
        chroma_height=sizes.chroma[1],
        sample="unsigned char" if format.bits == 8 else "unsigned short",
        body="unsigned short" if half else "float",
        maximum=_literal(luma.maximum),
        shift=_literal(factor),
        unshift=_literal(1.0 / factor),
        in_scale=_literal(in_scale),
        in_offset=_literal(-luma.zero * factor * in_scale),
        out_scale=_literal(luma.scale / unit),
        out_offset=_literal(luma.zero),
        phases=body.phases,
        scale=model.scale,
        taps_x=x.taps,
        taps_y=y.taps,
        first_x=x.first,
        first_y=y.first,
        weights_x=_table(x.weights),
        weights_y=_table(y.weights),
        step=2 if format.interleaved else 1,
    )


def _literal(value: float) -> str:
    """Return the float32 nearest to a value, as C writes it exactly."""
    return f"{float(np.float32(value)).hex()}f"


def _table(weights: color.Floats) -> str:
    rows = ("{" + ", ".join(_literal(w) for w in row) + "}" for row in weights)
    return "{" + ", ".join(rows) + "}"
