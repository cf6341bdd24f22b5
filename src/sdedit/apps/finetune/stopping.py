"""Ctrl-C as a request: the step under way ends, and what was learned is saved."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self


class Stop:
    """From now on, Ctrl-C or a plain `kill` only makes this answer True; a second one stops at once.

    Used as a context, it gives the signals back at the end. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def __call__(self) -> bool:
        """Was a stop asked for?"""
        return self._asked.is_set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _ask(self, *_: Any) -> None:
        self._asked.set()
        self.__exit__()
