"""The CPU's settings: only where a CPU computes."""

import os

import jax
import pytest

from partita.execute.devices import computes_on_cpu, request_cpu_devices


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
