"""Frames, formats and colour tags."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vidpipe.errors import SpecError
from vidpipe.frame import (
    PIXEL_FORMATS,
    ChromaSite,
    Color,
    FrameSpec,
    Matrix,
    Range,
    pixel_format,
)
from vidpipe.testing import pattern, spec


def test_plane_shapes_agree_with_ffmpeg_for_odd_sizes() -> None:
    av = pytest.importorskip("av")
    for fmt in PIXEL_FORMATS.values():
        frame = av.VideoFrame(33, 17, fmt.name)
        shapes = fmt.plane_shapes(33, 17)
        assert len(shapes) == len(frame.planes), fmt
        for shape, plane in zip(shapes, frame.planes, strict=True):
            assert plane.height == shape[0], fmt
            assert plane.width == shape[1], fmt
            assert plane.line_size >= int(np.prod(shape[1:])) * fmt.dtype.itemsize, fmt


def test_bits_agree_with_ffmpeg() -> None:
    av = pytest.importorskip("av")
    for fmt in PIXEL_FORMATS.values():
        components = av.VideoFormat(fmt.name, 16, 16).components
        assert components[0].bits == fmt.bits, fmt
        assert fmt.model == "gray" or len(components) == 3, fmt


def test_unknown_format_suggests_a_known_one() -> None:
    with pytest.raises(SpecError, match="Did you mean 'yuv420p'"):
        pixel_format("yuv420")


def test_unspecified_matrix_follows_the_size() -> None:
    color = Color()
    assert color.resolved(720, 576).matrix == Matrix.SMPTE170M
    assert color.resolved(1280, 720).matrix == Matrix.BT709
    assert color.resolved(720, 576).range == Range.LIMITED
    assert Color(matrix=Matrix.YCGCO).resolved(64, 64).matrix == Matrix.YCGCO
    with pytest.raises(SpecError, match="matrix coefficients 8"):
        Color(matrix=Matrix.YCGCO).luma_coefficients()
    assert Color(matrix=Matrix.BT2020_NCL).resolved(64, 64).matrix == Matrix.BT2020_NCL


def test_rgb_without_a_range_is_full() -> None:
    rgb = FrameSpec(width=8, height=8, format=pixel_format("gbrp"))
    assert rgb.resolved_color().range == Range.FULL


def test_site_offsets() -> None:
    assert ChromaSite.LEFT.offset() == (0.0, 0.5)
    assert ChromaSite.UNSPECIFIED.offset() == ChromaSite.LEFT.offset()
    assert ChromaSite.BOTTOM.offset() == (0.5, 1.0)


def test_a_size_is_positive() -> None:
    with pytest.raises(SpecError, match="0x8"):
        FrameSpec(width=0, height=8, format=pixel_format("gray"))


def test_replace_keeps_time_and_side_data() -> None:
    frame = pattern(spec(8, 8), pts=7)
    frame.side_data = object()
    frame.captured_s = 1.5
    other = frame.replace(frame.planes, spec(8, 8))
    assert (other.pts, other.duration, other.captured_s) == (7, 1, 1.5)
    assert other.side_data is frame.side_data
    assert frame.time_s == float(Fraction(7, 25))


def test_patterns_repeat_and_use_every_bit() -> None:
    tenbit = spec(64, 64, "p010le")
    one, same, other = pattern(tenbit, 1), pattern(tenbit, 1), pattern(tenbit, 2)
    assert (one.planes[0] == same.planes[0]).all()
    assert (one.planes[0] != other.planes[0]).any()
    assert np.bitwise_or.reduce(one.planes[0], axis=None) == 0b1111111111000000
