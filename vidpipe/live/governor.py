"""Keeps a deadline by choosing among tiers, best first. Decides only; runs nothing."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from vidpipe.clock import Clock


@dataclass(frozen=True, slots=True)
class Step:
    """A change of tier.

    Attributes:
        source, target: indices of the tiers; a larger one is cheaper.
        reason: one line for people.
    """

    source: int
    target: int
    reason: str


class Governor:
    """Steps down when the 99th percentile misses the budget, and up again when there is room.

    A tier that takes longer for a frame than there is between two of them misses it as well:
    it would drop frames for ever.

    Over the last `WINDOW` frames p99 misses the budget as soon as two frames do, so an
    overload is met after two late frames, and a single hiccup changes nothing.

    A step up needs `hold_s` without a late frame, and a forecast within `ROOM` of the budget:
    today's p99, less what this tier costs, plus what the better one does. While the forecast
    says no, what is thought of the better tier's cost fades, so that it is tried in the end. A
    step up that has to be taken back doubles the wait for the next, up to `MOST_HOLD_S`.

    Args:
        costs_s: time of one frame in each tier, best tier first, as measured in the warm-up.
        budget_s: latency from capture to sink.
        clock: source of the waiting times.
        interval_s: time between two frames of the source; may be set as it is learnt.
    """

    WINDOW = 120
    ROOM = 0.8
    FADE = 0.8
    HOLD_S = 5.0
    MOST_HOLD_S = 60.0

    def __init__(
        self, costs_s: list[float], budget_s: float, clock: Clock, interval_s: float = 1 / 30
    ) -> None:
        self.costs_s = list(costs_s)
        self.budget_s = budget_s
        self.clock = clock
        self.downstream_s = 0.0
        self.interval_s = interval_s
        self.hold_s = self.HOLD_S
        self._latencies: deque[float] = deque(maxlen=self.WINDOW)
        self._missed: deque[bool] = deque(maxlen=self.WINDOW)
        self._calm_since_s = clock.now_s()
        self._stepped_up_s: float | None = None
        self.tier = self._first()

    def _first(self) -> int:
        for tier in range(len(self.costs_s)):
            if self._forecast(tier, 0.0) <= self.ROOM * self.budget_s:
                return tier
        return len(self.costs_s) - 1

    def _forecast(self, tier: int, others_s: float) -> float:
        cost_s = self.costs_s[tier]
        return others_s + cost_s if cost_s <= self.interval_s else math.inf

    def restart(self, tier: int) -> None:
        """Go on from a tier that somebody else chose."""
        self.tier = tier
        self._latencies.clear()
        self._missed.clear()
        self._calm_since_s = self.clock.now_s()

    def observe(self, latency_s: float, cost_s: float | None = None) -> Step | None:
        """Take one frame's figures.

        Args:
            latency_s: from its capture until it left the stage. `downstream_s` is added, so
                that the budget covers the sinks.
            cost_s: what the tier took for it, if it ran.

        Returns:
            The step to take before the next frame, or None.
        """
        now_s = self.clock.now_s()
        total_s = latency_s + self.downstream_s
        self._latencies.append(total_s)
        if cost_s is not None:
            # A tenth of each new value: follows the machine, not one frame.
            self.costs_s[self.tier] += 0.1 * (cost_s - self.costs_s[self.tier])
        slow = self.costs_s[self.tier] > self.interval_s
        self._missed.append(slow or total_s > self.budget_s)
        if self._missed[-1]:
            self._calm_since_s = now_s
            if sum(self._missed) > 0.01 * self.WINDOW and self.tier + 1 < len(self.costs_s):
                return self._down(total_s)
        elif self.tier > 0 and now_s - self._calm_since_s >= self.hold_s:
            return self._up(now_s)
        if self._stepped_up_s is not None and now_s - self._stepped_up_s > 2 * self.hold_s:
            self.hold_s, self._stepped_up_s = self.HOLD_S, None
        return None

    def _down(self, total_s: float) -> Step:
        if self._stepped_up_s is not None:
            self.hold_s = min(2 * self.hold_s, self.MOST_HOLD_S)
            self._stepped_up_s = None
        reason = f"latency {total_s * 1000:.0f} ms, budget {self.budget_s * 1000:.0f} ms"
        if total_s <= self.budget_s:
            cost_ms = self.costs_s[self.tier] * 1000
            reason = f"{cost_ms:.0f} ms a frame, and a frame every {self.interval_s * 1000:.0f} ms"
        step = Step(self.tier, self.tier + 1, reason)
        self.restart(self.tier + 1)
        return step

    def _up(self, now_s: float) -> Step | None:
        worst_s = sorted(self._latencies)[-2 if len(self._latencies) > 1 else -1]
        others_s = max(0.0, worst_s - self.costs_s[self.tier])
        forecast_s = self._forecast(self.tier - 1, others_s)
        self._calm_since_s = now_s  # look again after another wait, whatever comes out
        if forecast_s > self.ROOM * self.budget_s:
            # What a tier cost once says less and less about a machine that has calmed down.
            self.costs_s[self.tier - 1] *= self.FADE
            return None
        step = Step(
            self.tier,
            self.tier - 1,
            f"about {forecast_s * 1000:.0f} ms expected of the {self.budget_s * 1000:.0f} ms",
        )
        self.restart(self.tier - 1)
        self._stepped_up_s = now_s
        return step
