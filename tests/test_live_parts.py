"""Parts of the live filter that need no source, no model and no time."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidpipe.errors import InputError
from vidpipe.live.address import muxer_for, parse_source, without_secrets
from vidpipe.live.audio import CHANNELS, LAG_S, MOST_S, RATE, AudioHub, Chunk, Track
from vidpipe.live.capture import Backoff
from vidpipe.live.controls import Controls, Settings
from vidpipe.live.enhance import mix, wipe
from vidpipe.live.governor import Governor
from vidpipe.live.keys import NEXT, QUIT, SNAPSHOT, command_for
from vidpipe.live.meter import Meter, percentile
from vidpipe.live.reader import Timeline, source_error
from vidpipe.testing import ManualClock, pattern, spec


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_a_meter_looks_back_over_its_window_only() -> None:
    clock = ManualClock(100.0)
    meter = Meter(clock, window_s=2.0)
    assert meter.read().p99_s is None
    for _ in range(40):
        clock.advance(0.1)
        meter.add(clock.now_s() - 0.03, clock.now_s() - 0.01)
    reading = meter.read()
    assert reading.frames == 40
    assert reading.rate == pytest.approx(10)
    assert reading.p50_s == reading.p99_s == pytest.approx(0.03)
    assert reading.own_p50_s == pytest.approx(0.01)
    clock.advance(60)
    assert meter.read().p99_s is None
    assert meter.read().frames == 40


def test_a_meter_keeps_its_memory_flat() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    for _ in range(3 * Meter.MOST):
        meter.add(0.0)
    assert len(meter._samples) == Meter.MOST
    clock.advance(0.5 * meter.window_s)
    meter.add(0.0)
    clock.advance(0.5 * meter.window_s)
    meter.add(0.0)
    assert len(meter._samples) == 2


def run(governor: Governor, clock: ManualClock, cost_s: list[float], frames: int) -> list[str]:
    """Play frames at 30 a second through the governor's tier; return its steps as text."""
    steps = []
    for _ in range(frames):
        clock.advance(1 / 30)
        step = governor.observe(cost_s[governor.tier] + 0.005, cost_s[governor.tier])
        if step is not None:
            steps.append(f"{step.source}->{step.target}")
    return steps


def test_the_governor_begins_with_the_best_tier_that_should_fit() -> None:
    clock = ManualClock()
    assert Governor([0.2, 0.03, 0.01, 0.002], 0.05, clock).tier == 1
    assert Governor([0.2, 0.03, 0.01, 0.002], 0.5, clock, 1 / 100).tier == 2
    assert Governor([0.2, 0.1, 0.09, 0.08], 0.05, clock).tier == 3
    assert Governor([0.02, 0.01], 0.05, clock).tier == 0


def test_two_late_frames_step_down_and_one_does_not() -> None:
    clock = ManualClock()
    governor = Governor([0.02, 0.01, 0.001], 0.05, clock)
    assert governor.observe(0.2) is None
    assert run(governor, clock, [0.02, 0.01, 0.001], 119) == []
    assert governor.observe(0.2) is None  # the other late frame has left the window
    step = governor.observe(0.2)
    assert step is not None
    assert (step.source, step.target) == (0, 1)
    assert "200 ms" in step.reason
    assert governor.tier == 1


def test_the_governor_settles_under_overload_and_comes_back_when_there_is_room() -> None:
    clock = ManualClock()
    governor = Governor([0.02, 0.01, 0.001], 0.05, clock)
    heavy, light = [0.12, 0.06, 0.003], [0.02, 0.01, 0.001]
    assert run(governor, clock, heavy, 60) == ["0->1", "1->2"]
    assert governor.tier == 2
    steps = run(governor, clock, light, 30 * 60)
    assert steps[:2] == ["2->1", "1->0"]
    assert governor.tier == 0


def test_a_step_up_that_fails_is_tried_less_and_less_often() -> None:
    clock = ManualClock()
    governor = Governor([0.02, 0.001], 0.05, clock)
    steps = run(governor, clock, [0.08, 0.001], 30 * 600)
    ups = steps.count("1->0")
    assert 2 <= ups <= 16
    assert governor.hold_s > Governor.HOLD_S
    # Two late frames for each attempt, out of 18000.
    assert steps.count("0->1") >= ups


def test_a_tier_that_cannot_keep_the_rate_is_left_even_within_the_budget() -> None:
    clock = ManualClock()
    governor = Governor([0.02, 0.001], 0.5, clock)
    assert run(governor, clock, [0.06, 0.001], 30) == ["0->1"]


def test_what_the_sinks_take_counts() -> None:
    clock = ManualClock()
    governor = Governor([0.02, 0.001], 0.05, clock)
    governor.downstream_s = 0.04
    assert run(governor, clock, [0.02, 0.001], 2) == ["0->1"]


@given(st.lists(st.floats(0, 2), max_size=400), st.integers(1, 4))
def test_a_governor_never_leaves_its_tiers(latencies: list[float], tiers: int) -> None:
    clock = ManualClock()
    governor = Governor([0.04 / (t + 1) for t in range(tiers)], 0.05, clock)
    for latency in latencies:
        clock.advance(0.1)
        step = governor.observe(latency)
        assert 0 <= governor.tier < tiers
        if step is not None:
            assert abs(step.source - step.target) == 1
            assert governor.tier == step.target


def test_controls_apply_all_changes_or_none() -> None:
    controls = Controls(["a", "scale"])
    assert controls.change({"enabled": False, "wipe": 0.25, "tier": "a"}) == Settings(
        enabled=False, wipe=0.25, tier="a"
    )
    before = controls.settings
    with pytest.raises(InputError, match=r"strength is 1\.5, expected a number from 0 to 1"):
        controls.change({"enabled": True, "strength": 1.5})
    assert controls.settings == before
    assert controls.change({"wipe": None}).wipe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enabled": 1}, "expected true or false"),
        ({"frozen": "yes"}, "expected true or false"),
        ({"strength": True}, "from 0 to 1"),
        ({"strength": float("nan")}, "from 0 to 1"),
        ({"strength": None}, "from 0 to 1"),
        ({"wipe": -0.1}, "from 0 to 1"),
        ({"wipe": [1]}, "from 0 to 1"),
        ({"tier": "b"}, "Known: auto, a"),
        ({"tier": ["a"]}, "Known: auto, a"),
        ({"enabeld": True}, "Did you mean 'enabled'"),
        ({"x" * 5000: True}, r"no control is called 'x{36}\.\.\."),
    ],
)
def test_controls_refuse_what_they_do_not_know(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Controls(["a"]).change(changes)


def test_keys_mean_changes() -> None:
    tiers = ["a", "scale"]
    off = Settings()
    assert command_for(" ", off, tiers) == {"enabled": False}
    assert command_for("-", off, tiers) == {"strength": 0.95}
    assert command_for("+", off, tiers) == {"strength": 1.0}
    assert command_for("t", off, tiers) == {"tier": "a"}
    assert command_for("t", Settings(tier="scale"), tiers) == {"tier": "auto"}
    assert command_for("w", off, tiers) == {"wipe": 0.5}
    assert command_for("]", off, tiers) is None
    assert command_for("]", Settings(wipe=0.98), tiers) == {"wipe": 1.0}
    assert command_for("f", off, tiers) == {"frozen": True}
    assert [command_for(k, off, tiers) for k in "qsn"] == [QUIT, SNAPSHOT, NEXT]
    assert command_for("é", off, tiers) is None


def test_every_key_gives_changes_that_the_controls_take() -> None:
    controls = Controls(["a"])
    for key in " +=-tw[]f" * 30:
        command = command_for(key, controls.settings, controls.tiers)
        if command is not None:
            assert isinstance(command, dict)
            controls.change(command)


def test_a_wipe_shows_before_on_the_left_and_after_on_the_right() -> None:
    before = tuple(np.full_like(p, 10) for p in pattern(spec(64, 48)).planes)
    after = tuple(np.full_like(p, 200) for p in before)
    shown = wipe(before, after, 0.25)
    assert [p.shape for p in shown] == [p.shape for p in after]
    assert (shown[0][:, :15] == 10).all()
    assert (shown[0][:, 15:17] == 239).all()
    assert (shown[0][:, 17:] == 200).all()
    assert (shown[1][:, :8] == 10).all()
    assert (shown[1][:, 8:] == 200).all()
    assert (after[0] == 200).all()
    assert all((a == b).all() for a, b in zip(wipe(before, after, 0), after, strict=True))
    assert all((a == b).all() for a, b in zip(wipe(before, after, 1), before, strict=True))


@pytest.mark.parametrize("name", ["yuv420p", "nv12", "p010le", "gbrp16le"])
def test_mixing_is_exact_at_its_ends_and_linear_between(name: str) -> None:
    a, b = pattern(spec(name=name), 1).planes, pattern(spec(name=name), 2).planes
    for weight, expected in ((0.0, a), (1.0, b)):
        mixed = mix(a, b, weight)
        assert all((x == y).all() for x, y in zip(mixed, expected, strict=True))
    for x, y, z in zip(a, b, mix(a, b, 0.25), strict=True):
        assert z.dtype == x.dtype
        wanted = x.astype(float) + 0.25 * (y.astype(float) - x.astype(float))
        assert np.abs(z - wanted).max() <= 0.5


def test_a_lost_source_is_tried_every_second_at_last() -> None:
    backoff = Backoff()
    waits = [backoff.next() for _ in range(8)]
    assert waits == [0.125, 0.25, 0.5, 1, 1, 1, 1, 1]
    backoff.reset()
    assert backoff.next() == 0.125


def test_a_timeline_follows_the_source_and_starts_again_after_a_jump() -> None:
    clock = ManualClock(50.0)
    timeline = Timeline(clock, 40.0)
    assert timeline.map(1000.0) == pytest.approx(10.0)
    clock.advance(0.1)
    assert timeline.map(1000.04) == pytest.approx(10.04)  # late, but the source's clock counts
    assert timeline.peek(1000.0) == pytest.approx(10.0)
    clock.advance(0.1)
    assert timeline.map(5.0) == pytest.approx(10.2)
    clock.advance(0.04)
    assert timeline.map(5.04) == pytest.approx(10.24)


def test_the_backlog_of_a_connection_is_not_in_the_future() -> None:
    clock = ManualClock(50.0)
    timeline = Timeline(clock, 40.0)
    # Two seconds of pictures come at once: the last of them is now, not two seconds from now.
    assert [timeline.map(7 + n / 25) for n in range(51)] == pytest.approx([10.0] * 51)
    clock.advance(0.04)
    assert timeline.map(9.04) == pytest.approx(10.04)
    assert timeline.peek(9.0) == pytest.approx(10.0)


def chunk(time_s: float, seconds: float, value: float = 1.0) -> Chunk:
    return Chunk(time_s, np.full((CHANNELS, round(seconds * RATE)), value, np.float32))


def test_a_track_fills_gaps_cuts_overlaps_and_leaves_jitter_alone() -> None:
    track = Track(1.0)
    assert sum(p.shape[1] for p in track.add(chunk(0.9, 0.2))) == round(0.1 * RATE)
    assert track.end_s == pytest.approx(1.1)
    (part,) = track.add(chunk(1.11, 0.1))  # within the tolerance
    assert part.shape[1] == round(0.1 * RATE)
    quiet, loud = track.add(chunk(1.5, 0.1))
    assert not quiet.any()
    assert loud.all()
    assert track.end_s == pytest.approx(1.6)
    assert track.add(chunk(1.0, 0.1)) == []
    assert track.end_s == pytest.approx(1.6)


def test_the_first_sound_begins_exactly_where_it_belongs() -> None:
    track = Track(1.0)
    quiet, loud = track.add(chunk(1.015, 0.1))  # less than the tolerance
    assert quiet.shape[1] == round(0.015 * RATE)
    assert loud.shape[1] == round(0.1 * RATE)


def test_a_source_that_goes_quiet_is_silence() -> None:
    track = Track(0.0)
    track.add(chunk(0.0, 0.1))
    assert track.fill(0.5) == []
    (quiet,) = track.fill(5.0)
    assert not quiet.any()
    assert track.end_s == pytest.approx(5.0 - LAG_S)


@given(st.lists(st.tuples(st.floats(-1, 20), st.floats(0.001, 0.5)), max_size=60))
def test_a_track_is_never_far_from_its_timestamps(chunks: list[tuple[float, float]]) -> None:
    track = Track(0.0)
    for time_s, length_s in chunks:
        end_s = track.end_s
        track.add(chunk(time_s, length_s))
        assert track.end_s >= end_s
        if time_s + length_s > end_s + 0.05:
            assert abs(track.end_s - (time_s + length_s)) <= 0.021


def test_a_reader_that_takes_nothing_holds_ten_seconds_at_most() -> None:
    hub = AudioHub()
    lazy, keen = hub.subscribe(), hub.subscribe()
    for n in range(40):
        hub.put(chunk(0.5 * n, 0.5))
        assert len(keen.take(1e9)) == 1
    assert lazy.dropped_s == pytest.approx(20 - MOST_S)
    assert lazy.take(10.6)[0].time_s == pytest.approx(10)


@pytest.mark.parametrize(
    ("text", "platform", "url", "format"),
    [
        ("camera", "linux", "/dev/video0", "v4l2"),
        ("camera:2", "linux", "/dev/video2", "v4l2"),
        ("camera:/dev/v4l/by-id/x", "linux", "/dev/v4l/by-id/x", "v4l2"),
        ("camera:HD Webcam", "win32", "video=HD Webcam", "dshow"),
        ("camera:1", "darwin", "1:none", "avfoundation"),
        ("screen:640x480+10,20", "win32", "desktop", "gdigrab"),
        ("screen", "darwin", "Capture screen 0:none", "avfoundation"),
        ("v4l2:/dev/video7", "linux", "/dev/video7", "v4l2"),
        ("lavfi:testsrc2", "linux", "testsrc2", "lavfi"),
        ("rtsp://h/x", "linux", "rtsp://h/x", None),
        ("udp://127.0.0.1:5000", "linux", "udp://127.0.0.1:5000", None),
    ],
)
def test_addresses(text: str, platform: str, url: str, format: str | None) -> None:
    address = parse_source(text, platform=platform)
    assert (address.url, address.format) == (url, format)


@pytest.mark.parametrize(
    ("platform", "source", "options"),
    [
        ("linux", "camera", {"video_size": "640x360", "framerate": "25"}),
        ("win32", "camera:HD", {"video_size": "640x360", "framerate": "25", "rtbufsize": "64M"}),
        ("darwin", "camera", {"video_size": "640x360", "framerate": "25"}),
        ("linux", "v4l2:/dev/video3", {"video_size": "640x360", "framerate": "25"}),
        ("win32", "screen:320x200+5,6", {
            "video_size": "320x200", "framerate": "25", "offset_x": "5", "offset_y": "6",
        }),
    ],
)  # fmt: skip
def test_what_a_camera_or_screen_is_asked_for(
    platform: str, source: str, options: dict[str, str]
) -> None:
    assert parse_source(source, size="640x360", rate=25, platform=platform).options == options


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.EBUSY, "camera '/dev/video0' is busy", "Close the program that uses it"),
        (errno.ENOENT, "there is no camera '/dev/video0'", "plugged in"),
        (errno.ENODEV, "there is no camera '/dev/video0'", "plugged in"),
        (errno.EACCES, "no permission to use camera '/dev/video0'", "group 'video'"),
        (errno.EINVAL, "camera '/dev/video0' cannot be used: Invalid argument", None),
    ],
)
def test_why_a_camera_cannot_be_used(number: int, message: str, hint: str | None) -> None:
    failure = OSError(number, os.strerror(number))
    error = source_error(parse_source("camera", platform="linux"), failure)
    assert error.message == message
    assert (error.hint is None) if hint is None else (hint in str(error.hint))
    assert "\n" not in str(error)


def test_a_screen_has_a_display_and_an_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":7")
    address = parse_source("screen:640x480+10,20", rate=15, platform="linux")
    assert (address.url, address.format) == (":7+10,20", "x11grab")
    assert address.options == {"framerate": "15", "video_size": "640x480"}
    monkeypatch.delenv("DISPLAY")
    with pytest.raises(InputError, match="DISPLAY"):
        parse_source("screen", platform="linux")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch.mp4", "no file, URL, camera or screen"),
        ("srt://h:1", "'srt' is not a protocol"),
        ("screen:huge", "WIDTHxHEIGHT"),
    ],
)
def test_wrong_addresses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_source(text, platform="linux")


def test_a_camera_on_windows_needs_its_name() -> None:
    with pytest.raises(InputError, match="names on Windows"):
        parse_source("camera:0", platform="win32")


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
        parse_source("camera", size="big")


def test_an_output_needs_a_port_where_there_is_no_usual_one() -> None:
    with pytest.raises(InputError, match="names no port"):
        muxer_for("udp://127.0.0.1")
    with pytest.raises(InputError, match="is no port"):
        muxer_for("rtmp://me:secret@h:99999/live")


@pytest.mark.parametrize(
    ("url", "muxer"),
    [
        ("rtmp://h/live/key", "flv"),
        ("rtsp://h:8554/x", "rtsp"),
        ("udp://127.0.0.1:5000", "mpegts"),
        ("rtp://127.0.0.1:5000", "mpegts"),
        ("http://h:8080/x", "mpegts"),
    ],
)
def test_muxers(url: str, muxer: str) -> None:
    assert muxer_for(url) == muxer


@pytest.mark.parametrize("url", ["out.mp4", "srt://h:1", "rtmp:///live"])
def test_urls_that_cannot_be_streamed_to(url: str) -> None:
    with pytest.raises(InputError):
        muxer_for(url)


def test_messages_hold_no_passwords_and_no_stream_keys() -> None:
    assert without_secrets("rtsp://me:secret@h:554/cam") == "rtsp://h:554/cam"
    assert without_secrets("rtmp://h/live/secret") == "rtmp://h/live/..."
    assert without_secrets("/dev/video0") == "/dev/video0"


def test_a_gap_of_less_than_a_sample_is_no_part() -> None:
    track = Track(1.0)
    sound = np.ones((2, 480), np.float32)
    parts = track.add(Chunk(1.0 + 0.3 / RATE, sound))
    assert [p.shape[1] for p in parts] == [480]
    assert track.add(Chunk(0.5, sound)) == []
