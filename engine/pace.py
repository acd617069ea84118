"""How long a step takes but for its misses, and how many of these a token's time allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

# Without a target: a step waits for the link at most twice as long as it computes. Beyond that a
# further request costs the others more tokens than it draws.
DEFAULT_MULTIPLE: Final = 3.0
# With a target near a step, or below it: a step may wait for the link by so much of itself. Less
# would serve one request after the other, and meet such a target no more than that.
LEAST_SLACK: Final = 0.1
LEARNING_RATE: Final = 0.05
LEAST_SHARE: Final = 0.5  # of a step that is its own, whatever is said to have been missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """``step_s`` of decode steps without misses, averaged; None: none was seen. ``target_s`` of a
    token; None: a multiple of ``step_s``."""

    target_s: float | None = None
    step_s: float | None = None

    def note(self, seconds: float, *, miss_s: float) -> Pace:
        """After a step of decodes alone, whose misses take ``miss_s`` on the link. Some of that is
        hidden: the step's own time is between the two that can be told."""
        own_s = max(seconds - miss_s, LEAST_SHARE * seconds)
        if self.step_s is None:
            return replace(self, step_s=own_s)
        return replace(self, step_s=self.step_s + LEARNING_RATE * (own_s - self.step_s))

    @property
    def slack_s(self) -> float | None:
        """Time on the link that a step may take beyond its own; None: not known yet."""
        if self.step_s is None:
            return None
        target_s = self.target_s or DEFAULT_MULTIPLE * self.step_s
        return max(LEAST_SLACK * self.step_s, target_s - self.step_s)

    def slack_pages(self, *, bytes_per_s: float | None, page_bytes: int) -> float | None:
        """The same in pages of the link's rate, None where that is not known."""
        slack_s = self.slack_s
        if slack_s is None or not bytes_per_s:
            return None
        return slack_s * bytes_per_s / page_bytes
