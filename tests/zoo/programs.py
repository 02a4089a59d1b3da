"""Small programs as people write them. Each takes `par`, which makes a model or a step parallel (or
not), and returns what it computed.

A program is registered with what it shows; its results are compared with those of the same program
on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Par = Callable[..., Any]


@dataclass(frozen=True)
class Program:
    """A program of the zoo.

    `sentence`: what is said instead of planning, where it is not planned; `tolerance` is relative.
    """

    name: str
    shows: str
    run: Callable[[Par], Any]
    sentence: str = ""
    tolerance: float = 2e-4


PROGRAMS: dict[str, Program] = {}


def program(
    shows: str, sentence: str = "", tolerance: float = 2e-4
) -> Callable[[Callable[[Par], Any]], Callable[[Par], Any]]:
    """Registers a function as a program of the zoo."""

    def register(run: Callable[[Par], Any]) -> Callable[[Par], Any]:
        name = run.__name__
        assert name not in PROGRAMS, name
        PROGRAMS[name] = Program(name, shows, run, sentence, tolerance)
        return run

    return register


def images(
    count: int = 26, size: int = 8, channels: int = 3, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.RandomState(0)
    return r.rand(count, size, size, channels).astype("float32"), r.randint(
        0, classes, count
    ).astype("int32")


def vectors(count: int = 26, width: int = 12, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.RandomState(1)
    return r.randn(count, width).astype("float32"), r.randint(0, classes, count).astype("int32")


def tokens(
    count: int = 26, length: int = 8, words: int = 24, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.RandomState(2)
    return r.randint(1, words, (count, length)).astype("int32"), r.randint(
        0, classes, count
    ).astype("int32")
