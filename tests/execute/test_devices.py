"""The CPU's settings: only where a CPU computes."""

import ctypes
import os

import jax
import pytest

from partita.execute.devices import (
    MMAP_MAX,
    computes_on_cpu,
    request_cpu_devices,
    return_freed_memory,
)


@pytest.fixture
def platforms(monkeypatch):
    """Sets JAX's list of platforms."""

    def use(names):
        monkeypatch.setattr(type(jax.config), "jax_platforms", names, raising=False)

    return use


@pytest.mark.parametrize(
    ("devices", "packages", "expected"),
    [
        ([], [], True),
        (["/dev/nvidia[0-9]*"], [], True),
        ([], ["jax_plugins"], True),
        (["/dev/nvidia[0-9]*"], ["jax_plugins"], False),
        (["/dev/vfio/[0-9]*"], ["libtpu"], False),
        (["/dev/vfio/[0-9]*"], ["jax_plugins"], True),
    ],
)
def test_an_accelerator_computes_if_it_is_there_and_jax_can_use_it(
    platforms, devices, packages, expected
):
    platforms(None)
    found = computes_on_cpu(
        files=lambda pattern: [pattern] if pattern in devices else [],
        is_installed=lambda package: package in packages,
    )
    assert found == expected


@pytest.mark.parametrize(("names", "expected"), [("cpu", True), ("cuda,cpu", False)])
def test_the_platform_that_jax_is_told_counts(platforms, names, expected):
    platforms(names)
    assert computes_on_cpu(files=lambda pattern: [pattern], is_installed=bool) == expected


@pytest.mark.parametrize(("names", "threads"), [("cpu", "1"), ("cuda,cpu", None)])
def test_only_a_cpu_that_computes_gets_one_thread(monkeypatch, platforms, names, threads):
    """XLA compiles for an accelerator with the threads of the CPU."""
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    platforms(names)
    request_cpu_devices(4)
    assert os.environ.get("NPROC") == threads


@pytest.mark.parametrize(
    ("peak", "capacity", "expected"), [(70, 100, False), (80, 100, True), (80, None, False)]
)
def test_a_plan_that_needs_most_of_the_memory_has_freed_blocks_returned(
    monkeypatch, peak, capacity, expected
):
    settings = {}

    class Library:
        def mallopt(self, parameter, value):
            settings[parameter] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert return_freed_memory(peak, capacity) == expected
    assert (MMAP_MAX in settings) == expected
