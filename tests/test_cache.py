"""What is kept between runs: whole, checked, and shared by processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vidpipe.errors import ModelError, OutputError
from vidpipe.model.cache import Cache, cache_folder, key_of

FACTS = {"model": "abc", "size": [640, 360], "driver": "1"}


def build(folder: Path) -> None:
    (folder / "context.onnx").write_bytes(b"graph" * 100)
    (folder / "parts").mkdir()
    (folder / "parts" / "engine.bin").write_bytes(b"engine")


def refuse(folder: Path) -> None:
    raise AssertionError("must not be built")


def test_an_entry_is_built_once_and_then_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find("context", FACTS) is None
    first = cache.obtain("context", FACTS, build)
    second = cache.obtain("context", FACTS, refuse)
    assert (first.built, first.note, second.built) == (True, "", False)
    assert first.folder == second.folder == cache.find("context", FACTS)
    assert (second.folder / "parts" / "engine.bin").read_bytes() == b"engine"
    (entry,) = cache.entries()
    assert dict(entry.facts) == FACTS
    assert entry.bytes > 506


@pytest.mark.parametrize("change", [{"driver": "2"}, {"size": [640, 361]}, {"model": "abd"}])
def test_anything_that_matters_leads_elsewhere(tmp_path: Path, change: dict[str, object]) -> None:
    cache = Cache(tmp_path)
    cache.obtain("context", FACTS, build)
    assert cache.find("context", FACTS | change) is None
    assert key_of(dict(reversed(FACTS.items()))) == key_of(FACTS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "context.onnx").write_bytes(b"graph" * 99),
        lambda place: (place / "parts" / "engine.bin").unlink(),
        lambda place: (place / "entry.json").write_text("{"),
        lambda place: (place / "entry.json").unlink(),
        lambda place: (place / "entry.json").write_text(
            json.dumps({"format": 1, "facts": {"model": "other"}, "files": {}})
        ),
    ],
    ids=["changed", "missing", "cut short", "no manifest", "of something else"],
)
def test_a_damaged_entry_is_built_again_with_a_note(tmp_path: Path, damage: object) -> None:
    cache = Cache(tmp_path)
    place = cache.obtain("context", FACTS, build).folder
    damage(place)  # type: ignore[operator]
    assert cache.find("context", FACTS) is None
    again = cache.obtain("context", FACTS, build)
    assert again.built
    assert again.note.startswith("the cached context ")
    assert "\n" not in again.note
    assert cache.obtain("context", FACTS, refuse).folder == place


def test_nothing_is_kept_of_a_build_that_failed(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise ModelError("no")

    cache = Cache(tmp_path)
    with pytest.raises(ModelError):
        cache.obtain("context", FACTS, fail)
    assert cache.entries() == []
    assert [p.name for p in (tmp_path / "context").iterdir() if p.is_dir()] == []


def test_two_processes_at_once_build_it_once(tmp_path: Path) -> None:
    """The first builds for as long as the second has not tried."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from vidpipe.model.cache import Cache

        def build(folder):
            print("building", flush=True)
            sys.stdin.readline()
            (folder / "context.onnx").write_text("x" * 1000)

        print("ready", flush=True)
        kept = Cache(Path(sys.argv[1])).obtain("context", {"a": 1}, build)
        print(kept.built, len((kept.folder / "context.onnx").read_text()), flush=True)
        """
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    assert first.stdout.readline() == "building\n"
    second = start()
    assert second.stdout is not None
    assert second.stdout.readline() == "ready\n"
    out, _ = first.communicate("\n")
    assert out == "True 1000\n"
    out, _ = second.communicate("\n")
    assert out == "False 1000\n"


def test_a_process_that_dies_while_building_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vidpipe.model.cache import Cache\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text('x'); os._exit(9)\n"
        "Cache(Path(sys.argv[1])).obtain('context', {'a': 1}, build)\n"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == 9
    cache = Cache(tmp_path)
    assert cache.find("context", {"a": 1}) is None
    assert cache.obtain("context", {"a": 1}, build).built
    assert cache.clear() == (1, pytest.approx(1000, abs=999))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_values_are_kept_too(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.read("choice", FACTS) is None
    cache.write("choice", FACTS, {"device": "cpu", "ms": 1.5})
    assert cache.read("choice", FACTS) == {"device": "cpu", "ms": 1.5}
    cache.write("choice", FACTS, {"device": "cuda"})
    assert cache.read("choice", FACTS) == {"device": "cuda"}


def test_a_provider_may_fill_its_own_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.folder_for("runtime", FACTS)
    assert place is not None
    (place / "kernels.bin").write_bytes(b"1")
    assert cache.folder_for("runtime", FACTS) == place
    assert (place / "kernels.bin").read_bytes() == b"1"
    (tmp_path / "file").write_text("")
    assert Cache(tmp_path / "file").folder_for("runtime", FACTS) is None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    def large(folder: Path) -> None:
        (folder / "a").write_bytes(bytes(10_000))

    cache = Cache(tmp_path, limit_bytes=25_000)
    for i in range(2):
        place = cache.obtain("context", {"i": i}, large).folder
        os.utime(place / "entry.json", (1_000_000 + i, 1_000_000 + i))
    assert cache.find("context", {"i": 0}) is not None  # used again: now the newer one
    cache.obtain("context", {"i": 2}, large)
    assert {e.facts["i"] for e in cache.entries()} == {0, 2}


def test_clear_touches_only_what_was_made_here(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.obtain("context", FACTS, build)
    cache.write("choice", FACTS, 1)
    mine = tmp_path / "context" / "notes.txt"
    mine.write_text("mine")
    assert cache.clear("choice")[0] == 1
    assert [e.kind for e in cache.entries()] == ["context"]
    assert cache.clear()[0] == 1
    assert mine.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="VIDPIPE_CACHE"):
        Cache(tmp_path / "file").obtain("context", FACTS, build)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDPIPE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("VIDPIPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, expected in (
        ("linux", tmp_path / "x" / "vidpipe"),
        ("darwin", tmp_path / "Library" / "Caches" / "vidpipe"),
        ("win32", tmp_path / "local" / "vidpipe" / "Cache"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == expected
