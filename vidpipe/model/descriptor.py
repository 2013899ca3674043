"""What a model file promises: scale, channels, value range, size multiples, reach.

Facts come from, in this order: a TOML file beside the model (`X.toml` next to `X.onnx`, else
`model.toml` in the same folder), the model's metadata (`vidpipe.scale` and so on), the
graph's static shapes, and last short trial runs on small pictures
(`vidpipe.model.probe`). `probe.check` runs a model and compares what it does with what is
promised.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vidpipe.errors import ModelError, did_you_mean

MODELS = Path(__file__).parent.parent / "models"
"""Folder of the models inside the package."""

METADATA_PREFIX = "vidpipe."

_INTEGERS = {"scale": (1, 4), "multiple": (1, 1024), "overlap": (0, 4096)}
_CHOICES = {
    "channels": ("luma", "rgb", "bgr"),
    "layout": ("NCHW", "NHWC"),
    "range": ("0..1", "0..255"),
    "precision": ("fp32", "fp16", "int8"),
}
_TEXTS = (
    *("name", "input", "output", "strength", "tier", "task", "version", "license"),
    *("source_sha256", "description"),
)
CLAIMS = (*_INTEGERS, *_CHOICES, *_TEXTS)
"""Keys of a TOML file, and of metadata after `vidpipe.`."""

_FLOAT32 = np.dtype(np.float32)
_FLOAT16 = np.dtype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """A model and what is known about it.

    Attributes:
        name: file name without suffix, unless the file says another.
        path: the ONNX file.
        scale: output size over input size, 1 to 4.
        channels: "luma" (one channel, Y'), "rgb" or "bgr" (three channels, R'G'B').
        layout: "NCHW" or "NHWC".
        dtype: float32 or float16, of input and output.
        range: nominal black and white, "0..1" or "0..255". For luma in limited range that
            is (Y - 16) / 219 in 8 bits.
        multiple: width and height must be multiples of this.
        overlap: pixels of input around a pixel that its output may depend on, an upper bound;
            None where the whole picture counts.
        size: the only input size (width, height), or None if any will do.
        input, output: names in the graph.
        strength: name of a scalar float32 input, or None.
        precision: what its convolutions compute in, "fp32", "fp16" or "int8".
        source_sha256: hash of the file that it was converted from, or "".
        tier, task, version, license, description: texts for people, may be empty.
    """

    name: str
    path: Path
    scale: int
    channels: str
    input: str
    output: str
    layout: str = "NCHW"
    dtype: np.dtype[Any] = _FLOAT32
    range: str = "0..1"
    multiple: int = 1
    overlap: int | None = None
    size: tuple[int, int] | None = None
    strength: str | None = None
    precision: str = "fp32"
    source_sha256: str = ""
    tier: str = ""
    task: str = ""
    version: str = ""
    license: str = ""
    description: str = ""

    @property
    def plane_count(self) -> int:
        """Channels of the input: 1 or 3."""
        return 1 if self.channels == "luma" else 3

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as hexadecimal digits."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-compatible values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"path": str(self.path), "dtype": self.dtype.name, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What the graph alone says; None where it does not.

    Attributes:
        input, output, strength: names of the tensors.
        layout: "NCHW" or "NHWC".
        channels: 1 or 3.
        dtype: of the input.
        height, width: of the input, where fixed.
        scale: where input and output sizes are both fixed.
    """

    input: str
    output: str
    strength: str | None
    layout: str
    channels: int | None
    dtype: np.dtype[Any]
    height: int | None
    width: int | None
    scale: int | None


def describe(path: str | Path) -> Descriptor:
    """Find out what a model promises.

    Args:
        path: an ONNX file.

    Raises:
        ModelError: the file is missing, is not ONNX, or does not map an image to an image.
    """
    return _describe(Path(path), trials=True)


def builtin_models() -> list[Descriptor]:
    """Return the models inside the package, by name; read from their metadata, none is run."""
    return [_describe(p, trials=False) for p in sorted(MODELS.glob("*.onnx"))]


def find_model(name_or_path: str | Path) -> Path:
    """Return the file of a built-in model, or of a path.

    Raises:
        ModelError: there is neither.
    """
    text = str(name_or_path)
    built_in = MODELS / f"{text}.onnx"
    if Path(text).name == text and built_in.is_file():
        return built_in
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError(f"model '{text}' is a folder", hint="Name the .onnx file in it")
    if path.suffix or path.name != text:
        raise ModelError(f"model file '{text}' does not exist")
    known = [p.stem for p in MODELS.glob("*.onnx")]
    raise ModelError(
        f"no built-in model is called '{text}', and no such file exists",
        hint=did_you_mean(text, known) or None,
    )


def read_model(path: Path) -> Any:
    """Parse an ONNX file into an `onnx.ModelProto`.

    Raises:
        ModelError: it is missing, or is not ONNX.
    """
    import onnx

    if not path.exists():
        raise ModelError(f"model file '{path}' does not exist")
    if path.is_dir():
        raise ModelError(f"model '{path}' is a folder", hint="Name the .onnx file in it")
    try:
        proto = onnx.load(str(path))
    except PermissionError:
        raise ModelError(f"model file '{path}' may not be read: no permission") from None
    except Exception:  # protobuf's DecodeError, missing external data and more
        proto = None
    if proto is None or not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{path}' is not an ONNX model", hint="Export the network to ONNX first")
    return proto


def _describe(path: Path, *, trials: bool) -> Descriptor:
    proto = read_model(path)
    claims = {**_metadata(proto, path), **_toml(path)}
    outline = outline_of(proto, path, claims)
    facts: dict[str, Any] = {
        "scale": outline.scale,
        "channels": {1: "luma", 3: "rgb", None: None}[outline.channels],
    }
    fixed = outline.width is not None and outline.height is not None
    if fixed:
        facts["multiple"] = 1
    if (outline.width is None) != (outline.height is None):
        raise ModelError(
            f"model '{path.name}' fixes one side of its input and leaves the other free",
            hint="Export it with both free, or both fixed",
        )
    facts.update(claims)
    count = {"luma": 1, "rgb": 3, "bgr": 3, None: None}[facts["channels"]]
    if None not in (count, outline.channels) and count != outline.channels:
        raise ModelError(
            f"model '{path.name}' has {outline.channels} channel(s), but is said to be "
            f"'{facts['channels']}'"
        )
    missing = [k for k in ("scale", "channels", "range", "multiple", "overlap") if not facts.get(k)]
    missing = [k for k in missing if not (k == "overlap" and facts.get(k) == 0)]
    if trials and missing:
        from vidpipe.model.probe import explore

        facts.update(explore(proto, outline, facts, path, missing))
    known = {f.name for f in fields(Descriptor)}
    values = {k: v for k, v in facts.items() if k in known and v is not None}
    values = {"name": path.stem, "scale": 1, "channels": "rgb", **values}
    size = (outline.width, outline.height) if outline.width and outline.height else None
    values |= {
        "path": path,
        "input": outline.input,
        "output": outline.output,
        "strength": outline.strength,
        "layout": outline.layout,
        "dtype": outline.dtype,
        "size": size,
    }
    if size is not None:
        values["multiple"] = 1
    if outline.dtype == np.float16:
        values["precision"] = "fp16"
    return Descriptor(**values)


def _toml(path: Path) -> dict[str, Any]:
    """Return the claims of the TOML file beside a model."""
    beside = path.with_suffix(".toml")
    if not beside.is_file():
        beside = path.with_name("model.toml")
    if not beside.is_file():
        return {}
    try:
        values = tomllib.loads(beside.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"'{beside}' is not a TOML file: {error}") from None
    return _checked(values, str(beside))


def _metadata(proto: Any, path: Path) -> dict[str, Any]:
    """Return the claims of a model's own metadata; keys of others are left alone."""
    values: dict[str, Any] = {}
    for entry in proto.metadata_props:
        key = entry.key.removeprefix(METADATA_PREFIX)
        if key == entry.key or key not in CLAIMS:
            continue
        number = key in _INTEGERS and entry.value.strip().isdecimal()
        values[key] = int(entry.value) if number else entry.value
    return _checked(values, f"metadata of '{path.name}'")


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the claims if every key is known and every value can be.

    Raises:
        ModelError: otherwise.
    """
    for key, value in values.items():
        if key not in CLAIMS:
            raise ModelError(f"{where}: unknown key '{key}'", hint=did_you_mean(key, [*CLAIMS]))
        if key in _INTEGERS:
            low, high = _INTEGERS[key]
            good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            expected = f"a whole number from {low} to {high}"
        elif key in _CHOICES:
            good = value in _CHOICES[key]
            expected = "one of " + ", ".join(_CHOICES[key])
        else:
            good = isinstance(value, str)
            expected = "a text"
        if not good:
            raise ModelError(f"{where}: '{key}' is {value!r}, expected {expected}")
    return values


def outline_of(proto: Any, path: Path, claims: dict[str, Any]) -> Outline:
    """Read the graph's inputs and outputs.

    Raises:
        ModelError: they are not those of a model that maps an image to an image.
    """
    graph = proto.graph
    constants = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    images = [i for i in inputs if len(_dims(i)) == 4]
    name = claims.get("input")
    if name is not None:
        images = _named(images, name, path, "input")
    if not images:
        shapes = "; ".join(f"{i.name} {_shape_text(i)}" for i in inputs) or "none"
        raise ModelError(
            f"model '{path.name}' takes no image: its inputs are {shapes}",
            hint="An image input has four dimensions: 1, channels, height, width",
        )
    if len(images) > 1:
        names = ", ".join(f"'{i.name}'" for i in images)
        raise ModelError(
            f"model '{path.name}' takes {len(images)} images ({names}); models of one image "
            "are supported"
        )
    image = images[0]
    rest = [i for i in inputs if i is not image]
    strength = _strength(rest, claims, path)
    dtype = _float_type(image)
    if dtype is None:
        raise ModelError(f"model '{path.name}': input '{image.name}' is not float32 or float16")
    output = _image_output(graph, claims, path)
    layout, channels, height, width = _layout(image, claims, path)
    if _dims(image)[0] not in (None, 1):
        raise ModelError(
            f"model '{path.name}' takes {_dims(image)[0]} pictures at a time; 1 is supported"
        )
    scale = None
    out = _dims(output)
    out_height, out_width = out[2:] if layout == "NCHW" else out[1:3]
    out_channels = out[1] if layout == "NCHW" else out[3]
    if channels and out_channels and channels != out_channels:
        raise ModelError(
            f"model '{path.name}' makes {out_channels} channels out of {channels}; "
            "equal numbers are supported"
        )
    if height and width and out_height and out_width:
        scale = exact_scale((height, width), (out_height, out_width), path.name)
    return Outline(
        input=image.name,
        output=output.name,
        strength=strength,
        layout=layout,
        channels=channels,
        dtype=dtype,
        height=height,
        width=width,
        scale=scale,
    )


def exact_scale(size: tuple[int, int], out: tuple[int, int], name: str) -> int:
    """Return output size over input size, both (height, width).

    Raises:
        ModelError: it is not a whole number from 1 to 4, the same along both axes.
    """
    scale = out[0] // size[0]
    if (size[0] * scale, size[1] * scale) != out or not 1 <= scale <= 4:
        raise ModelError(
            f"model '{name}' makes {out[1]}x{out[0]} out of {size[1]}x{size[0]}; whole scales "
            "from 1 to 4 are supported"
        )
    return scale


def _dims(value: Any) -> list[int | None]:
    return [d.dim_value or None for d in value.type.tensor_type.shape.dim]


def _shape_text(value: Any) -> str:
    return "(" + ", ".join("?" if d is None else str(d) for d in _dims(value)) + ")"


def _float_type(value: Any) -> np.dtype[Any] | None:
    kinds: dict[int, np.dtype[Any]] = {1: _FLOAT32, 10: _FLOAT16}
    return kinds.get(value.type.tensor_type.elem_type)


def _named(values: Iterable[Any], name: str, path: Path, what: str) -> list[Any]:
    found = [v for v in values if v.name == name]
    if not found:
        names = [v.name for v in values]
        raise ModelError(
            f"model '{path.name}' has no image {what} '{name}'", hint=did_you_mean(name, names)
        )
    return found


def _strength(rest: list[Any], claims: dict[str, Any], path: Path) -> str | None:
    """Return the one scalar input beside the image, if there is one."""
    if not rest:
        if "strength" in claims:
            raise ModelError(f"model '{path.name}' has no input '{claims['strength']}'")
        return None
    names = ", ".join(f"'{i.name}' {_shape_text(i)}" for i in rest)
    value = rest[0]
    scalar = all(d == 1 for d in _dims(value)) and _float_type(value) == np.float32
    if len(rest) > 1 or not scalar or claims.get("strength", value.name) != value.name:
        raise ModelError(
            f"model '{path.name}' has inputs beside the image that are not known: {names}",
            hint="One float32 scalar is supported, taken as the strength",
        )
    return str(value.name)


def _image_output(graph: Any, claims: dict[str, Any], path: Path) -> Any:
    outputs = list(graph.output)
    if "output" in claims:
        outputs = _named(outputs, claims["output"], path, "output")
    if len(outputs) != 1:
        names = ", ".join(f"'{o.name}'" for o in outputs)
        raise ModelError(
            f"model '{path.name}' has {len(outputs)} outputs ({names})",
            hint='Say which is the image with output = "NAME" in a TOML file beside it',
        )
    output = outputs[0]
    shaped = output.type.tensor_type.HasField("shape")
    if (shaped and len(_dims(output)) != 4) or _float_type(output) is None:
        raise ModelError(
            f"model '{path.name}': output '{output.name}' {_shape_text(output)} is not an image",
            hint="An image has four dimensions and float32 or float16 samples",
        )
    return output


def _layout(
    image: Any, claims: dict[str, Any], path: Path
) -> tuple[str, int | None, int | None, int | None]:
    """Return layout, channels, height and width of the image input."""
    _, a, b, c = _dims(image)
    layout = claims.get("layout") or ("NHWC" if a not in (1, 3) and c in (1, 3) else "NCHW")
    channels, height, width = (a, b, c) if layout == "NCHW" else (c, a, b)
    if channels not in (None, 1, 3):
        raise ModelError(
            f"model '{path.name}' takes {channels} channels; 1 (luma) and 3 (R, G, B) are supported"
        )
    return layout, channels, height, width
