"""What the daemon says while it works: plain lines on stderr, never a file of its own."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from sparsed.controller.control import KnobSource
from sparsed.controller.startup import StartPlan

CHATTY = ("uvicorn", "httpx", "httpcore", "alembic")

logger = logging.getLogger(__name__)


def log_to_stderr() -> None:
    """Send the logs of this process to stderr, other libraries' only from warnings up."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class ProgressLog:
    """Logs the progress of loading: every new phase, and at most a line a second of one. A part
    of 0 is not told, for not every phase knows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._logged_s = 0.0

    def __call__(self, phase: str, frac: float) -> None:
        now_s = self._clock()
        if phase != self._phase or now_s - self._logged_s >= 1.0:
            self._phase, self._logged_s = phase, now_s
            part = f", {100 * frac:.0f} %" if frac >= 0.005 else ""
            logger.info("%s%s", phase, part)


def log_plan(plan: StartPlan) -> None:
    """The model, the profile with its reason, and knobs that an earlier daemon was told."""
    logger.info("model: %s, %s on %s", plan.model_id, plan.spec.dtype, plan.spec.device)
    logger.info("profile: %s", plan.profile)
    if plan.spec.selection_trace:
        logger.warning(
            "selections of pages are replayed from %s: texts are not the model's own",
            plan.spec.selection_trace,
        )
    told = [name for name, source in plan.sources.items() if source is KnobSource.LIVE]
    if told:
        logger.info("set for this start while the last daemon ran: %s", ", ".join(told))
