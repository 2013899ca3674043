"""All that is not the picture comes through, in sync, or is refused by name."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import mediagen
import numpy as np
import pytest
from mediagen import SAMPLE_RATE, Audio, Clip, Subtitles, copy, payloads, times

from vidpipe.errors import OutputError
from vidpipe.media.decode import Decode
from vidpipe.media.encode import Encode
from vidpipe.media.probe import probe

AUDIO_FRAME_S = 1024 / SAMPLE_RATE


def run(source: Path, out: Path, decode: dict[str, Any] | None = None, **options: Any) -> Any:
    sink = Encode(path=str(out), **options)
    copy(Decode(path=str(source), **(decode or {})), sink)
    report = sink.report()
    assert report["problems"] == []
    return report


def rich(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "audio": [
            Audio(language="eng", title="Main", disposition=1),
            Audio("ac3", "deu", disposition=2),
        ],
        "subtitles": [
            Subtitles(language="eng"),
            Subtitles("ass", "fra", disposition=64, lines=[(0.3, 1.1, "Un {\\i1}deux{\\i0}")]),
        ],
        "chapters": [(0, 0.5, "One"), (0.5, 1.6, "Two")],
        "attachments": [("font.ttf", "font/ttf", b"\0\1\0\0" + bytes(range(100)))],
        "metadata": {"title": "A title", "artist": "Somebody", "X-OWN": "kept"},
        "video_metadata": {"language": "jpn", "title": "The film"},
    }
    return mediagen.make(path, Clip(**values), **changes)


def test_matroska_keeps_everything(tmp_path: Path) -> None:
    source = rich(tmp_path / "in.mkv")
    out = tmp_path / "out.mkv"
    report = run(source, out)
    before, after = probe(source), probe(out)
    assert report["lost"] == []
    assert report["start_shift_s"] == pytest.approx(0, abs=1e-3)
    assert [(s.kind, s.codec, s.language, s.disposition) for s in after.streams] == [
        (s.kind, s.codec, s.language, s.disposition) for s in before.streams
    ]
    assert [s.metadata.get("title") for s in after.streams][:2] == ["The film", "Main"]
    assert after.chapters == before.chapters
    for key in ("title", "ARTIST", "X-OWN"):
        assert after.metadata[key] == before.metadata[key]
    for kind, count in (("audio", 2), ("subtitles", 2)):
        for index in range(count):
            assert payloads(out, kind, index) == payloads(source, kind, index)
            assert times(out, kind, index) == times(source, kind, index)
    with av.open(str(source)) as a, av.open(str(out)) as b:
        assert a.streams.attachments[0].data == b.streams.attachments[0].data
        assert b.streams.attachments[0].name == "font.ttf"
        assert b.streams.attachments[0].mimetype == "font/ttf"
    kept = [(s["action"], s["packets"]) for s in report["streams"]]
    assert kept[:4] == [
        ("copy", len(payloads(source, "audio", 0))),
        ("copy", len(payloads(source, "audio", 1))),
        ("copy", 2),
        ("copy", 1),
    ]


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_mp4_turns_text_and_keeps_the_rest(tmp_path: Path, suffix: str) -> None:
    source = rich(tmp_path / "in.mkv")
    out = tmp_path / f"out.{suffix}"
    report = run(source, out, drop=["attachments"])
    after = probe(out)
    streams = [(s.kind, s.codec) for s in after.streams if s.kind != "data"]
    assert streams == [
        ("video", "h264"),
        ("audio", "aac"),
        ("audio", "ac3"),
        ("subtitle", "mov_text"),
        ("subtitle", "mov_text"),
    ]
    languages = [s.language for s in after.streams if s.kind != "data"]
    assert languages[:2] == ["jpn", "eng"]
    assert languages[2] in ("deu", "ger")
    assert [c.title for c in after.chapters] == ["One", "Two"]
    assert {k.lower(): v for k, v in after.metadata.items()}["x-own"] == "kept"
    for index in range(2):
        assert payloads(out, "audio", index) == payloads(source, "audio", index)
    assert [s["action"] for s in report["streams"]] == [
        "copy",
        "copy",
        "transcode",
        "transcode",
        "drop",
    ]
    texts = [p for p in payloads(out, "subtitles", 0) if len(p) > 2]
    assert [t[2:5] for t in texts] == [b"One", b"Two"]
    assert set(times(out, "subtitles", 0)) >= {Fraction(1, 5), Fraction(4, 5)}
    back = tmp_path / "back.mkv"
    again = run(out, back)
    assert [(s.kind, s.codec) for s in probe(back).streams] == [
        ("video", "h264"),
        ("audio", "aac"),
        ("audio", "ac3"),
        ("subtitle", "subrip"),
        ("subtitle", "subrip"),
    ]
    assert [s["action"] for s in again["streams"]][-1] == "rewrite"
    assert [c.title for c in probe(back).chapters] == ["One", "Two"]
    assert b"One" in payloads(back, "subtitles", 0)[0]
    assert b"deux" in payloads(back, "subtitles", 1)[0]
    assert b"<i>" in payloads(back, "subtitles", 1)[0]
    assert times(back, "subtitles", 0) == [Fraction(1, 5), Fraction(4, 5)]
    assert probe(back).streams[0].metadata["title"] == "The film"


def test_webm_turns_text(tmp_path: Path) -> None:
    source = rich(tmp_path / "in.mkv", audio=[Audio("libopus", "eng")], attachments=[])
    out = tmp_path / "out.webm"
    run(source, out)
    assert [(s.kind, s.codec) for s in probe(out).streams] == [
        ("video", "vp9"),
        ("audio", "opus"),
        ("subtitle", "webvtt"),
        ("subtitle", "webvtt"),
    ]
    assert b"One" in payloads(out, "subtitles", 0)[0]
    assert payloads(out, "audio", 0) == payloads(source, "audio", 0)


@pytest.mark.parametrize(
    ("suffix", "drop", "words"),
    [
        ("mp4", [], ("MP4", "attachment stream 5", "--drop attachments")),
        ("webm", [], ("WebM", "audio stream 1 (eng)", "codec aac", "--drop audio")),
        ("ts", [], ("MPEG-TS", "--drop chapters")),
        ("ts", ["chapters"], ("MPEG-TS", "subtitle stream 3", "--drop subtitles")),
        ("ts", ["chapters", "3", "subtitles"], ("attachment stream 5",)),
    ],
)
def test_what_a_container_cannot_hold_is_refused_by_name(
    tmp_path: Path, suffix: str, drop: list[str], words: tuple[str, ...]
) -> None:
    source = rich(tmp_path / "in.mkv")
    sink = Encode(path=str(tmp_path / f"out.{suffix}"), drop=drop)
    decode = Decode(path=str(source))
    spec = decode.plan()
    sink.attach(decode)
    with pytest.raises(OutputError) as caught:
        sink.plan(spec)
    message = str(caught.value)
    assert "\n" not in message
    if suffix == "ts" and not drop:
        assert "MPEG-TS" in message
    else:
        for word in words:
            assert word in message
    assert list(tmp_path.iterdir()) == [source]


def test_drop_by_kind_and_by_index(tmp_path: Path) -> None:
    source = rich(tmp_path / "in.mkv")
    run(source, tmp_path / "a.mkv", drop=["audio", "chapters", "metadata"])
    after = probe(tmp_path / "a.mkv")
    assert [s.kind for s in after.streams] == ["video", "subtitle", "subtitle", "attachment"]
    assert after.chapters == ()
    assert "title" not in after.metadata
    run(source, tmp_path / "b.mkv", drop=["2", "3"])
    assert [s.codec for s in probe(tmp_path / "b.mkv").streams][:3] == ["h264", "aac", "ass"]
    with pytest.raises(OutputError, match="'sound' is not something to drop"):
        run(source, tmp_path / "c.mkv", drop=["sound"])


@pytest.mark.parametrize("start", ["mp4", "mkv"])
def test_cover_picture_survives(tmp_path: Path, start: str) -> None:
    first = mediagen.make(tmp_path / "first.mp4", cover=True, frames=10, audio=[Audio()])
    source = tmp_path / f"in.{start}"
    run(first, source)
    for suffix in ("mp4", "mkv"):
        out = tmp_path / f"out.{suffix}"
        run(source, out)
        kinds = [(s.kind, s.codec) for s in probe(out).streams]
        assert sorted(kinds) == [("audio", "aac"), ("cover", "mjpeg"), ("video", "h264")]
        with av.open(str(out)) as container:
            cover = next(s for s in container.streams.video if s.disposition & 1024)
            content = next(bytes(p) for p in container.demux(cover) if p.size)
        assert content == mediagen.jpeg()
    with pytest.raises(OutputError, match=r"QuickTime cannot hold cover stream .*--drop covers"):
        run(source, tmp_path / "out.mov")


def test_data_stream_survives_in_a_transport_stream(tmp_path: Path) -> None:
    source = mediagen.make(tmp_path / "in.ts", data=True)
    run(source, tmp_path / "out.ts")
    assert payloads(tmp_path / "out.ts", "data") == payloads(source, "data")
    assert times(tmp_path / "out.ts", "data") == times(source, "data")
    with pytest.raises(OutputError, match=r"data stream 1, codec klv.*--drop data"):
        run(source, tmp_path / "out.mkv")


def test_time_code_survives(tmp_path: Path) -> None:
    source = mediagen.make(
        tmp_path / "in.mov", frames=10, video_metadata={"timecode": "01:02:03:04"}
    )
    assert [s.kind for s in probe(source).streams] == ["video", "data"]
    for suffix in ("mov", "mp4", "mkv"):
        out = tmp_path / f"out.{suffix}"
        report = run(source, out)
        assert report["streams"][0]["action"] == "rewrite"
        tags = {k.lower(): v for k, v in probe(out).streams[0].metadata.items()}
        assert tags["timecode"] == "01:02:03:04"
    with pytest.raises(OutputError, match=r"data stream 1.*--drop data"):
        run(source, tmp_path / "out.ts")


def flashes(path: Path) -> list[float]:
    return [float(t) for t, planes in mediagen.video_frames(path) if planes[0].mean() > 120]


def clicks(path: Path) -> list[float]:
    start, sound = mediagen.samples(path)
    loud = np.flatnonzero(np.abs(sound) > 0.25)
    firsts = loud[np.insert(np.diff(loud) > SAMPLE_RATE // 10, 0, True)]
    return [start + i / SAMPLE_RATE for i in firsts]


def synchronous(path: Path, **changes: Any) -> Path:
    def picture(format: Any, width: int, height: int, i: int) -> Any:
        return mediagen.flat(format, width, height, 0.9 if i in (25, 50, 75) else 0.1)

    return mediagen.make(
        path,
        frames=100,
        time_base=Fraction(1, 12800),
        picture=picture,
        audio=[Audio(clicks_s=(1.0, 2.0, 3.0))],
        **changes,
    )


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
@pytest.mark.parametrize("origin", ["mp4", "mkv", "ts"])
def test_sound_stays_in_sync(tmp_path: Path, origin: str, suffix: str) -> None:
    source = synchronous(tmp_path / f"in.{origin}")
    out = tmp_path / f"out.{suffix}"
    report = run(source, out, codec="h264", preset="ultrafast")
    seen, heard = flashes(out), clicks(out)
    assert len(seen) == len(heard) == 3
    for flash, click in zip(seen, heard, strict=True):
        assert abs(flash - click) < AUDIO_FRAME_S
    shift = report["start_shift_s"]
    assert [t - shift for t in seen] == pytest.approx(flashes(source), abs=2e-3)
    assert [bare(p) for p in payloads(out, "audio")] == [bare(p) for p in payloads(source, "audio")]


def bare(packet: bytes) -> bytes:
    """Return an AAC packet without the ADTS header that transport streams put before it."""
    return packet[7:] if packet.startswith(b"\xff\xf1") else packet


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_excerpt_stays_in_sync(tmp_path: Path, suffix: str) -> None:
    source = synchronous(
        tmp_path / "in.mkv",
        options={"g": "40"},
        chapters=[(0, 1.5, "a"), (1.5, 2.5, "b"), (2.5, 4, "c")],
        subtitles=[Subtitles(lines=[(0.1, 0.4, "no"), (1.0, 1.9, "late"), (2.2, 2.4, "in")])],
    )
    out = tmp_path / f"out.{suffix}"
    drop = ["chapters", "subtitles"] if suffix == "ts" else []
    report = run(source, out, {"start_s": 1.7, "duration_s": 1.0}, drop=drop, preset="ultrafast")
    assert report["frames"] == 25
    assert len(mediagen.video_frames(out)) == 25
    shift = report["start_shift_s"]
    # Frame 43 is the first at or after 1.7 s, so time zero is 1.72 s.
    (flash,), (click,) = flashes(out), clicks(out)
    assert flash - shift == pytest.approx(2.0 - 1.72, abs=2e-3)
    assert abs(flash - click) < AUDIO_FRAME_S
    sound = times(out, "audio")
    assert float(sound[0]) - shift > -AUDIO_FRAME_S
    assert float(sound[-1]) - shift < 1.0
    if suffix == "ts":
        return
    found = [(c.title, c.start_s, c.end_s) for c in probe(out).chapters]
    assert [f[0] for f in found] == ["b", "c"]
    assert [f[1] for f in found] == pytest.approx([0, 0.78], abs=2e-3)
    assert found[1][2] == pytest.approx(0.98, abs=2e-3)
    texts = [p for p in payloads(out, "subtitles") if len(p) > 2]
    shown = [w for t in texts for w in ("no", "late", "in") if w.encode() in t]
    assert shown == ["late", "in"]


def test_stopped_run_ends_sound_with_the_picture(tmp_path: Path) -> None:
    source = synchronous(tmp_path / "in.mp4")
    out = tmp_path / "out.mp4"
    decode, sink = Decode(path=str(source)), Encode(path=str(out), preset="ultrafast")
    spec = decode.plan()
    sink.attach(decode)
    sink.plan(spec)
    for count, frame in enumerate(decode.frames()):
        sink.write(frame)
        if count == 29:
            decode.stop()
    sink.finish()
    sink.close()
    assert len(mediagen.video_frames(out)) == 30
    assert 1.1 < float(times(out, "audio")[-1]) <= 1.2


def test_sound_that_begins_late_stays_late(tmp_path: Path) -> None:
    source = mediagen.make(
        tmp_path / "in.mkv", frames=50, audio=[Audio(late_s=0.64, clicks_s=(1.0,))]
    )
    for suffix in ("mkv", "mp4"):
        out = tmp_path / f"out.{suffix}"
        run(source, out)
        assert float(times(out, "audio")[0]) == pytest.approx(
            float(times(source, "audio")[0]), abs=1.1e-3
        )


def test_sound_stays_in_sync_where_timestamps_start_again(tmp_path: Path) -> None:
    one = synchronous(tmp_path / "one.ts")
    two = tmp_path / "two.ts"
    two.write_bytes(one.read_bytes() * 2)
    out = tmp_path / "out.mp4"
    report = run(two, out, preset="ultrafast")
    assert report["frames"] == 200
    assert len(payloads(out, "audio")) == len(payloads(two, "audio"))
    seen, heard = flashes(out), clicks(out)
    assert len(seen) == 6
    for flash in seen:
        assert min(abs(flash - click) for click in heard) < 2 * AUDIO_FRAME_S


def test_edit_list_and_sound(tmp_path: Path) -> None:
    pts = [i * 512 for i in range(-10, 40)]
    source = mediagen.make(
        tmp_path / "in.mp4",
        pts=pts,
        time_base=Fraction(1, 12800),
        audio=[Audio(clicks_s=(1.0,))],
        picture=lambda f, w, h, i: mediagen.flat(f, w, h, 0.9 if i == 35 else 0.1),
    )
    for suffix in ("mp4", "mkv"):
        out = tmp_path / f"out.{suffix}"
        report = run(source, out)
        assert report["frames"] == 40
        (flash,), (click,) = flashes(out), clicks(out)
        assert flash - report["start_shift_s"] == pytest.approx(1.0, abs=2e-3)
        assert abs(flash - click) < AUDIO_FRAME_S


def test_picture_without_any_other_stream(tmp_path: Path) -> None:
    source = mediagen.make(tmp_path / "in.mkv", frames=5)
    assert run(source, tmp_path / "out.mp4")["streams"] == []


def test_streams_keep_their_order(tmp_path: Path) -> None:
    """Also where the picture is not the first stream."""
    source = rich(tmp_path / "in.mkv", frames=5, attachments=[])
    turned = tmp_path / "turned.mkv"
    with av.open(str(source)) as a, av.open(str(turned), "w") as b:
        order = [*a.streams.audio, *a.streams.video]
        to = {s.index: b.add_stream_from_template(s, opaque=True) for s in order}
        for packet in a.demux(order):
            if packet.size:
                packet.stream = to[packet.stream.index]
                b.mux(packet)
    out = tmp_path / "out.mkv"
    run(turned, out)
    assert [s.kind for s in probe(out).streams] == ["audio", "audio", "video"]


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Nothing is queued for the other streams: the packets in hand stay a few."""
    source = synchronous(tmp_path / "in.mp4")
    decode = Decode(path=str(source))
    sink = Encode(path=str(tmp_path / "out.mp4"), preset="ultrafast")
    spec = decode.plan()
    sink.attach(decode)
    sink.plan(spec)
    passing = sink._passthrough
    assert passing is not None
    for frame in decode.frames():
        sink.write(frame)
        (route,) = passing.routes
        assert route.end_s is None or route.end_s < frame.time_s + 3 * AUDIO_FRAME_S
    sink.finish()
    sink.close()
