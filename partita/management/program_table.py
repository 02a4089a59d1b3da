"""Programs for states of the machine that may come: compiled now, or in a thread beside the
training.

The thread compiles one program after another, at the priority of the training: at a lower one it
would hold Python's lock while it waits for a core. Python's threads take turns more often
meanwhile, because a step takes the lock many times. On a CPU, XLA's threads share the cores with
the training, so `balance` judges no speeds meanwhile; this is free only where the host is idle.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

SWITCH_SECONDS = 5e-4
"""Longest time that the thread holds Python's lock while another one waits for it."""
USUAL_SWITCH_SECONDS = sys.getswitchinterval()
"""The same without such a thread."""


class EndedScriptError(Exception):
    """The script has ended while a thread worked for it."""


def check_script() -> None:
    """EndedScriptError once the script has ended, whose process waits for its threads."""
    if not threading.main_thread().is_alive():
        raise EndedScriptError


class ProgramTable:
    """Results of functions by key. They compile programs, or search plans."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Future[Any]] = {}
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._is_running = False

    @property
    def is_working(self) -> bool:
        """Whether the thread calls a function, or has one to call."""
        return self._is_running

    def make(self, key: Hashable, function: Callable[[], Any]) -> None:
        """Calls the function now."""
        result: Future[Any] = Future()
        result.set_result(function())
        self._results[key] = result

    def begin(self, key: Hashable, function: Callable[[], Any]) -> None:
        """Has the function called in the thread, after those that were begun before; nothing for a
        key that is there."""
        if key in self._results:
            return
        result: Future[Any] = Future()
        self._results[key] = result
        with self._lock:
            self._waiting.append((result, function))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._work).start()

    def is_done(self, key: Hashable) -> bool:
        """Whether `get` gives a result, or raises, at once."""
        return key in self._results and self._results[key].done()

    def get(self, key: Hashable) -> Any:
        """The result of a function, or the error that it raised.

        Waits for one that the thread is in. None for one that it has not reached, which is then
        forgotten, and for an unknown key.
        """
        result = self._results.get(key)
        if result is None or result.cancel():
            self._results.pop(key, None)
            return None
        return result.result()

    def keep(self, is_useful: Callable[[Any], bool]) -> None:
        """Forgets the results of other keys; the thread leaves their functions out."""
        for key in [key for key in self._results if not is_useful(key)]:
            self._results.pop(key).cancel()

    def _work(self) -> None:
        """Calls the waiting functions until none is left, or the script has ended."""
        sys.setswitchinterval(SWITCH_SECONDS)
        while True:
            with self._lock:
                if not self._waiting or not threading.main_thread().is_alive():
                    self._waiting.clear()
                    self._is_running = False
                    sys.setswitchinterval(USUAL_SWITCH_SECONDS)
                    return
                result, function = self._waiting.popleft()
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)
