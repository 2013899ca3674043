"""`vidpipe devices` and `vidpipe doctor`: parsing and printing only."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vidpipe.errors import DeviceError

if TYPE_CHECKING:
    from vidpipe.machine import Facts, Gpu, ProviderState

out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def devices(as_json: AsJson = False) -> None:
    """List the processors, what they decode and encode, and what can run models on them."""
    from vidpipe.machine import gather

    facts = gather()
    if as_json:
        _say(json.dumps(listing(facts)))
        return
    for line in lines(facts):
        _say(line)


def doctor(as_json: AsJson = False) -> None:
    """Look for what is wrong with the environment, and say how to mend it.

    Exits with 3 if something keeps models from running as they should.
    """
    from vidpipe.doctor import examine
    from vidpipe.machine import gather

    facts = gather()
    findings = examine(facts)
    broken = any(finding.level == "error" for finding in findings)
    if as_json:
        found = [asdict(finding) for finding in findings]
        _say(json.dumps({"findings": found, "facts": facts.to_dict()}))
    else:
        for finding in findings:
            style = "red" if finding.level == "error" else "yellow"
            _say(f"{finding.level}: {finding.message}", style)
            _say(f"  {finding.mend}")
        if not findings:
            usable = ", ".join(p.name for p in facts.providers if p.devices)
            _say(f"nothing is wrong; models can run on: {usable}")
    raise typer.Exit(DeviceError.exit_code if broken else 0)


def listing(facts: Facts) -> dict[str, Any]:
    """Return what `vidpipe devices --json` prints."""
    cpu = {
        "device": "cpu",
        "name": facts.processor,
        "cores": facts.cores,
        "memory_bytes": facts.memory_bytes,
        "codecs": sorted(facts.codecs),
        "providers": [p.name for p in _serving(facts, None)],
    }
    gpus = [
        {
            "device": f"cuda:{gpu.index}",
            **asdict(gpu),
            "driver": facts.driver,
            "providers": [p.name for p in _serving(facts, gpu)],
        }
        for gpu in facts.gpus
    ]
    return {
        "devices": [cpu, *gpus],
        "cards": list(facts.cards),
        "runtime": f"onnxruntime {facts.runtime}" if facts.runtime else None,
        "providers": [asdict(state) for state in facts.providers],
    }


def lines(facts: Facts) -> list[str]:
    """Return what `vidpipe devices` prints."""
    found = [f"{facts.processor}, {facts.cores} cores, {facts.memory_bytes / 2**30:.1f} GiB"]
    found += [_provider_line(state, facts) for state in _serving(facts, None)]
    for gpu in facts.gpus:
        found.append(
            f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB ({gpu.free_bytes / 2**30:.1f} free), "
            f"compute capability {gpu.capability[0]}.{gpu.capability[1]}, driver {facts.driver}"
        )
        found.append(f"  decodes {', '.join(gpu.decoders) or 'nothing'}")
        found.append(f"  encodes {', '.join(gpu.encoders) or 'nothing'}")
        found += [_provider_line(state, facts, gpu.index) for state in _serving(facts, gpu)]
    found += [f"{card}: reached through openvino, webgpu or directml" for card in facts.cards]
    missing = [state for state in facts.providers if not state.devices and state.here]
    if missing:
        found.append("not usable here")
    for state in missing:
        found.append(f"  --device {state.name:9} {state.title}: {state.problem}")
        if not state.installed or "has no" in state.problem:
            found.append(f"  {'':18} {state.install}")
    return found


def _serving(facts: Facts, gpu: Gpu | None) -> list[ProviderState]:
    """Return the usable providers of an NVIDIA GPU, or else those of the rest."""
    memory = "cpu" if gpu is None else "cuda"
    return [s for s in facts.providers if s.devices and s.memory == memory]


def _provider_line(state: ProviderState, facts: Facts, index: int = 0) -> str:
    kinds = "" if state.devices in (("cpu",), ("gpu",)) else f" on {', '.join(state.devices)}"
    version = f" {facts.runtime}" if state.name == "cpu" else ""
    names = {"cpu": "CPUExecutionProvider, ONNX Runtime"}
    device = f"{state.name}:{index}" if index else state.name
    return f"  --device {device:9} {names.get(state.name, state.title)}{version}{kinds}"


def _say(text: str, style: str = "") -> None:
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
