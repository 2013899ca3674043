"""What is worth keeping from one run to the next: compiled contexts, and choices.

An entry is a folder, `KIND/KEY`, with the files that somebody built and `entry.json`: what it was
built from, and the hash of every file. KEY is a hash of what it was built from, so a new
driver or runtime looks elsewhere. An entry appears under its name by one rename, whole. Of two
processes that want the same one, the first builds it and the second waits. It is checked before
use, and what does not match its hashes is built again.

The folder is `$VIDPIPE_CACHE`, else the user's cache folder of the platform.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidpipe.errors import OutputError

LIMIT_BYTES = 4 << 30
"""Beyond this, the entries that were not used for the longest time go."""

_MANIFEST = "entry.json"
_FORMAT = 1
_UNFINISHED = ".new-"
_STALE_S = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something kept.

    Attributes:
        kind: what it is, such as "context".
        key: hash of `facts`.
        folder: where its files are.
        facts: what it was built from.
        bytes: size of its files.
        used_s: when it was last used, in seconds since 1970.
    """

    kind: str
    key: str
    folder: Path
    facts: Mapping[str, Any]
    bytes: int
    used_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-compatible values."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "folder": str(self.folder),
            "facts": dict(self.facts),
        }


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer of `Cache.obtain`.

    Attributes:
        folder: where the entry's files are.
        built: whether they were built just now.
        note: one line if there was an entry that could not be used, else "".
    """

    folder: Path
    built: bool
    note: str = ""


def cache_folder() -> Path:
    """Return the folder that everything is kept in; it need not exist."""
    asked = os.environ.get("VIDPIPE_CACHE")
    if asked:
        return Path(asked).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "vidpipe" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vidpipe"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vidpipe"


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the name of an entry: a hash of what it was built from, JSON-compatible values."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """A folder of entries.

    Args:
        folder: where; `cache_folder()` if not given. It is made when something is kept.
        limit_bytes: the most that it may hold.
    """

    def __init__(self, folder: Path | None = None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder or cache_folder()
        self.limit_bytes = limit_bytes

    def obtain(self, kind: str, facts: Mapping[str, Any], build: Callable[[Path], None]) -> Kept:
        """Return an entry, built if it is not there or is damaged.

        Args:
            kind: a name that fits a folder.
            facts: all that the entry depends on.
            build: is given an empty folder, in which it puts the files; what it raises goes
                to the caller, and nothing is kept.

        Raises:
            OutputError: the cache's folder cannot be written.
        """
        place = self._place(kind, facts)
        if self._problem(place) is None:
            self._touch(place)
            return Kept(place, False)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place.with_suffix(".lock")):
                return self._build(place, kind, facts, build)
        except OSError as error:
            raise OutputError(
                f"the cache '{self.folder}' cannot be written: {error.strerror or error}",
                hint="Set VIDPIPE_CACHE to a folder that can",
            ) from None

    def _build(
        self, place: Path, kind: str, facts: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Kept:
        problem, note = self._problem(place), ""
        if problem is None:  # another process was first
            return Kept(place, False)
        if place.exists():
            note = f"the cached {kind} {place.name} is not usable ({problem}); it is built again"
            self._remove(place)
        fresh = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=place.parent))
        try:
            build(fresh)
            _write_manifest(fresh, kind, facts)
            fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self._trim(keep=place)
        return Kept(place, True, note)

    def folder_for(self, kind: str, facts: Mapping[str, Any]) -> Path | None:
        """Return a folder that a provider fills, and checks, by itself.

        None if it cannot be made: a provider then works without.
        """
        place = self._place(kind, facts)
        if self._problem(place) is None:
            self._touch(place)
            return place
        try:
            return self.obtain(kind, facts, lambda _: None).folder
        except OutputError:
            return None

    def find(self, kind: str, facts: Mapping[str, Any]) -> Path | None:
        """Return the folder of an entry that is there and whole, or None."""
        place = self._place(kind, facts)
        if self._problem(place) is not None:
            return None
        self._touch(place)
        return place

    def read(self, kind: str, facts: Mapping[str, Any]) -> Any:
        """Return a JSON value that `write` kept, or None."""
        place = self.find(kind, facts)
        return None if place is None else json.loads((place / "value.json").read_text("utf-8"))

    def write(self, kind: str, facts: Mapping[str, Any], value: Any) -> None:
        """Keep a JSON value in place of what was kept for these facts.

        Raises:
            OutputError: the cache's folder cannot be written.
        """
        self._remove(self._place(kind, facts))

        def build(folder: Path) -> None:
            (folder / "value.json").write_text(json.dumps(value), "utf-8")

        self.obtain(kind, facts, build)

    def drop(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Delete an entry, if it is there."""
        self._remove(self._place(kind, facts))

    def entries(self) -> list[Entry]:
        """Return what is kept, the last used first; the files are not checked."""
        found = []
        for place in self.folder.glob(f"*/*/{_MANIFEST}"):
            try:
                manifest = json.loads(place.read_text("utf-8"))
                found.append(
                    Entry(
                        kind=place.parent.parent.name,
                        key=place.parent.name,
                        folder=place.parent,
                        facts=manifest["facts"],
                        bytes=sum(p.stat().st_size for p in place.parent.rglob("*") if p.is_file()),
                        used_s=place.stat().st_mtime,
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return sorted(found, key=lambda e: (-e.used_s, e.key))

    def clear(self, kind: str | None = None) -> tuple[int, int]:
        """Delete everything, or everything of a kind; return (entries, bytes).

        Only what this class made is touched.
        """
        gone = [e for e in self.entries() if kind in (None, e.kind)]
        for entry in gone:
            self._remove(entry.folder)
        for rest in self.folder.glob(f"{kind or '*'}/{_UNFINISHED}*"):
            shutil.rmtree(rest, ignore_errors=True)
        for rest in self.folder.glob(f"{kind or '*'}/*.lock"):
            with suppress(OSError):
                rest.unlink()
        return len(gone), sum(e.bytes for e in gone)

    def _place(self, kind: str, facts: Mapping[str, Any]) -> Path:
        return self.folder / kind / key_of(facts)

    def _problem(self, place: Path) -> str | None:
        """Say why an entry cannot be used; None if it can."""
        try:
            manifest = json.loads((place / _MANIFEST).read_text("utf-8"))
            if manifest["format"] != _FORMAT or key_of(manifest["facts"]) != place.name:
                return "it was made for something else"
            for name, expected in manifest["files"].items():
                if _hash(place / name) != expected:
                    return f"{name} was changed"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{_MANIFEST} cannot be read"
        return None

    def _touch(self, place: Path) -> None:
        with suppress(OSError):
            os.utime(place / _MANIFEST)

    def _remove(self, place: Path) -> None:
        """Delete an entry; it first leaves its name, so that nobody sees half of it."""
        with suppress(OSError):
            gone = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=place.parent))
            with suppress(OSError):
                place.rename(gone / "entry")
            shutil.rmtree(gone, ignore_errors=True)

    def _trim(self, keep: Path) -> None:
        """Delete the entries that were unused for longest, and what was never finished."""
        entries = self.entries()
        total = sum(e.bytes for e in entries)
        for entry in reversed(entries):
            if total <= self.limit_bytes:
                break
            if entry.folder != keep:
                self._remove(entry.folder)
                total -= entry.bytes
        for rest in self.folder.glob(f"*/{_UNFINISHED}*"):
            with suppress(OSError):
                now_s = (keep / _MANIFEST).stat().st_mtime
                if now_s - rest.stat().st_mtime > _STALE_S:
                    shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the operating system lets go of it when the process ends."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:  # gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:
                    continue
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_manifest(folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): _hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": _FORMAT, "kind": kind, "facts": dict(facts), "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
