"""Colour through the compiled graph, against a float64 reference written on its own."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import modelgen
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidpipe.errors import SpecError
from vidpipe.frame import PIXEL_FORMATS, ChromaSite, Color, FrameSpec, Matrix, Range, pixel_format
from vidpipe.model import color
from vidpipe.model.compile import compile_model, output_spec
from vidpipe.model.descriptor import Descriptor, describe
from vidpipe.model.session import HostSession
from vidpipe.testing import pattern

Array = np.ndarray[Any, Any]

MATRICES = (Matrix.SMPTE170M, Matrix.BT470BG, Matrix.BT709, Matrix.BT2020_NCL)
KR_KB = {
    Matrix.SMPTE170M: (0.299, 0.114),
    Matrix.BT470BG: (0.299, 0.114),
    Matrix.BT709: (0.2126, 0.0722),
    Matrix.BT2020_NCL: (0.2627, 0.0593),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Descriptor]:
    """Models that repeat each pixel `scale` times along both axes, by (channels, scale)."""
    folder: Path = tmp_path_factory.mktemp("models")
    found = {}
    for kind, count in (("luma", 1), ("rgb", 3)):
        for scale in (1, 2, 3, 4):
            path = folder / f"{kind}{scale}.onnx"
            claims = {"scale": scale, "channels": kind, "range": "0..1", "multiple": 1}
            metadata = {f"vidpipe.{k}": str(v) for k, v in {**claims, "overlap": 0}.items()}
            if scale == 1:
                modelgen.identity(path, count, metadata=metadata)
            else:
                modelgen.nearest(path, scale, count, metadata=metadata)
            found[kind, scale] = describe(path)
    return found


def through_graph(
    model: Descriptor, spec: FrameSpec, planes: tuple[Array, ...], *, portable: bool = False
) -> list[Array]:
    compiled = compile_model(model, spec, portable=portable)
    outputs = [np.full(t.plane_shape, 7, t.dtype) for t in compiled.outputs]
    session = HostSession(compiled, threads=1)
    session.bind(0, outputs)
    session.run(0, planes)
    session.close()
    return outputs


# -- the reference ------------------------------------------------------------------------


def keys(x: Array) -> Array:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def sample_axis(plane: Array, positions: Array, width: float = 1.0) -> Array:
    """Cubic samples of axis 0 at these positions, edges replicated."""
    n = plane.shape[0]
    reach = int(np.ceil(2 * width)) + 1
    out = np.zeros((len(positions), *plane.shape[1:]))
    weights = np.zeros(len(positions))
    for t in range(-reach, reach + 1):
        index = np.floor(positions).astype(int) + t
        w = keys((index - positions) / width)
        weights += w
        out += w[:, None] * plane[np.clip(index, 0, n - 1)]
    return out / weights[:, None]


def sample(plane: Array, ys: Array, xs: Array, wy: float = 1.0, wx: float = 1.0) -> Array:
    return sample_axis(sample_axis(plane, ys, wy).T, xs, wx).T


def reference(
    kind: str, scale: int, spec: FrameSpec, planes: tuple[Array, ...]
) -> tuple[list[Array], list[Array]]:
    """Output planes (codes, not rounded), and the highest code of each."""
    f = spec.format
    bits = f.bits
    full = spec.color.range == Range.FULL or (
        f.model == "rgb" and spec.color.range == Range.UNSPECIFIED
    )
    top = 2**bits - 1
    y_scale, y_zero = (top, 0) if full else (219 * 2 ** (bits - 8), 16 * 2 ** (bits - 8))
    c_scale, c_zero = (top if full else 224 * 2 ** (bits - 8)), 2 ** (bits - 1)
    values = [(p >> f.shift).astype(np.float64) for p in planes]
    if f.interleaved:
        values = [values[0], values[1][..., 0], values[1][..., 1]]
    k_r, k_b = KR_KB.get(spec.color.matrix, (0.2126, 0.0722))
    k_g = 1 - k_r - k_b

    def repeat(x: Array) -> Array:
        return x.repeat(scale, 0).repeat(scale, 1)

    height, width = values[0].shape
    if f.model == "gray":
        return [repeat(values[0])], [top]
    if f.model == "rgb":
        if kind == "rgb":
            return [repeat(v) for v in values], [top] * 3
        g, b, r = ((v - y_zero) / y_scale for v in values)
        y = k_r * r + k_g * g + k_b * b
        at = (np.arange(max(height, width) * scale) + 0.5) / scale - 0.5
        cb, cr = (
            sample(c, at[: height * scale], at[: width * scale])
            for c in ((b - y) / (2 - 2 * k_b), (r - y) / (2 - 2 * k_r))
        )
        y = repeat(y)
        r, b = y + (2 - 2 * k_r) * cr, y + (2 - 2 * k_b) * cb
        g = (y - k_r * r - k_b * b) / k_g
        return [v * y_scale + y_zero for v in (g, b, r)], [top] * 3

    fx, fy = 1 << f.subsampling[0], 1 << f.subsampling[1]
    ox, oy = ChromaSite(spec.color.site).offset()
    dx, dy = (ox if fx > 1 else 0.0), (oy if fy > 1 else 0.0)
    out_w, out_h = -(-width * scale // fx), -(-height * scale // fy)
    if kind == "luma":
        luma = repeat(values[0])

        def place(n: int, factor: int, d: float) -> Array:
            in_luma = (factor * np.arange(n) + d + 0.5) / scale - 0.5
            return (in_luma - d) / factor

        chroma = [
            v if scale == 1 else sample(v, place(out_h, fy, dy), place(out_w, fx, dx))
            for v in values[1:]
        ]
        return [luma, *chroma], [top] * 3

    pad_y, pad_x = -height % fy, -width % fx
    luma = np.pad((values[0] - y_zero) / y_scale, ((0, pad_y), (0, pad_x)), "edge")
    ys, xs = (np.arange(luma.shape[0]) - dy) / fy, (np.arange(luma.shape[1]) - dx) / fx
    cb, cr = (sample((v - c_zero) / c_scale, ys, xs) for v in values[1:])
    r, b = luma + (2 - 2 * k_r) * cr, luma + (2 - 2 * k_b) * cb
    g = (luma - k_r * r - k_b * b) / k_g
    r, g, b = repeat(r), repeat(g), repeat(b)
    y = k_r * r + k_g * g + k_b * b
    ys, xs = np.arange(out_h) * fy + dy, np.arange(out_w) * fx + dx
    cb, cr = (sample(c, ys, xs, fy, fx) for c in ((b - y) / (2 - 2 * k_b), (r - y) / (2 - 2 * k_r)))
    luma = y[: height * scale, : width * scale] * y_scale + y_zero
    return [luma, cb * c_scale + c_zero, cr * c_scale + c_zero], [top] * 3


def assert_close(spec: FrameSpec, planes: list[Array], expected: tuple[list[Array], Any]) -> None:
    got = [p >> spec.format.shift for p in planes]
    for plane in planes:
        assert not (plane & ((1 << spec.format.shift) - 1)).any()
    if spec.format.interleaved:
        got = [got[0], got[1][..., 0], got[1][..., 1]]
    for plane, value, top in zip(got, *expected, strict=True):
        assert plane.shape == value.shape
        error = np.abs(plane.astype(np.float64) - np.clip(value, 0, top)).max()
        # Rounding is half a code; the rest is float32. At 16 bits that is what counts.
        assert error <= (0.51 if spec.format.bits < 16 else 1.0), error


# -- properties ---------------------------------------------------------------------------

specs = st.builds(
    lambda name, width, height, matrix, code_range, site: FrameSpec(
        width=width,
        height=height,
        format=pixel_format(name),
        color=Color(matrix=matrix, range=code_range, site=site),
        time_base=Fraction(1, 25),
    ),
    st.sampled_from([*PIXEL_FORMATS]),
    st.integers(1, 37),
    st.integers(1, 37),
    st.sampled_from(MATRICES),
    st.sampled_from(Range),
    st.sampled_from(ChromaSite),
)
calm = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", ["luma", "rgb"])
@given(spec=specs, seed=st.integers(0, 99), portable=st.booleans())
@calm
def test_identity_is_within_a_code_value_of_the_reference(
    models: Any, kind: str, spec: FrameSpec, seed: int, portable: bool
) -> None:
    planes = pattern(spec, seed).planes
    got = through_graph(models[kind, 1], spec, planes, portable=portable)
    assert_close(spec, got, reference(kind, 1, spec, planes))
    if kind == "luma" and spec.format.model != "rgb":
        for a, b in zip(got, planes, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["luma", "rgb"])
@given(spec=specs, seed=st.integers(0, 99), scale=st.integers(2, 4), portable=st.booleans())
@calm
def test_enlarging_is_within_a_code_value_of_the_reference(
    models: Any, kind: str, spec: FrameSpec, seed: int, scale: int, portable: bool
) -> None:
    planes = pattern(spec, seed).planes
    got = through_graph(models[kind, scale], spec, planes, portable=portable)
    assert_close(spec, got, reference(kind, scale, spec, planes))


@given(spec=specs, scale=st.integers(1, 3))
@settings(calm, max_examples=60)
def test_grey_ramps_stay_grey(models: Any, spec: FrameSpec, scale: int) -> None:
    spec = replace(spec, width=spec.width * 4 + 32)
    f = spec.format
    ramp = np.linspace(0, 2**f.bits - 1, spec.width).round().astype(np.uint16)
    planes = tuple(
        (np.broadcast_to(ramp if i == 0 or f.model == "rgb" else 1 << (f.bits - 1), shape))
        if len(shape) == 2
        else np.full(shape, 1 << (f.bits - 1))
        for i, shape in enumerate(spec.plane_shapes())
    )
    planes = tuple((p.astype(np.uint16) << f.shift).astype(f.dtype) for p in planes)
    for kind in ("luma", "rgb"):
        first, *others = through_graph(models[kind, scale], spec, planes)
        for plane in others:
            if f.model == "rgb":
                np.testing.assert_allclose(plane.astype(int), first.astype(int), atol=0)
            else:
                assert (plane == (1 << (f.bits - 1)) << f.shift).all()


# -- examples -----------------------------------------------------------------------------


def test_matrices_invert_each_other_and_match_bt709() -> None:
    for k_r, k_b in KR_KB.values():
        np.testing.assert_allclose(
            color.rgb_to_ycc(k_r, k_b) @ color.ycc_to_rgb(k_r, k_b), np.eye(3), atol=1e-14
        )
    # ITU-R BT.709-6, items 3.2 and 3.3.
    ycc = color.rgb_to_ycc(0.2126, 0.0722)
    np.testing.assert_allclose(ycc[0], [0.2126, 0.7152, 0.0722])
    np.testing.assert_allclose(ycc[1] * 1.8556, [-0.2126, -0.7152, 0.9278])
    np.testing.assert_allclose(ycc[2] * 1.5748, [0.7874, -0.7152, -0.0722])


@pytest.mark.parametrize(
    ("bits", "code_range", "black", "white", "neutral", "blue"),
    [
        (8, Range.LIMITED, 16, 235, 128, 240),
        (10, Range.LIMITED, 64, 940, 512, 960),
        (8, Range.FULL, 0, 255, 128, 255.5),
        (12, Range.FULL, 0, 4095, 2048, 4095.5),
    ],
)
def test_code_values_of_h273(
    bits: int, code_range: Range, black: int, white: int, neutral: int, blue: float
) -> None:
    luma = color.luma_quantizer(bits, code_range)
    chroma = color.chroma_quantizer(bits, code_range)
    assert (luma.zero, luma.zero + luma.scale) == (black, white)
    assert (chroma.zero, chroma.zero + chroma.scale / 2) == (neutral, blue)


def test_enlarging_by_two_puts_chroma_where_luma_goes() -> None:
    # Left-sited chroma sits on luma sample 2 j: at the new size, sample j of a plane is
    # (2 j + 1/2) / 2 - 1/2 = j - 1/4 old luma samples, or j / 2 - 1/8 old chroma samples.
    weights = color.enlarge_filter(2, 2, 0.0)
    positions = [
        float((row * (np.arange(weights.taps) + weights.first)).sum()) for row in weights.weights
    ]
    np.testing.assert_allclose(positions, [-0.125, 0.375], atol=1e-12)
    centre = color.enlarge_filter(2, 2, 0.5)
    positions = [
        float((row * (np.arange(centre.taps) + centre.first)).sum()) for row in centre.weights
    ]
    np.testing.assert_allclose(positions, [-0.25, 0.25], atol=1e-12)


def test_head_and_footroom_are_kept(models: Any) -> None:
    spec = FrameSpec(width=256, height=2, format=pixel_format("yuv444p"))
    y = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    grey = np.full_like(y, 128)
    for kind in ("luma", "rgb"):
        got = through_graph(models[kind, 1], spec, (y, grey, grey))
        np.testing.assert_array_equal(got[0], y)


def test_an_unspecified_matrix_is_tagged_only_where_players_would_guess_anew(models: Any) -> None:
    model = models["luma", 2]
    small = FrameSpec(width=320, height=180, format=pixel_format("yuv420p"))
    assert output_spec(model, small).color == small.color
    middle = replace(small, width=640, height=360)
    out = output_spec(model, middle)
    assert out.color == replace(middle.color, matrix=Matrix.SMPTE170M)
    assert out.resolved_color().matrix == middle.resolved_color().matrix
    large = replace(small, width=1280, height=720)
    assert output_spec(model, large).color == large.color
    tagged = replace(middle, color=Color(matrix=Matrix.BT709))
    assert output_spec(model, tagged).color == tagged.color


def test_rgb_models_refuse_a_matrix_that_they_cannot_convert(models: Any) -> None:
    spec = FrameSpec(
        width=64, height=48, format=pixel_format("yuv444p"), color=Color(matrix=Matrix.YCGCO)
    )
    assert output_spec(models["luma", 2], spec).color.matrix == Matrix.YCGCO
    with pytest.raises(SpecError, match="matrix coefficients 8 cannot be converted"):
        output_spec(models["rgb", 2], spec)


@pytest.mark.parametrize("portable", [False, True])
def test_ties_round_to_even(tmp_path: Path, portable: bool) -> None:
    # A model that adds half a code: every value is a tie.
    net = modelgen.Net(1)
    net.conv(np.ones((1, 1, 1, 1)), np.array([0.5]))
    metadata = {"vidpipe.scale": "1", "vidpipe.range": "0..255", "vidpipe.channels": "luma"}
    path = net.save(tmp_path / "half.onnx", metadata=metadata)
    spec = FrameSpec(
        width=256, height=1, format=pixel_format("gray"), color=Color(range=Range.FULL)
    )
    y = np.arange(256, dtype=np.uint8)[None]
    (got,) = through_graph(describe(path), spec, (y,), portable=portable)
    np.testing.assert_array_equal(got[0], np.clip(np.round(y[0] + 0.5), 0, 255))


def test_quantisation_around_a_float_model_leaves_its_weights_alone(tmp_path: Path) -> None:
    # ONNX Runtime turns a convolution between (De)QuantizeLinear nodes into an int8 one.
    random = np.random.default_rng(1)
    weights = random.normal(0, 0.1, (1, 1, 3, 3))
    weights[0, 0, 1, 1] += 1 - weights.sum()
    metadata = {"vidpipe.scale": "1", "vidpipe.range": "0..1", "vidpipe.channels": "luma"}
    path = modelgen.Net(1).conv(weights).save(tmp_path / "conv.onnx", metadata=metadata)
    spec = FrameSpec(width=64, height=48, format=pixel_format("gray"))
    (y,) = pattern(spec).planes
    padded = np.pad((y.astype(np.float64) - 16) / 219, 1)
    value = sum(
        weights[0, 0, i, j] * padded[i : i + 48, j : j + 64] for i in range(3) for j in range(3)
    )
    expected = np.clip(value * 219 + 16, 0, 255)
    (got,) = through_graph(describe(path), spec, (y,))
    assert np.abs(got - expected).max() <= 0.51
