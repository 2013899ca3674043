"""NVENC without the chip: options, what is held, and pictures that are read late."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from mediagen import make

from vidpipe.device import CPU, Device, Ring, Slot
from vidpipe.errors import DeviceError, OutputError
from vidpipe.frame import PIXEL_FORMATS, Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.media import nvenc, writer
from vidpipe.media.decode import Decode
from vidpipe.media.encode import Encode
from vidpipe.media.encoders import NVENC, Encoder, encoder_for, encoder_options
from vidpipe.pipeline import Pipeline, Report
from vidpipe.stage import Source
from vidpipe.testing import pattern

GPU = Device("cuda", 0)


def spec_of(format: str, size: tuple[int, int] = (64, 48), device: Device = GPU) -> FrameSpec:
    return FrameSpec(
        width=size[0],
        height=size[1],
        format=PIXEL_FORMATS[format],
        time_base=Fraction(1, 1000),
        rate=Fraction(25),
        device=device,
    )


class TestOptions:
    @pytest.mark.parametrize("codec", NVENC)
    @pytest.mark.parametrize("crf", [None, 0.0, 23.5])
    @pytest.mark.parametrize("more", [{}, {"b": "5M"}, {"rc": "constqp", "qp": "20"}])
    def test_ffmpeg_knows_every_option_and_value(
        self, codec: str, crf: float | None, more: dict[str, str]
    ) -> None:
        encoder = NVENC[codec]
        options = encoder_options(encoder, crf, "veryfast", more)
        options = nvenc.with_profile(encoder.name, options, "p010le")
        supported = av.CodecContext.create(encoder.name, "w").supported_options
        known = {o.name: o for o in (*supported.generic, *supported.private)}
        private = {o.name: o for o in supported.private}
        for variant in nvenc.variants(options, more):
            for name, value in variant.items():
                assert name in known, name
                words = {c.name for c in private[name].choices} if name in private else set()
                if words and not value.lstrip("-").replace(".", "").isdecimal():
                    assert value in words, (name, value)

    def test_pixel_formats_are_those_of_ffmpeg(self) -> None:
        for encoder in NVENC.values():
            names = {f.name for f in av.Codec(encoder.name, "w").video_formats or ()}
            assert {nvenc.PIX_FMT, "nv12", "p010le", "p016le"} <= names

    def test_constant_quality(self) -> None:
        options = encoder_options(NVENC["h264"], None, None, {})
        assert (options["rc"], options["cq"], options["b"]) == ("vbr", "19", "0")
        options = encoder_options(NVENC["hevc"], 25.5, "slow", {})
        assert (options["cq"], options["preset"]) == ("25.5", "p5")

    def test_lossless(self) -> None:
        options = encoder_options(NVENC["hevc"], 0.0, "p1", {})
        assert (options["tune"], options["preset"]) == ("lossless", "p1")
        assert not {"rc", "cq", "b"} & set(options)

    def test_a_bit_rate_of_the_user_replaces_the_quality(self) -> None:
        options = encoder_options(NVENC["h264"], None, None, {"b": "5M"})
        assert options["b"] == "5M"
        assert not {"rc", "cq"} & set(options)

    def test_presets_of_svt_av1(self) -> None:
        got = [encoder_options(NVENC["av1"], None, str(n), {})["preset"] for n in (0, 8, 13)]
        assert got == ["p7", "p3", "p1"]

    def test_unknown_preset(self) -> None:
        with pytest.raises(OutputError, match=r"h264_nvenc has no preset 'quick'\. Use p1"):
            encoder_options(NVENC["h264"], None, "quick", {})

    def test_ten_bits_have_their_profile(self) -> None:
        assert nvenc.with_profile("hevc_nvenc", {}, "p010le") == {"profile": "main10"}
        assert nvenc.with_profile("hevc_nvenc", {}, "nv12") == {}
        assert nvenc.with_profile("hevc_nvenc", {"profile": "rext"}, "p010le")["profile"] == "rext"

    def test_what_the_user_set_is_never_taken_back(self) -> None:
        options = encoder_options(NVENC["hevc"], None, None, {})
        tried = list(nvenc.variants(options, {}))
        assert [(t.get("b_ref_mode"), t["bf"]) for t in tried] == [
            ("middle", "3"),
            (None, "3"),
            (None, "0"),
        ]
        fixed = {"bf": "2", "b_ref_mode": "each"}
        assert list(nvenc.variants(options | fixed, fixed)) == [options | fixed]

    @pytest.mark.parametrize(
        ("options", "frames"),
        [
            ({"bf": "0"}, 4),
            ({"bf": "3"}, 16),
            ({"bf": "3", "rc-lookahead": "32"}, 41),
            ({"bf": "0", "surfaces": "2"}, 2),
            ({"bf": "3", "surfaces": "2"}, 16),
            ({"bf": "3", "delay": "5"}, 6),
            ({"bf": "3", "rc-lookahead": "200"}, 64),
        ],
    )
    def test_pictures_that_ffmpeg_keeps(self, options: dict[str, str], frames: int) -> None:
        assert nvenc.held(options) == frames

    @pytest.mark.parametrize(
        ("format", "wanted", "layout"),
        [
            ("nv12", None, "nv12"),
            ("p010le", None, "p010le"),
            ("yuv420p", None, "nv12"),
            ("yuv420p", "yuv420p", "nv12"),
            ("yuv420p10le", "p010le", "p010le"),
            ("p016le", None, None),
            ("p016le", "p010le", "p016le"),
            ("nv12", "yuv444p", None),
            ("yuv444p", None, None),
            ("gbrp", None, None),
        ],
    )
    def test_layouts(self, format: str, wanted: str | None, layout: str | None) -> None:
        assert nvenc.layout_for(PIXEL_FORMATS[format], wanted) == layout


@dataclass
class Late:
    """A picture known to the encoder by its address alone, as to NVENC."""

    layout: str
    shapes: tuple[tuple[int, ...], ...]
    addresses: tuple[int, ...]
    itemsize: int
    pts: int = 0
    time_base: Fraction = Fraction(1)
    duration: int = 0
    color_range: int = 0
    colorspace: int = 0
    color_trc: int = 0
    color_primaries: int = 0
    pict_type: int = 0

    def read(self) -> av.VideoFrame:
        planes = []
        for shape, address in zip(self.shapes, self.addresses, strict=True):
            count = int(np.prod(shape))
            kind: Any = ctypes.c_uint8 if self.itemsize == 1 else ctypes.c_uint16
            planes.append(np.array((kind * count).from_address(address)).reshape(shape))
        frame = av.VideoFrame.from_dlpack(tuple(planes), self.layout)
        frame.pts, frame.time_base, frame.duration = self.pts, self.time_base, self.duration
        return frame


class Delayed:
    """A stream whose encoder reads a picture `delay` calls after it was given."""

    delay = 5

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.waiting: deque[Late] = deque()
        self.longest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def encode(self, picture: Late | None) -> list[Any]:
        packets = []
        if picture is not None:
            self.waiting.append(picture)
        self.longest = max(self.longest, len(self.waiting))
        while self.waiting and (picture is None or len(self.waiting) > self.delay):
            packets += self.stream.encode(self.waiting.popleft().read())
        return packets if picture is not None else packets + self.stream.encode(None)


class FakeStream:
    """A CUDA stream on which everything is done at once."""

    ptr = 7

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)

    def record(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def synchronize(self) -> None: ...


class Settable(np.ndarray[Any, Any]):
    """A NumPy array with CuPy's `set`."""

    def set(self, source: Any, stream: Any = None) -> None:
        self[...] = source


class HostRing(Ring):
    """A ring of a GPU, in host memory."""

    def __init__(self, shapes: Any, depth: int, device: Device = CPU) -> None:
        super().__init__(shapes, depth)

    def lease(self) -> tuple[Slot, tuple[Any, ...]]:
        slot, planes = super().lease()
        return slot, tuple(p.view(Settable) for p in planes)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> list[Delayed]:
    """Make libx264, lossless and late, stand in for NVENC; returns the streams it opened."""
    fake_cupy = SimpleNamespace(
        cuda=SimpleNamespace(runtime=SimpleNamespace(free=lambda _: None)), asnumpy=np.array
    )
    opened: list[Delayed] = []

    def imported(planes: Any, layout: str, stream: Any, context: Any) -> Any:
        return Late(
            layout,
            tuple(p.shape for p in planes),
            tuple(p.ctypes.data for p in planes),
            planes[0].itemsize,
        )

    real = writer.Writer._add_video

    def add_video(self: Any) -> Any:
        stream: Any = real(self)
        if self._feeder is not None:
            stream = Delayed(stream)
            opened.append(stream)
        return stream

    options = {"qp": "0", "bf": "2", "rc-lookahead": "8", "preset": "ultrafast"}
    monkeypatch.setitem(NVENC, "h264", Encoder("libx264", options, even=True, device=True))
    monkeypatch.setattr(nvenc, "PIX_FMT", "nv12")
    monkeypatch.setattr(nvenc, "import_cupy", lambda _: fake_cupy)
    monkeypatch.setattr(nvenc, "_stream", lambda *_: FakeStream())
    monkeypatch.setattr(nvenc, "_context", lambda *_: None)
    monkeypatch.setattr(nvenc, "_imported", imported)
    monkeypatch.setattr(nvenc, "_address", lambda array: array.ctypes.data)
    monkeypatch.setattr(nvenc, "Ring", HostRing)
    monkeypatch.setattr(nvenc, "attempt", lambda *_: None)
    monkeypatch.setattr(writer.Writer, "_add_video", add_video)
    monkeypatch.setattr("vidpipe.media.encode.encoder_options", lambda e, *_: dict(e.options))
    return opened


class RingSource(Source):
    """Noise leased from a ring of the depth that the pipeline says."""

    def __init__(self, spec: FrameSpec, count: int, second: FrameSpec | None = None) -> None:
        self.spec = spec
        self.count = count
        self.second = second
        self.ring: Ring | None = None
        self.waited: list[int] = []

    def plan(self) -> FrameSpec:
        return self.spec

    def open(self) -> None:
        shapes = [(s, self.spec.format.dtype) for s in self.spec.plane_shapes()]
        self.ring = Ring(shapes, self.ring_depth)

    def frames(self) -> Iterator[Frame]:
        assert self.ring is not None
        for i in range(self.count):
            if self.second is not None and i >= self.count // 2:
                yield pattern(self.second, i * 40)
                continue
            made = pattern(self.spec, i * 40)
            slot, planes = self.ring.lease()
            for source, target in zip(made.planes, planes, strict=True):
                np.copyto(target, source)
            frame = replace(made, planes=planes, duration=40, slot=slot)
            del planes
            yield frame
            del frame


def encode(path: Path, source: RingSource, **options: Any) -> tuple[Report, Encode]:
    sink = Encode(path=str(path), **options)
    graph = Graph().add("in", source).add("out", sink, "in")
    return Pipeline(graph).run(), sink


def pictures(path: Path) -> list[tuple[int, tuple[Any, ...]]]:
    source = Decode(path=str(path))
    source.plan()
    return [(round(f.time_s * 1000), f.planes) for f in source.frames()]


def test_no_slot_is_given_back_before_its_packet_is_out(tmp_path: Path, chip: Any) -> None:
    """The ring hands out the slot that came back last, so an early one would be overwritten."""
    spec = spec_of("nv12")
    source = RingSource(spec, 40)
    report, sink = encode(tmp_path / "out.mkv", source)
    assert report.problems == []
    assert report.stage("out").facts["encoded_from"] == "cuda:0"
    assert chip[-1].longest == Delayed.delay + 1
    assert source.ring is not None
    assert source.ring.grown == 0
    assert sink.holds == nvenc.held({"bf": "2", "rc-lookahead": "8"})
    assert source.ring_depth == 1 + 3 + sink.holds
    got = pictures(tmp_path / "out.mkv")
    assert [time for time, _ in got] == [i * 40 for i in range(40)]
    for time, planes in got:
        expected = pattern(spec, time).planes
        assert np.array_equal(planes[0], expected[0])
        for i, plane in enumerate(planes[1:]):
            assert np.array_equal(plane, expected[1][..., i])


def test_nothing_is_held_after_the_end(tmp_path: Path, chip: Any) -> None:
    source = RingSource(spec_of("nv12"), 12)
    encode(tmp_path / "out.mp4", source)
    assert source.ring is not None
    assert len(source.ring._free) == len(source.ring)


def test_planar_frames_are_packed(tmp_path: Path, chip: Any) -> None:
    spec = spec_of("yuv420p")
    source = RingSource(spec, 20)
    _, sink = encode(tmp_path / "out.mkv", source)
    assert sink.holds == 0
    assert source.ring is not None
    assert source.ring.grown == 0
    for time, planes in pictures(tmp_path / "out.mkv"):
        for plane, expected in zip(planes, pattern(spec, time).planes, strict=True):
            assert np.array_equal(plane, expected)


def test_ten_bits_are_packed_to_the_high_bits(chip: Any) -> None:
    feeder = nvenc.Feeder(spec_of("yuv420p10le"), "p010le", 2)
    frame = pattern(spec_of("yuv420p10le"), 3)
    picture: Any
    picture, (luma, chroma) = feeder.picture(frame)
    assert picture.layout == "p010le"
    assert np.array_equal(luma, frame.planes[0] << 6)
    assert np.array_equal(chroma[..., 1], frame.planes[2] << 6)


def test_planes_apart_are_packed_and_a_ring_slot_is_not(chip: Any) -> None:
    spec = spec_of("nv12")
    feeder = nvenc.Feeder(spec, "nv12", 2)
    apart = pattern(spec, 1)
    assert feeder.picture(apart)[1][0] is not apart.planes[0]
    slot, planes = Ring([(s, np.uint8) for s in spec.plane_shapes()], 1).lease()
    together = replace(apart, planes=planes, slot=slot)
    assert feeder.picture(together)[1][0] is planes[0]


def test_the_encoder_waits_for_the_frame_by_its_event(chip: Any) -> None:
    spec = spec_of("nv12")
    feeder = nvenc.Feeder(spec, "nv12", 2)
    event: Any = object()
    feeder.picture(replace(pattern(spec), ready=event))
    stream: Any = feeder._stream
    assert stream.waits == [event]


def test_a_change_of_size_goes_on_in_the_first(tmp_path: Path, chip: Any) -> None:
    source = RingSource(spec_of("nv12"), 10, spec_of("nv12", (32, 24)))
    report, _ = encode(tmp_path / "out.mkv", source)
    assert report.stage("out").facts["resized_frames"] == 5
    got = pictures(tmp_path / "out.mkv")
    assert len(got) == 10
    assert got[-1][1][0].shape == (48, 64)
    small = pattern(spec_of("nv12", (32, 24)), 360).planes[0]
    assert abs(float(got[-1][1][0].mean()) - float(small.mean())) < 2


def test_timestamps_of_a_variable_rate_survive(tmp_path: Path, chip: Any) -> None:
    """With B-frames, so packets leave in another order than pictures come."""
    times = [0, 40, 57, 130, 131, 300, 340, 341, 342, 700]

    class Uneven(RingSource):
        def frames(self) -> Iterator[Frame]:
            for frame, pts in zip(super().frames(), times, strict=True):
                yield replace(frame, pts=pts, duration=None)

    encode(tmp_path / "out.mkv", Uneven(spec_of("nv12"), len(times)))
    assert [time for time, _ in pictures(tmp_path / "out.mkv")] == times


class TestChoice:
    def choose(self, path: Path, spec: FrameSpec, **options: Any) -> tuple[Device, Encode]:
        sink = Encode(path=str(path), **options)
        return sink.device_for(spec), sink

    def test_where_the_chip_is_missing_the_cpu_encodes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nvenc, "attempt", lambda *_: "no capable devices found")
        device, sink = self.choose(tmp_path / "o.mp4", spec_of("nv12"), codec="hevc")
        assert device == CPU
        assert sink._why_host == "hevc_nvenc on cuda:0: no capable devices found"
        sink.plan(spec_of("nv12", device=CPU))
        assert sink._encoder.name == "libx265"
        assert sink.holds == 0

    def test_asked_for_by_name_it_is_there_or_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nvenc, "attempt", lambda *_: "no capable devices found")
        with pytest.raises(DeviceError) as error:
            self.choose(tmp_path / "o.mp4", spec_of("nv12"), codec="h264_nvenc")
        assert str(error.value) == (
            "encoder h264_nvenc cannot be used on cuda:0: no capable devices found. "
            "Use --codec h264, hevc or av1 for whichever encoder there is"
        )

    def test_without_a_gpu_the_error_is_one_line(self, tmp_path: Path) -> None:
        sink = Encode(path=str(tmp_path / "o.mp4"), codec="h264_nvenc")
        assert sink.device_for(spec_of("nv12", device=CPU)) == CPU
        with pytest.raises(OutputError, match=r"h264_nvenc cannot be started: .*NVENC"):
            sink.plan(spec_of("nv12", device=CPU))

    def test_simpler_options_are_tried_in_turn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def attempt(name: str, options: dict[str, str], *_: Any) -> str | None:
            return "B frames as references are not supported" if "b_ref_mode" in options else None

        monkeypatch.setattr(nvenc, "attempt", attempt)
        device, sink = self.choose(tmp_path / "o.mp4", spec_of("p010le"), codec="hevc")
        assert device == GPU
        assert sink._options is not None
        assert "b_ref_mode" not in sink._options
        assert (sink._options["bf"], sink._options["profile"]) == ("3", "main10")

    @pytest.mark.parametrize(
        ("codec", "format", "more", "why"),
        [
            ("libx264", "nv12", {}, "libx264 runs there"),
            ("ffv1", "nv12", {}, "ffv1 runs there"),
            ("h264", "yuv444p", {}, "yuv444p is not taken from its memory"),
            ("hevc", "nv12", {"x265-params": "a=1"}, "has no option 'x265-params'"),
        ],
    )
    def test_what_only_the_cpu_can(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        codec: str,
        format: str,
        more: dict[str, str],
        why: str,
    ) -> None:
        monkeypatch.setattr(nvenc, "attempt", lambda *_: None)
        device, sink = self.choose(
            tmp_path / "o.mkv", spec_of(format), codec=codec, encoder_options=more
        )
        assert device == CPU
        assert why in sink._why_host
        assert encoder_for(codec).name not in {e.name for e in NVENC.values()}

    def test_odd_sizes_and_captions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nvenc, "attempt", lambda *_: None)
        device, sink = self.choose(tmp_path / "o.mkv", spec_of("nv12", (63, 48)))
        assert device == CPU
        assert "63x48 is not an even size" in sink._why_host
        for drop, expected in (([], CPU), (["captions"], GPU)):
            source = Decode(path=str(make(tmp_path / "in.mp4", frames=3)))
            source.plan()
            assert source.info is not None
            source.info = replace(
                source.info, video=replace(source.info.video, side_data=("A53_CC",))
            )
            sink = Encode(path=str(tmp_path / "o.mkv"), drop=drop)
            sink.attach(source)
            assert sink.device_for(spec_of("nv12")) == expected


def test_the_attempt_says_why_an_encoder_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blank:
        def __init__(self, *_: Any) -> None: ...

        def blank(self) -> av.VideoFrame:
            return av.VideoFrame(64, 48, "nv12")

    monkeypatch.setattr(nvenc, "Feeder", Blank)
    monkeypatch.setattr(nvenc, "PIX_FMT", "nv12")
    spec = spec_of("nv12")
    assert nvenc.attempt("libx264", {"preset": "ultrafast"}, spec, "nv12") is None
    why = nvenc.attempt("libx264", {"preset": "no such"}, spec, "nv12")
    assert why
    assert "\n" not in why


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_host_encoders_hold_no_slot_of_the_ring(tmp_path: Path, codec: str) -> None:
    """They read the planes where they are, and are done with them when the call returns."""
    spec = spec_of("yuv420p", (128, 96), CPU)
    source = RingSource(spec, 60)
    report, sink = encode(tmp_path / "out.mkv", source, codec=codec)
    assert report.problems == []
    assert sink.holds == 0
    assert source.ring is not None
    assert (len(source.ring), source.ring.grown) == (4, 0)
