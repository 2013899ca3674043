"""Run one benchmark: python -m benchmarks NAME [--json]."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import benchmarks


def main() -> None:
    """Parse the command line, run the benchmark and print its figures."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name[0] != "_")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=names)
    parser.add_argument("--clip", type=Path, default=Path("samples/bigbuckbunny.mp4"))
    parser.add_argument("--model", default="clean-2x-nano")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over these")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    figures: dict[str, Any] = module.measure(arguments.clip, arguments.model, arguments.rounds)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print((module.__doc__ or "").splitlines()[0])
    for key, value in figures.items():
        print(f"  {key:28} {value:.4g}" if isinstance(value, float) else f"  {key:28} {value}")


if __name__ == "__main__":
    main()
