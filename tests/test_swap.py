"""A better session takes over between two frames, or leaves the first one alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.modelgen import random_net, strong
from vidpipe.errors import DeviceError, ModelError
from vidpipe.frame import Frame, pixel_format
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import Descriptor, describe
from vidpipe.model.session import HostSession
from vidpipe.model.swap import SwapSession
from vidpipe.testing import pattern, spec

SPEC = spec(96, 64)


def made(model: Descriptor, strength: float | None = None, **options: Any) -> HostSession:
    return HostSession(compile_model(model, SPEC, **options), threads=1, strength=strength)


def buffers(session: HostSession) -> list[np.ndarray[Any, Any]]:
    return [np.empty(t.plane_shape, t.dtype) for t in session.compiled.outputs]


class Gate:
    """Builds when told, in the thread of the swap."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self.build = build
        self.open = threading.Event()

    def __call__(self) -> Any:
        assert self.open.wait(60)
        return self.build()


def test_a_swap_in_the_middle_of_a_clip(tmp_path: Path) -> None:
    """Every frame agrees within one code with what one session makes of the whole clip."""
    model = describe(random_net(tmp_path / "m.onnx"))
    alone = made(model)
    wanted = buffers(alone)
    alone.bind(0, wanted)
    first = made(model)
    # Other arithmetic around the model, and the model in float16: not the same bits.
    other = half(model, tmp_path / "half.onnx")
    gate = Gate(lambda: made(other, portable=True, widen=False))
    session = SwapSession(first, gate, label="other", format=SPEC.format)
    rings = [buffers(first) for _ in range(2)]
    for slot, planes in enumerate(rings):
        session.bind(slot, planes)
    differences = []
    for number in range(8):
        if number == 3:
            assert session.state.state == "compiling"
            assert str(session.state) == "compiling for other"
            gate.open.set()
            assert session.wait().state == "compiled"
        frame = pattern(SPEC, number)
        assert session.run(number % 2, frame.planes) is None
        alone.run(0, frame.planes)
        for a, b in zip(rings[number % 2], wanted, strict=True):
            differences.append(int(np.abs(a.astype(int) - b).max()))
            assert differences[-1] <= 1, number
        assert session.state.state == ("compiling" if number < 3 else "swapped")
    assert max(differences[:9]) == 0
    assert max(differences[9:]) == 1  # it really is the other session
    assert session.state.frames == 3
    assert session.state.difference is not None
    assert session.state.difference <= 1
    assert first._session is None  # closed
    session.close()


def half(model: Descriptor, path: Path) -> Descriptor:
    from vidpipe.model.precision import narrow_graph

    proto = onnx.load(str(model.path))
    assert narrow_graph(proto.graph)
    onnx.save(proto, str(path))
    return replace(model, path=path, dtype=np.dtype(np.float16))


def test_slots_bound_after_the_swap_and_strength_across_it(tmp_path: Path) -> None:
    model = describe(strong(tmp_path / "s.onnx", metadata={"vidpipe.range": "0..1"}))
    first = made(model, 0.0)
    session = SwapSession(
        first, lambda: made(model, 0.0), label="other", format=SPEC.format, strength=0.0
    )
    session.wait()
    planes, later = buffers(first), buffers(first)
    session.bind(0, planes)
    session.set_strength(0.5)  # after the other one was built
    frame = quiet()
    session.run(0, frame.planes)
    assert session.state.state == "swapped"
    raised = planes[0].copy()
    assert int(raised[0, 0]) > int(frame.planes[0][0, 0])
    session.bind(1, later)
    session.run(1, frame.planes)
    np.testing.assert_array_equal(later[0], raised)
    session.set_strength(0.0)
    session.run(1, frame.planes)
    np.testing.assert_array_equal(later[0], frame.planes[0])
    session.close()


def quiet() -> Frame:
    frame = pattern(SPEC)
    return frame.replace([np.full_like(p, 100) for p in frame.planes], SPEC)


@pytest.mark.parametrize(
    ("error", "note"),
    [(DeviceError("no such device", hint="x"), "no such device"), (RuntimeError("a\nb"), "a")],
)
def test_a_better_session_that_cannot_be_built_leaves_the_first(
    tmp_path: Path, error: Exception, note: str
) -> None:
    def build() -> Any:
        raise error

    first = made(describe(random_net(tmp_path / "m.onnx")))
    session = SwapSession(first, build, label="other", format=SPEC.format)
    planes = buffers(first)
    session.bind(0, planes)
    session.wait()
    session.run(0, pattern(SPEC).planes)
    assert session.state.state == "failed"
    assert session.state.note == note
    assert str(session.state) == f"other not used: {note}"
    assert session.nodes_by_provider() == first.nodes_by_provider()
    session.close()


def test_a_better_session_that_differs_is_not_taken(tmp_path: Path) -> None:
    first = made(describe(random_net(tmp_path / "m.onnx")))
    wrong = describe(random_net(tmp_path / "n.onnx", seed=1))
    session = SwapSession(first, lambda: made(wrong), label="other", format=SPEC.format)
    planes, frame = buffers(first), pattern(SPEC)
    session.bind(0, planes)
    first.run(0, frame.planes)
    right = [p.copy() for p in planes]
    session.wait()
    session.run(0, frame.planes)
    assert session.state.state == "failed"
    assert "codes off" in session.state.note
    for a, b in zip(planes, right, strict=True):
        np.testing.assert_array_equal(a, b)
    session.close()


def test_a_better_session_that_fails_at_its_first_frame_is_not_taken(tmp_path: Path) -> None:
    class Broken(HostSession):
        def run(self, slot: int, inputs: Any, stream: Any = None) -> None:
            raise ModelError("out of memory")

    model = describe(random_net(tmp_path / "m.onnx"))
    first = made(model)
    broken = Broken(compile_model(model, SPEC), threads=1)
    session = SwapSession(first, lambda: broken, label="other", format=SPEC.format)
    planes = buffers(first)
    session.bind(0, planes)
    session.wait()
    session.run(0, pattern(SPEC).planes)
    assert session.state.note == "out of memory"
    session.run(0, pattern(SPEC).planes)
    assert broken._session is None
    session.close()


def test_closing_does_not_wait_for_the_compilation(tmp_path: Path) -> None:
    model = describe(random_net(tmp_path / "m.onnx"))
    built: list[HostSession] = []

    def build() -> HostSession:
        built.append(made(model))
        return built[0]

    gate = Gate(build)
    session = SwapSession(made(model), gate, label="other", format=SPEC.format)
    session.close()
    assert built == []
    gate.open.set()
    session.wait()
    assert built[0]._session is None  # closed as soon as it was there


def test_ten_bits_may_differ_by_four_codes(tmp_path: Path) -> None:
    deep = pixel_format("yuv420p10le")
    model = describe(random_net(tmp_path / "m.onnx"))
    session = SwapSession(made(model), lambda: made(model), label="x", format=deep)
    assert session._tolerance == 4
    session.wait()
    session.close()
    p010 = SwapSession(made(model), lambda: made(model), label="x", format=pixel_format("p010le"))
    assert p010._tolerance == 4 << 6
    p010.wait()
    p010.close()
