"""Tiles: their layout, their seams, and when they are chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelgen
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidpipe.errors import SpecError
from vidpipe.frame import ChromaSite, Color, FrameSpec, pixel_format
from vidpipe.model import tiling
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import describe
from vidpipe.model.stage import Model
from vidpipe.testing import pattern, spec

Array = np.ndarray[Any, Any]


def run(path: Path, spec: FrameSpec, **options: Any) -> tuple[tuple[Array, ...], dict[str, Any]]:
    stage = Model(model=str(path), threads=1, **options)
    out = stage.plan(spec)
    stage.open()
    (frame,) = stage.process(pattern(spec, 3))
    stage.close()
    assert [p.shape for p in frame.planes] == list(out.plane_shapes())
    return frame.planes, stage.report()


@given(
    size=st.integers(1, 900),
    tile=st.integers(1, 40),
    overlap=st.integers(0, 9),
    align=st.sampled_from([1, 2, 4, 8]),
)
@settings(deadline=None, derandomize=True)
def test_spans_cover_every_sample_once(size: int, tile: int, overlap: int, align: int) -> None:
    tile, overlap = tile * align, overlap * align
    if tile - 2 * overlap < align:
        tile = 2 * overlap + align
    found = tiling.spans(size, tile, overlap, align)
    padded = -(-size // align) * align
    assert found[0].first == 0
    assert found[-1].last == padded
    for a, b in itertools.pairwise(found):
        assert a.last == b.first
        assert a.last <= a.start + tile - overlap
        assert b.first >= b.start + overlap
    for span in found:
        assert span.start % align == span.first % align == span.last % align == 0
        assert span.start <= span.first < span.last <= span.start + tile
        assert span.start + tile <= padded or len(found) == 1


@pytest.mark.parametrize("name", ["yuv420p", "nv12", "yuv422p10le", "yuv444p", "gray", "gbrp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "unshuffle"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_seams_are_within_a_code_value(
    tmp_path: Path, name: str, channels: int, scale: int, unshuffle: int
) -> None:
    path = modelgen.random_net(
        tmp_path / "net.onnx", scale, channels, width=8, depth=3, unshuffle=unshuffle
    )
    color = Color(site=ChromaSite.TOPLEFT)
    for width, height in ((201, 133), (160, 96)):
        given = replace(spec(width, height, name), color=color)
        whole, plain = run(path, given, tile="off")
        tiled, report = run(path, given, tile="96x80")
        assert plain["tiles"] is None
        assert "of 96x80" in report["tiles"]
        for a, b in zip(whole, tiled, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize("name", ["yuv420p", "nv16", "yuv444p12le", "gbrp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_chroma_filters_leave_no_seams(
    tmp_path: Path, name: str, channels: int, scale: int
) -> None:
    # A model without any reach: what tile borders spoil, they spoil through chroma.
    path = modelgen.nearest(tmp_path / "net.onnx", scale, channels)
    assert describe(path).overlap in (0, 1, 2)
    for site in (ChromaSite.TOPLEFT, ChromaSite.CENTER, ChromaSite.BOTTOM):
        given = replace(spec(120, 88, name), color=Color(site=site))
        whole, _ = run(path, given, tile="off")
        tiled, _ = run(path, given, tile="52x40")
        for a, b in zip(whole, tiled, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1


def test_the_matrix_is_that_of_the_whole_picture(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", 1, 3, width=4, depth=1)
    large = spec(1282, 64)  # BT.709 by its size, as tiles would not be
    whole, _ = run(path, large, tile="off")
    tiled, _ = run(path, large, tile="256x64")
    for a, b in zip(whole, tiled, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize("size", [(64, 48), (150, 100), (40, 30), (64, 30), (33, 100)])
def test_models_of_fixed_size_take_any_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    options: dict[str, Any] = {"width": 8, "depth": 2}
    fixed = modelgen.random_net(
        tmp_path / "fixed.onnx", shape=[1, 1, 48, 64], out_shape=[1, 1, 96, 128], **options
    )
    free = modelgen.random_net(tmp_path / "free.onnx", **options)
    given = spec(*size)
    got, report = run(fixed, given)
    assert (report["tiles"] is None) == (size == (64, 48))
    expected, _ = run(free, given, tile="off")
    # Where the tile is larger than the picture, the model sees replicated edges there.
    inner = (slice(0, 2 * size[1] - 16), slice(0, 2 * size[0] - 16))
    for a, b in zip(got, expected, strict=True):
        assert np.abs(a.astype(int) - b)[inner].max() <= 1


def test_short_memory_leads_to_tiles(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", width=16, depth=3)
    given = spec(320, 240)
    whole, plain = run(path, given, memory_limit="1G")
    tiled, report = run(path, given, memory_limit="4M")
    assert plain["tiles"] is None
    assert report["tiles"] is not None
    for a, b in zip(whole, tiled, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1

    layout = tiling.choose(describe(path), compile_model(describe(path), given), 4 << 20)
    assert layout is not None
    small = tiling.tile_spec(given, layout)
    assert tiling.peak_bytes(compile_model(describe(path), small).proto) <= 4 << 20

    run(path, given, memory_limit="1M", tile="off")
    stage = Model(model=str(path), memory_limit="20K")
    stage.plan(given)
    with pytest.raises(SpecError, match="even in its smallest tiles") as caught:
        stage.open()
    assert "the limit is 0.02 MiB" in str(caught.value)
    stage.close()


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 256]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert tiling.peak_bytes(proto) == 5 * 1024  # x, y, a, b and c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": "big"}, "tile is 'big', expected auto, off"),
        ({"tile": "0x64"}, "tile is '0x64'"),
        ({"memory_limit": "much"}, "memory limit is 'much'"),
        ({"memory_limit": "0"}, "memory limit is '0'"),
        ({"memory_limit": ""}, "memory limit is ''"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Model(model="any", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_tiles_that_do_not_fit_are_refused_by_plan(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", unshuffle=4, width=4, depth=1)
    given = FrameSpec(width=640, height=360, format=pixel_format("yuv420p"))
    with pytest.raises(SpecError, match="sizes must be multiples of 4x4"):
        Model(model=str(path), tile="90x90").plan(given)
    with pytest.raises(SpecError, match=r"too small for model 'net'.*Use at least"):
        Model(model=str(path), tile="24x24").plan(given)


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("512m", 512 << 20), ("1.5GiB", 3 << 29), ("1000", 1000)]
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert tiling.parse_bytes(text) == size
