"""Find out by short runs on small pictures what a model file does not say, and check claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vidpipe.errors import ModelError
from vidpipe.model.descriptor import Descriptor, Outline, exact_scale, outline_of, read_model
from vidpipe.model.session import CPU_PROVIDER, first_line, import_onnxruntime

Array = np.ndarray[Any, Any]

# (multiple, height, width): sizes that are that multiple of odd numbers, so that a size
# passes only where the multiple is enough. Large enough for reflected borders.
_SIZES = (
    (1, 53, 47),
    (2, 54, 50),
    (4, 60, 52),
    (8, 72, 56),
    (16, 80, 48),
    (32, 96, 160),
    (64, 192, 64),
)


class Trial:
    """A model on ONNX Runtime's CPU provider, for small pictures of any size.

    Args:
        proto: the model.
        outline: its inputs and outputs.
        path: for messages.
    """

    def __init__(self, proto: Any, outline: Outline, path: Path) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.outline = outline
        self.path = path
        self.error = ""
        try:
            self._session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=[CPU_PROVIDER]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(
                f"ONNX Runtime cannot load model '{path.name}': {first_line(error)}"
            ) from None

    def run(self, picture: Array) -> Array | None:
        """Return the output for a picture, both (C, h, w) float32, or None after an error.

        The error's first line is kept in `error`.
        """
        outline = self.outline
        value = picture.astype(outline.dtype)
        value = value if outline.layout == "NCHW" else value.transpose(1, 2, 0)
        feeds = {outline.input: np.ascontiguousarray(value)[None]}
        if outline.strength is not None:
            name = outline.strength
            shape = next(i.shape for i in self._session.get_inputs() if i.name == name)
            feeds[name] = np.ones([1] * len(shape), np.float32)
        try:
            (result,) = self._session.run([outline.output], feeds)
        except Exception as error:  # see above
            self.error = first_line(error)
            return None
        if result.ndim != 4:
            raise ModelError(
                f"model '{self.path.name}': its output has {result.ndim} dimensions, an image "
                "has four"
            )
        out: Array = result[0].astype(np.float32)
        return out if outline.layout == "NCHW" else out.transpose(2, 0, 1)

    def fits(self, channels: int, height: int, width: int) -> int | None:
        """Return the scale if the model takes this size and keeps to its scale, else None."""
        out = self.run(noise(channels, height, width))
        if out is None or out.shape[0] != channels:
            return None
        scale = out.shape[1] // height
        exact = out.shape[1:] == (height * scale, width * scale)
        return scale if exact and scale else None


def explore(
    proto: Any, outline: Outline, facts: dict[str, Any], path: Path, missing: list[str]
) -> dict[str, Any]:
    """Return the missing facts.

    Args:
        proto: the model.
        outline: its inputs and outputs.
        facts: what is known so far.
        path: for messages.
        missing: of "scale", "channels", "range", "multiple" and "overlap".

    Raises:
        ModelError: the model does not run, or does not map an image to an image.
    """
    trial = Trial(proto, outline, path)
    found: dict[str, Any] = {}
    channels = {"luma": 1, "rgb": 3, "bgr": 3}.get(facts.get("channels") or "", 0)
    counts = [channels] if channels else [3, 1]
    sizes = list(_SIZES)
    if outline.height and outline.width:
        sizes = [(1, outline.height, outline.width)]
    elif facts.get("multiple"):
        m = int(facts["multiple"])
        odd = [n for n in range(1, 65, 2) if n * m >= 48][:2]
        sizes = [(m, odd[0] * m, odd[-1] * m)]
    fitting = _first_fit(trial, counts, sizes)
    if fitting is None:
        _explain(trial, counts[0], sizes[-1][1:])
    multiple, height, width, channels, scale = fitting
    exact_scale((1, 1), (scale, scale), path.name)
    found["multiple"] = multiple
    found["scale"] = scale
    found["channels"] = "luma" if channels == 1 else "rgb"
    found["range"] = _value_range(trial, channels, height, width)
    if "overlap" in missing:
        reach = walk(proto, outline, channels, height, width)
        if reach is None:
            top = 255.0 if (facts.get("range") or found["range"]) == "0..255" else 1.0
            reach = measure_reach(trial, channels, multiple, scale, top)
        found["overlap"] = reach
    return {k: v for k, v in found.items() if k in missing}


def check(model: Descriptor) -> None:
    """Run a model and compare what it does with what it promises.

    Two sizes are run for scale, channels and multiple, two greys for the value range, and a
    changed pixel for the overlap.

    Raises:
        ModelError: a promise is not kept; the message says which.
    """
    proto = read_model(model.path)
    claims = {"layout": model.layout, "input": model.input, "output": model.output}
    outline = outline_of(proto, model.path, claims)
    trial = Trial(proto, outline, model.path)
    m = model.multiple
    low = -(-48 // m) | 1
    sizes = [(low * m, (low + 2) * m), ((low + 4) * m, low * m)]
    if model.size is not None:
        sizes = [(model.size[1], model.size[0])]
    for height, width in sizes:
        scale = trial.fits(model.plane_count, height, width)
        if scale is None:
            _explain(trial, model.plane_count, (height, width))
        if scale != model.scale:
            raise ModelError(f"model '{model.name}' claims scale {model.scale}, but has {scale}")
    height, width = sizes[0]
    seen = _value_range(trial, model.plane_count, height, width, surely=True)
    if seen not in (None, model.range):
        raise ModelError(f"model '{model.name}' claims range {model.range}, but takes {seen}")
    if model.overlap is not None and model.size is None:
        top = 255.0 if model.range == "0..255" else 1.0
        reach = measure_reach(trial, model.plane_count, m, model.scale, top, margin=0)
        if reach is None or reach > model.overlap:
            raise ModelError(
                f"model '{model.name}' claims an overlap of {model.overlap} pixels, but looks "
                f"{'at the whole picture' if reach is None else f'{reach} pixels far'}"
            )


def _first_fit(
    trial: Trial, counts: list[int], sizes: list[tuple[int, int, int]]
) -> tuple[int, int, int, int, int] | None:
    """Return multiple, height, width, channels and scale of the first size that fits."""
    for multiple, height, width in sizes:
        for channels in counts:
            scale = trial.fits(channels, height, width)
            if scale is not None:
                return multiple, height, width, channels, scale
    return None


def _explain(trial: Trial, channels: int, size: tuple[int, int]) -> NoReturn:
    """Raise the ModelError that says why a size did not fit."""
    height, width = size
    name = trial.path.name
    out = trial.run(noise(channels, height, width))
    if out is None:
        raise ModelError(f"model '{name}' does not run at {width}x{height}: {trial.error}")
    if out.shape[0] != channels:
        raise ModelError(
            f"model '{name}' makes {out.shape[0]} channels out of {channels}; equal numbers "
            "are supported"
        )
    exact_scale((height, width), (out.shape[1], out.shape[2]), name)
    raise AssertionError(f"{name} fits after all")


def noise(channels: int, height: int, width: int) -> Array:
    """Return noise of shape (channels, height, width), float32, 0..1."""
    return np.random.default_rng(0).random((channels, height, width), np.float32)


def _value_range(
    trial: Trial, channels: int, height: int, width: int, *, surely: bool = False
) -> str | None:
    """Return the range whose mid-grey comes back grey.

    Most networks of ReLUs are nearly linear, so both may; then it is "0..1", or None if
    only sure answers are wanted.
    """
    wrong = []
    for grey in (0.5, 128.0):
        out = trial.run(np.full((channels, height, width), grey, np.float32))
        value = math.nan if out is None else float(np.median(out)) / grey
        wrong.append(abs(value - 1.0) if math.isfinite(value) else math.inf)
    if wrong[1] < 0.1 and wrong[0] > max(0.25, 4.0 * wrong[1]):
        return "0..255"
    if surely and not (wrong[0] < 0.1 and wrong[1] > 0.25):
        return None
    return "0..1"


def measure_reach(
    trial: Trial, channels: int, multiple: int, scale: int, top: float, *, margin: int = 2
) -> int | None:
    """Return how many pixels away a changed pixel shows in the output, plus a margin.

    None if it shows at the border of the trial picture: then all of it may count. Changes
    below a millionth of the largest are taken as rounding.
    """
    outline = trial.outline
    height, width = outline.height, outline.width
    if height is None or width is None:
        height = width = -(-161 // multiple) * multiple
    picture = noise(channels, height, width) * np.float32(top)
    before = trial.run(picture)
    reach = 0
    y, x = height // 2, width // 2
    for dy, dx in ((0, 0), (multiple - 1, multiple - 1)):
        changed = picture.copy()
        changed[:, y + dy, x + dx] = top - changed[:, y + dy, x + dx]
        after = trial.run(changed)
        if before is None or after is None:
            return None
        change = np.abs(after - before).max(axis=0)
        rows, columns = np.nonzero(change > 1e-6 * change.max())
        if rows.size == 0:
            continue
        far_y = np.abs(rows // scale - (y + dy)).max()
        far_x = np.abs(columns // scale - (x + dx)).max()
        reach = max(reach, int(far_y), int(far_x))
        edges = (rows.min() // scale, columns.min() // scale)
        ends = (rows.max() // scale, columns.max() // scale)
        if min(edges) <= 0 or ends[0] >= height - 1 or ends[1] >= width - 1:
            return None
    return reach + reach // 4 * (margin > 0) + margin


_POINTWISE_NAMES = """
    Abs Add And BatchNormalization Cast Ceil Celu Clip Constant Div Dropout Elu Equal Erf Exp
    Floor Gelu Greater HardSigmoid HardSwish Identity LeakyRelu Less Log Max Min Mish Mod Mul
    Neg Not PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Cos Softplus Softsign Sqrt
    Sub Sum Tanh ThresholdedRelu Where QuantizeLinear DequantizeLinear
"""
_POINTWISE = frozenset(_POINTWISE_NAMES.split())


def walk(proto: Any, outline: Outline, channels: int, height: int, width: int) -> int | None:
    """Return an upper bound of the receptive radius in input pixels, from the graph alone.

    Each node widens it by its own reach times the input pixels between its input's samples.
    None where a node's reach is not known.
    """
    import onnx

    if outline.layout != "NCHW":
        return None
    static = onnx.ModelProto()
    static.CopyFrom(proto)
    for value in static.graph.input:
        if value.name == outline.input:
            for dim, size in zip(
                value.type.tensor_type.shape.dim, (1, channels, height, width), strict=True
            ):
                dim.dim_value = size
    del static.graph.value_info[:]
    for value in static.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(static, data_prop=True).graph
    except Exception:  # shape inference raises many kinds
        return None
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    shapes.update({i.name: list(i.dims) for i in graph.initializer})
    reach = {outline.input: 0.0}
    for node in graph.node:
        sources = [n for n in node.input if n in reach]
        if not sources:
            continue
        before = [shapes.get(n, []) for n in sources]
        after = shapes.get(node.output[0], [])
        if any(len(s) != 4 or not s[2] or not s[3] for s in (*before, after)):
            return None
        pitch = max(max(height / s[2], width / s[3]) for s in before)
        own = _own_reach(node, shapes, pitch, max(height / after[2], width / after[3]))
        if own is None:
            return None
        for name in node.output:
            reach[name] = max(reach[n] for n in sources) + own
    return math.ceil(reach[outline.output]) if outline.output in reach else None


def _own_reach(node: Any, shapes: dict[str, list[int]], pitch: float, out: float) -> float | None:
    """Return by how many input pixels a node widens the reach; None if not known."""
    attributes = {a.name: a for a in node.attribute}

    def integers(name: str, default: list[int]) -> list[int]:
        return list(attributes[name].ints) if name in attributes else default

    op = node.op_type
    if op in _POINTWISE:
        return 0.0
    if op == "Concat":
        return 0.0 if attributes["axis"].i in (1, -3) else None
    if op in ("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        weights = shapes.get(node.input[1], []) if "Conv" in op else []
        kernel = integers("kernel_shape", weights[2:])
        if len(kernel) != 2:
            return None
        dilations = integers("dilations", [1, 1])
        span = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        pads = integers("pads", [0, 0, 0, 0])
        centred = all(pads[i] == pads[i + 2] == span[i] / 2 for i in (0, 1))
        centred = centred or ("auto_pad" in attributes and b"SAME" in attributes["auto_pad"].s)
        if op == "ConvTranspose":
            return pitch + out * max(span)
        return pitch * max(math.ceil(s / 2) if centred else s for s in span) + (
            out - pitch if out > pitch else 0.0
        )
    if op in ("Resize", "Upsample"):
        mode = attributes["mode"].s if "mode" in attributes else b"nearest"
        samples = {b"nearest": 1, b"linear": 1, b"cubic": 2}[mode]
        return samples * max(pitch, out)
    if op in ("DepthToSpace", "SpaceToDepth"):
        return max(pitch, out)
    return None
