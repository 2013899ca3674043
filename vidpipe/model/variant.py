"""Which file, and which arithmetic, a model runs in: the `precision` option.

A copy in int8 is found inside the package, for the built-in models that have one, or beside a
model's own file, where `vidpipe models quantize` puts it. It counts only if it was made from the
very file that it stands for. It has to be asked for: it loses next to nothing on pictures like
those it was calibrated on, but more than can be overlooked on others, such as small text.

FP8 and FP4 are for TensorRT for RTX alone. A copy in one of them is looked for in the same places
and has to hold such values; nothing here makes one, and none has been run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from vidpipe.errors import ModelError, SpecError
from vidpipe.model.descriptor import MODELS, Descriptor, describe

PRECISIONS = ("auto", "fp32", "fp16", "int8", "fp8", "fp4")

_NARROW = {"fp8": "FLOAT8", "fp4": "FLOAT4"}
_NARROW_PROVIDER = "rtx"
_NO_INT8 = "cuda"


@dataclass(frozen=True, slots=True)
class Variant:
    """What runs in a model's place.

    Attributes:
        model: the file, the model itself or a copy of it.
        half: compute its float32 nodes in float16, where the provider can.
        precision: one of `PRECISIONS` other than "auto".
    """

    model: Descriptor
    half: bool
    precision: str


def converted_path(model: Path, precision: str) -> Path:
    """Return where a model's copy in another precision is looked for, and written by default."""
    if model.parent == MODELS:
        return MODELS / precision / model.name
    return model.with_name(f"{model.stem}-{precision}.onnx")


def variant(model: Descriptor, precision: str, *, on_cpu: bool, provider: str = "") -> Variant:
    """Return what to run for a model.

    Args:
        model: as it was asked for.
        precision: one of `PRECISIONS`. "auto" is float16 on a GPU and float32 on a CPU; a
            file that is in int8 or float16 itself is taken as it is.
        on_cpu: whether the CPU computes it.
        provider: what `--device` calls the execution provider.

    Raises:
        SpecError: there is no such precision, or not on this provider.
        ModelError: there is no such copy of this model.
    """
    check_precision(precision)
    if precision in _NARROW:
        return _narrow(model, precision, provider)
    if precision == "int8" or (model.precision, precision) == ("int8", "auto"):
        check_int8(provider)
    if model.precision == "int8" and precision in ("auto", "int8"):
        return Variant(model, not on_cpu, "int8")
    if model.precision == "int8":
        raise ModelError(
            f"model '{model.path.name}' is in int8, {precision} was asked for",
            hint="Name its float32 file, or leave out the precision",
        )
    if precision == "int8":
        copy = int8_copy(model)
        if copy is None:
            raise ModelError(
                f"model '{model.name}' has no copy in int8",
                hint=f"Make one with: vidpipe models quantize {model.name} --calibrate CLIP",
            )
        return Variant(copy, not on_cpu, "int8")
    if precision == "fp16" and on_cpu:
        raise ModelError(
            "the CPU computes float16 models in float32",
            hint="Use --precision int8 or fp32, or a GPU",
        )
    half = not on_cpu and precision != "fp32"
    return Variant(model, half, "fp16" if half else "fp32")


def check_precision(precision: str) -> None:
    """Refuse what is not among `PRECISIONS`.

    Raises:
        SpecError: it is not.
    """
    if precision not in PRECISIONS:
        raise SpecError(
            f"precision '{precision}' is not known", hint=f"Use {', '.join(PRECISIONS)}"
        )


def check_int8(provider: str) -> None:
    """Refuse a provider that has no convolutions in int8.

    Raises:
        SpecError: it has none.
    """
    if provider == _NO_INT8:
        raise SpecError(
            "CUDA runs no convolutions in int8",
            hint="Leave out the precision, with a float32 file: float16 is faster there",
        )


def _narrow(model: Descriptor, precision: str, provider: str) -> Variant:
    if provider != _NARROW_PROVIDER:
        raise SpecError(
            f"{precision} runs on TensorRT for RTX only",
            hint=f"Use --device {_NARROW_PROVIDER}, or --precision fp16 or int8",
        )
    path = converted_path(model.path, precision)
    if not path.is_file():
        raise ModelError(
            f"model '{model.name}' has no copy in {precision}: '{path}' is not there",
            hint="vidpipe makes none: make it with NVIDIA's Model Optimizer, or use fp16",
        )
    if not _holds(path, _NARROW[precision]):
        raise ModelError(f"'{path}' has no {precision} values in it")
    return Variant(describe(path), False, precision)


def _holds(path: Path, kind: str) -> bool:
    """Return whether a file has constants, zero points among them, of a family of types."""
    kinds = {code for name, code in onnx.TensorProto.DataType.items() if name.startswith(kind)}
    graph = onnx.load(str(path)).graph
    constants = [a.t for n in graph.node for a in n.attribute if a.HasField("t")]
    return any(tensor.data_type in kinds for tensor in [*graph.initializer, *constants])


def int8_copy(model: Descriptor) -> Descriptor | None:
    """Return the copy of a model in int8, or None if there is none that was made from it."""
    path = converted_path(model.path, "int8")
    if not path.is_file():
        return None
    copy = describe(path)
    return copy if copy.source_sha256 == model.sha256 else None
