"""Free dimensions of a model are fixed when its frame graph is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.modelgen import random_net
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import describe
from vidpipe.model.session import HostSession
from vidpipe.testing import pattern, spec

SPEC = spec(64, 48)


@pytest.mark.parametrize(
    "shape",
    [
        [1, 1, "height", "width"],
        ["batch", 1, "height", "width"],
        [None, 1, None, None],
        ["N", "C", "H", "W"],
        ["same", 1, "same", "same"],
    ],
    ids=["usual", "batch", "unnamed", "all named", "one name for all"],
)
def test_free_dimensions_are_fixed(tmp_path: Path, shape: Sequence[int | str | None]) -> None:
    plain = describe(random_net(tmp_path / "plain.onnx", shape=[1, 1, 48, 64]))
    metadata = {"vidpipe.channels": "luma"}
    free = describe(random_net(tmp_path / "free.onnx", shape=shape, metadata=metadata))
    assert free.size is None
    results = []
    for model in (plain, free):
        compiled = compile_model(model, SPEC)
        graph = onnx.shape_inference.infer_shapes(compiled.proto, data_prop=True).graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            dims = value.type.tensor_type.shape.dim
            assert all(d.HasField("dim_value") for d in dims), value.name
        session = HostSession(compiled, threads=1)
        planes = [np.empty(t.plane_shape, t.dtype) for t in compiled.outputs]
        session.bind(0, planes)
        session.run(0, pattern(SPEC).planes)
        results.append(planes)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
