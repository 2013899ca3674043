"""Shared fixtures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_CLIPS = ROOT.parent / "shared" / "data" / "clips"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip device tests without a device, unless one is required."""
    if item.get_closest_marker("cuda") and os.environ.get("VIDPIPE_REQUIRE_CUDA") != "1":
        try:
            import cupy

            found = cupy.cuda.runtime.getDeviceCount() > 0
        except Exception:
            found = False
        if not found:
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests, and the processes that they start, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that repeats every pixel, so that its pictures are known."""
    import modelgen

    from vidpipe.model.stage import Model
    from vidpipe.testing import spec

    path = str(modelgen.nearest(tmp_path_factory.mktemp("models") / "doubler.onnx", 2))
    model = Model(model=path)  # ONNX Runtime opens files of its own at its first session
    model.plan(spec())
    model.open()
    model.close()
    return path


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail if a vidpipe thread or a file handle is left behind."""
    handles = _handles()
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("vidpipe-")]
    assert not left
    assert _handles() <= handles


def _handles() -> set[str]:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return set()
    found = set()
    for entry in folder.iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/dev", "/proc")):
            found.add(target)
    return found


@pytest.fixture(scope="session")
def sample() -> Path:
    """The short clip that comes with the project."""
    return ROOT / "samples" / "bigbuckbunny.mp4"
