"""What the package promises as a whole: its names, its imports, its layers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vidpipe
from vidpipe import errors

PACKAGE = Path(vidpipe.__file__).parent

LAYERS = [
    {"errors", "clock", "interrupts", "trace"},
    {"device"},
    {"frame"},
    {"function", "link", "providers", "stage", "transfer"},
    {"model", "media"},
    {"graph"},
    {"pipeline", "runner"},
    {"api", "compare", "decoders", "doctor", "live", "machine", "segments", "warm"},
    {"testing"},
    {"bench"},
    {"cli", "commands"},
]
"""Modules may import from earlier layers and from their own."""


def layer_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "cli"
    for number, names in enumerate(LAYERS):
        if part in names:
            return number
    raise AssertionError(f"module {module} is in no layer")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vidpipe."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("vidpipe.")}
    return found


def test_public_names() -> None:
    assert len(vidpipe.__all__) <= 15
    assert vidpipe.__all__ == sorted(vidpipe.__all__)
    for name in vidpipe.__all__:
        assert getattr(vidpipe, name).__doc__, name


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, vidpipe, vidpipe.cli; "
        "print([m for m in ('onnxruntime', 'onnx', 'av', 'cupy', 'torch', 'ray') "
        "if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if not p.name.startswith("__")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(("vidpipe", *path.relative_to(PACKAGE).with_suffix("").parts))
    for imported in imports_of(path):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"


def test_modules_stay_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 700, path


def test_every_error_has_the_exit_code_that_its_page_gives() -> None:
    table = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("exit code", "").split()
        if len(words) >= 2 and words[1].isdecimal():
            table[words[0]] = int(words[1])
        elif len(words) >= 3 and words[2].isdecimal():
            table[words[1]] = int(words[2])
    assert len(table) == 6
    for name, code in table.items():
        assert getattr(errors, name).exit_code == code, name
        for cls in getattr(errors, name).__subclasses__():
            if cls.__name__ not in table:
                assert cls.exit_code == code, cls


def test_versions_agree() -> None:
    import tomllib

    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        assert tomllib.loads(project.read_text())["project"]["version"] == vidpipe.__version__


def test_each_extra_brings_at_most_one_onnx_runtime() -> None:
    """They install the same module: two of them break each other."""
    import tomllib

    project = PACKAGE.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not in a source tree")
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    for name, lines in extras.items():
        packages = {line.split(";")[0].split("[")[0].split(">")[0].strip() for line in lines}
        runtimes = packages & {"onnxruntime", "onnxruntime-gpu", "onnxruntime-windowsml"}
        assert len(runtimes) <= 1, name


def test_nothing_is_reported_home(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry keeps a database under the user's cache folder when it is on."""
    code = "import numpy, vidpipe; vidpipe.Enhancer()(numpy.zeros((32, 32), numpy.uint8))"
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
