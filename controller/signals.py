"""The signals of the daemon: orders while it serves, nothing once it ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def handle_signals(*, stop: Callable[[], None], log_status: Callable[[], None]) -> None:
    """Obey SIGTERM, SIGINT and SIGUSR1 on the running loop; call it in the main thread.

    The loop knows only of SIGUSR1, which makes every signal wake it: when it is closed, it brings
    back the default of those that it knows, and the default of a stop is to kill.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, log_status)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda _number, _frame: loop.call_soon_threadsafe(stop))


def ignore_stops() -> None:
    """From here on the process ends by itself, whatever it is told meanwhile."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
