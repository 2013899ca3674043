"""A running filter: the graph of live stages, its figures and its controls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vidpipe.clock import Clock
from vidpipe.errors import Cancelled, InputError, OutputError, did_you_mean
from vidpipe.graph import Graph
from vidpipe.live.capture import Capture
from vidpipe.live.enhance import Enhance
from vidpipe.live.meter import Reading
from vidpipe.live.outputs import LiveSink
from vidpipe.live.page import Page, png
from vidpipe.pipeline import Pipeline, Report
from vidpipe.runner import StageReport

EVENTS_KEPT = 50


class Live:
    """Runs a live graph and answers for it.

        live = Live(graph)
        live.start()
        live.control({"tier": "clean-2x-nano"})
        print(live.state()["sinks"])
        report = live.stop()

    A filter is an enhance stage; a graph may have several, each with its own source. All
    methods may be called from any thread.

    Args:
        graph: live sources, enhance stages and live sinks, among any other stages.
        clock: source of all times.
        snapshots: folder for snapshots.

    Raises:
        VidpipeError: the graph is wrong.
    """

    def __init__(
        self, graph: Graph, *, clock: Clock | None = None, snapshots: Path | str = "."
    ) -> None:
        self.graph = graph
        self.pipeline = Pipeline(graph, capacity=1, clock=clock)
        self.clock = self.pipeline.clock
        self.snapshots = Path(snapshots)
        self.filters: dict[str, Enhance] = {}
        self.sources: dict[str, Capture] = {}
        self.sinks: dict[str, LiveSink] = {}
        self.pages: dict[str, Page] = {}
        self.listener: Callable[[dict[str, Any]], None] = lambda _event: None
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._noted = 0
        self._lock = threading.Lock()
        self._snapshot_bytes: dict[str, bytes] = {}
        for name in graph.nodes:
            actor = self.pipeline.actor(name)
            if isinstance(actor, Enhance):
                self.filters[name] = actor
                actor.notify = self._note
            elif isinstance(actor, Capture):
                self.sources[name] = actor
                actor.notify = self._note
            elif isinstance(actor, LiveSink):
                self.sinks[name] = actor
                actor.notify = self._note
                actor.measure(self.clock)
                if isinstance(actor, Page) and (owner := self._filter_before(name)):
                    self.pages[owner] = actor

    def _filter_before(self, name: str) -> str | None:
        node = self.graph.nodes[name]
        while node.source is not None:
            node = self.graph.nodes[node.source]
            if node.name in self.filters:
                return node.name
        return None

    def _note(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._noted += 1
            stamped = {
                "number": self._noted,
                "time_s": round(self.pipeline.elapsed_s(), 3),
                **event,
            }
            self._events.append(stamped)
        self.listener(stamped)

    def start(self) -> None:
        """Connect the sources, open everything and go.

        Raises:
            VidpipeError: a source is not there, or a stage cannot take its frames.
        """
        self.pipeline.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; return whether it has come. Keeps the governors' figures fresh."""
        ended = self.pipeline.wait(timeout_s)
        self.refresh()
        return ended

    def refresh(self) -> None:
        """Tell each governor what the sinks behind it take; call it a few times a second."""
        for name, stage in self.filters.items():
            own = [
                reading.own_p50_s
                for sink_name, sink in self.sinks.items()
                if sink.in_budget and self._filter_before(sink_name) == name
                for reading in (self._reading(sink),)
                if reading.own_p50_s is not None
            ]
            if stage.governor is not None:
                stage.governor.downstream_s = max(own, default=0.0)

    def _reading(self, sink: LiveSink) -> Reading:
        return sink.measure(self.clock).read()

    def stop(self, patience_s: float = 5.0) -> Report | None:
        """End the sources, let the sinks finish, and report.

        Args:
            patience_s: for sinks that are stalled; what they still hold is then dropped.

        Returns:
            The report, or None where a stalled sink had to be cut off.

        Raises:
            VidpipeError: the first error of any stage.
        """
        self.pipeline.stop()
        if not self.pipeline.wait(patience_s):
            self.pipeline.abort()
            self.pipeline.wait(patience_s)
        try:
            return self.pipeline.report()
        except Cancelled:
            return None

    def filter_named(self, name: str | None) -> str:
        """Return the name of a filter; None means the only one, or the first.

        Raises:
            InputError: there is none of that name.
        """
        if name is None and self.filters:
            return next(iter(self.filters))
        if name not in self.filters:
            raise InputError(
                f"no filter is called '{str(name)[:40]}'",
                hint=did_you_mean(str(name)[:40], [*self.filters]),
            )
        return str(name)

    def control(self, changes: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """Change controls of a filter; all of the changes or, if one is wrong, none.

        Args:
            changes: see `Settings`.
            name: of the filter; the first if not given.

        Returns:
            The settings now.

        Raises:
            InputError: the filter, a name or a value is wrong.
        """
        name = self.filter_named(name)
        stage = self.filters[name]
        settings = stage.controls.change(changes)
        self._note({"event": "control", "filter": name, **changes})
        return settings.to_dict()

    def snapshot(self, name: str | None = None) -> dict[str, str]:
        """Write the last picture before and after as PNG files.

        Returns:
            {"before": path, "after": path}. The pixels of `after` have no wipe in them.

        Raises:
            InputError: no such filter, or it has not seen a picture yet.
            OutputError: the files cannot be written.
        """
        name = self.filter_named(name)
        pair = self.filters[name].pair()
        if pair is None:
            raise InputError("there is no picture yet", hint="Try again in a moment")
        # Wall-clock time is for people who look for the file; nothing is measured with it.
        stamp = time.strftime("%Y%m%d-%H%M%S")
        paths = {}
        for which, frame in zip(("before", "after"), pair, strict=True):
            data = png(frame)
            self._snapshot_bytes[which] = data
            path = self._free_path(f"{name}-{stamp}-{which}")
            try:
                path.write_bytes(data)
            except OSError as error:
                raise OutputError(f"'{path}' cannot be written: {error.strerror}") from None
            paths[which] = str(path)
        self._note({"event": "snapshot", "filter": name, **paths})
        return paths

    def _free_path(self, stem: str) -> Path:
        path = self.snapshots / f"{stem}.png"
        number = 2
        while path.exists():
            path = self.snapshots / f"{stem}-{number}.png"
            number += 1
        return path

    def snapshot_bytes(self, which: str) -> bytes | None:
        """Return the last snapshot's PNG file, "before" or "after"."""
        return self._snapshot_bytes.get(which)

    def events(self) -> list[dict[str, Any]]:
        """Return the last events, oldest first."""
        with self._lock:
            return list(self._events)

    def state(self) -> dict[str, Any]:
        """Return all figures as JSON-compatible values; times in seconds or, `_ms`, thousandths."""
        progress = {s.name: s for s in self.pipeline.progress()}
        error = self.pipeline.error
        return {
            "elapsed_s": round(self.pipeline.elapsed_s(), 3),
            "error": None if error is None else str(error),
            "sources": {n: self._source(s, progress) for n, s in self.sources.items()},
            "filters": {n: self._filter(n, f, progress[n]) for n, f in self.filters.items()},
            "sinks": {n: self._sink(n, s, progress[n]) for n, s in self.sinks.items()},
        }

    def _source(self, source: Capture, progress: Mapping[str, StageReport]) -> dict[str, Any]:
        readers = {node.name for node in self.graph.readers(source.name)} - self.sinks.keys()
        # Where models run on a GPU, the pipeline's own transfer is the first reader.
        readers |= {
            name
            for name in progress.keys() - self.graph.nodes.keys()
            if name.startswith(f"{source.name}-to-")
        }
        entrance = sum(progress[name].dropped for name in readers)
        spec = self.pipeline.specs.get(source.name)
        return {
            "state": source.state,
            "reason": source.reason,
            "frames": source.frames_read,
            "drops": {
                "entrance": entrance + source.overwritten,
                **({"starting": source.early} if source.early else {}),
            },
            "repeated": source.repeated,
            "losses": source.losses,
            "spec": str(spec) if spec else None,
        }

    def _filter(self, name: str, stage: Enhance, progress: StageReport) -> dict[str, Any]:
        governor = stage.governor
        pair = stage.pair()
        return {
            **stage.controls.settings.to_dict(),
            "active": stage.controls.settings.enabled and stage.tier != stage.tiers[-1],
            "tiers": stage.tiers,
            "tier_now": stage.tier,
            "latency_budget_ms": round(stage.budget_s * 1000),
            "costs_ms": [round(c * 1000, 1) for c in (governor.costs_s if governor else [])],
            "frames": progress.frames_in,
            "provider": stage.provider(),
            "precision": stage.precision_now,
            "chosen": stage.chosen or None,
            "size": None if pair is None else str(pair[1].spec),
            "source": self.graph.root(name).name,
        }

    def _sink(self, name: str, sink: LiveSink, progress: StageReport) -> dict[str, Any]:
        reading = self._reading(sink)
        drops = dict(sink.drops)
        if progress.dropped:
            drops["behind"] = progress.dropped
        return {
            "use": progress.use,
            "filter": self._filter_before(name),
            "state": sink.state,
            "frames": reading.frames,
            "rate": round(reading.rate, 2),
            "p50_ms": _ms(reading.p50_s),
            "p95_ms": _ms(reading.p95_s),
            "p99_ms": _ms(reading.p99_s),
            "drops": drops,
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
