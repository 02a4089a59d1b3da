"""The devices at hand, as a Machine to plan for; and a CPU that stands for several of them.

Only what JAX and the operating system report is measured here: how many devices, of which kind, with how much memory. Rates
and links are those of the preset of that kind. A kind without a preset gets a generic accelerator, all of it assumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from partita.errors import MachineError
from partita.execute.processes import alone, group
from partita.machine import Machine, host, load, read

PRESETS = (
    (r"H200", "h200"),
    (r"H100", "h100"),
    (r"A100", "a100"),
    (r"V100", "v100"),
    (r"P100", "p100-cluster"),
    (r"K80", "k80-cluster"),
    (r"TPU v5 ?(e|lite)", "tpu-v5e"),
)
"""What JAX calls a kind of device, and the preset that describes it."""

GENERIC = """
name = "generic"
source = "a guess: Partita has no figures for this kind of device"
status = "assumed"
[device]
name = "accelerator"
overhead = "5 us"
[device.memory.main]
capacity = "16 GiB"
bandwidth = "1 TB/s"
efficiency = 0.8
shared_by = 1
[device.engine."*"]
"*" = { peak = "10 TFLOP/s", efficiency = 0.3 }
[device.engine.dot]
"*" = { peak = "20 TFLOP/s", efficiency = 0.5 }
[device.engine.conv]
"*" = { peak = "20 TFLOP/s", efficiency = 0.4 }
[level.node]
size = 1024
fabric = "switch"
latency = "5 us"
bandwidth = "25 GB/s"
shared_by = 1
[backend]
reduce_scatter = true
overlap = 0.0
promotes_16_bit_all_reduce = false
"""


def detect(devices: int | None = None) -> Machine:
    """The machine that JAX runs on here, or `devices` of its devices, with what was measured of it."""
    from partita.execute.calibrate import calibrated

    machine = at_hand(devices)
    return calibrated(machine, machine.devices)


def at_hand(devices: int | None = None) -> Machine:
    """The machine that JAX runs on here as it is before anything was measured."""
    found: list[Any] = jax.devices()
    count = len(found) if devices is None else devices
    if count > len(found):
        kind = found[0].platform.upper()
        more = f" Start with more: partita run --devices {count}, or call request_cpu_devices({count}) before JAX starts."
        raise MachineError(
            f"{count} devices are asked for, and JAX has {len(found)} ({kind}).{more if kind == 'CPU' else ' Ask for fewer.'}"
        )
    if found[0].platform == "cpu":
        if count > 1:
            keep_freed_memory()
        who = group()
        here = (
            count
            if os.environ.get("PARTITA_LAUNCHED")
            else jax.local_device_count() * (who.here if who is not None else 1)
        )
        machine = host(count, host_memory_bytes() * count // min(here, count))
        return (
            machine
            if alone()
            else replace(machine, backend=replace(machine.backend, combines=False))
        )
    return accelerator(
        found[0].device_kind, count, ((found[0].memory_stats() or {}).get("bytes_limit"))
    )


def accelerator(kind: str, count: int, memory_bytes: int | None) -> Machine:
    """The machine of `count` accelerators that JAX calls `kind`, with the memory that JAX says it may use."""
    preset = next(
        (name for pattern, name in PRESETS if re.search(pattern, kind, re.IGNORECASE)), None
    )
    if preset is None:
        machine = replace(read(GENERIC, "a generic machine"), name=f"{kind}:{count}").with_devices(
            count
        )
    elif preset.endswith("-cluster"):
        machine = load(preset).with_devices(count)
    else:
        machine = load(f"{preset}:{count}")
    if memory_bytes is None:
        return machine
    memory = machine.device.memories[0]
    where = f"device.memory.{memory.name}.capacity"
    return machine.revised(
        {where: memory_bytes * memory.shared_by}, f"what JAX may use of a {kind}"
    )


def host_memory_bytes() -> int:
    """Memory of this host in bytes, or of the control group that this process is in where that is less."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(path).strip()
        if text.isdigit():
            limits.append(int(text))
    total = re.search(r"MemTotal:\s*(\d+) kB", _text("/proc/meminfo"))
    limits.append(
        int(total[1]) * 1024 if total else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return min(limits)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def request_cpu_devices(count: int) -> None:
    """Makes JAX's CPU stand for `count` devices of one thread each; MachineError where JAX has already started with fewer.

    Call it before the first JAX computation. Where JAX runs on accelerators, this changes nothing about them.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        have = len(jax.devices("cpu"))
        if have < count:
            raise MachineError(
                f"JAX has already started with {have} CPU device{'s' if have > 1 else ''}, and {count} are needed. Ask before the "
                f"first computation, or start Python with XLA_FLAGS=--xla_force_host_platform_device_count={count} NPROC=1."
            ) from None
        return
    os.environ["NPROC"] = "1"  # XLA reads it when it starts: one thread per device


def keep_freed_memory() -> bool:
    """Lets the C library keep what XLA frees on a CPU, instead of giving it back to the system; whether it could be told.

    XLA allocates a step's temporary values as a whole at each step. glibc maps what is larger than 32 MiB anew every time, and the
    system then clears it page by page: up to a third of a training step (`docs/execute.md`). The settings are those of mallopt(3):
    no mapping, no trimming, one arena. Threads then wait for each other's small allocations, some 25 us of a step, so for a device alone
    nothing is changed. `PARTITA_RETURN_MEMORY=1` leaves the C library alone.
    """
    if os.environ.get("PARTITA_RETURN_MEMORY", "0") != "0":
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(arena_max, 1)])


def start_host_devices(count: int | None = None) -> None:
    """Before JAX starts: a CPU stands for `count` devices, else for as many as the environment says, else for one per core.

    Where JAX has started already, its devices are what there is.
    """
    if count != 1 or group() is not None:
        keep_freed_memory()
    said = getattr(
        jax.config, "jax_num_cpu_devices", -1
    ) != -1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count is not None:
        request_cpu_devices(count)
    elif not said:
        with contextlib.suppress(MachineError):
            request_cpu_devices(os.cpu_count() or 1)
