"""The local devices as a Machine to plan for, and a CPU as several virtual devices.

JAX and the operating system report the number of devices, their kind and their memory. Rates and
links are those of the preset of that kind. A kind without a preset gets a generic accelerator,
whose figures are all assumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec

import jax

from partita.errors import MachineError
from partita.execute import members
from partita.execute.process_group import group
from partita.execute.processes import alone
from partita.machine import Machine, host, load, read
from partita.machine.host_memory import host_memory_bytes

PRESETS = (
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100", "h100"),
    (r"A100", "a100"),
    (r"V100", "v100"),
    (r"P100", "p100-cluster"),
    (r"K80", "k80-cluster"),
    (r"TPU v5 ?(e|lite)", "tpu-v5e"),
    (r"TPU v5p?$", "tpu-v5p"),
    (r"TPU v6 ?(e|lite)", "tpu-v6e"),
)
"""(pattern of JAX's name for a kind of device, preset of that kind)."""

ACCELERATORS = (
    ("/dev/nvidia[0-9]*", "jax_plugins"),
    ("/dev/kfd", "jax_plugins"),
    ("/dev/accel[0-9]*", "libtpu"),
    ("/dev/vfio/[0-9]*", "libtpu"),
)
"""(device files of an accelerator, package that lets JAX use it). Plugins for NVIDIA and AMD GPUs
are modules of the namespace `jax_plugins`."""

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
float32 = { peak = "20 TFLOP/s", efficiency = 0.5 }
bfloat16 = { peak = "20 TFLOP/s", efficiency = 0.5 }
[device.engine.conv]
"*" = { peak = "20 TFLOP/s", efficiency = 0.4 }
float32 = { peak = "20 TFLOP/s", efficiency = 0.4 }
bfloat16 = { peak = "20 TFLOP/s", efficiency = 0.4 }
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


# Parameters of glibc's mallopt(3).
TRIM_THRESHOLD = -1
MMAP_MAX = -4
ARENA_MAX = -8
DEFAULT_MAPS, DEFAULT_TRIM_BYTES = 65536, 128 << 10
"""glibc's own values of the first two."""
KEPT_SHARE = 0.3
"""Memory in gaps between kept blocks, of the peak of a plan, at most (0.26 measured)."""


def detect(devices: int | None = None) -> Machine:
    """The machine that JAX runs on here, or `devices` of its devices, with its measured figures."""
    from partita.execute.calibrate import calibrated

    machine = at_hand(devices)
    return calibrated(machine, machine.devices)


def one_device_sentence() -> str:
    """A sentence if JAX has one device, with the way to more; "" if it has several."""
    devices = jax.devices()
    if len(devices) > 1:
        return ""
    if devices[0].platform == "cpu":
        return (
            "JAX has one device (CPU), so nothing is split. For four virtual devices: "
            "partita run --devices 4 train.py, or JAX_NUM_CPU_DEVICES=4 in the environment before "
            "JAX starts; in a notebook, write "
            'os.environ["JAX_NUM_CPU_DEVICES"] = "4" into the first cell and restart the kernel.'
        )
    return (
        f"JAX has one device ({devices[0].device_kind}), so nothing is split. Start on a machine "
        "with several, or plan for one: partita plan train.py --machine h100:8."
    )


def at_hand(devices: int | None = None) -> Machine:
    """The machine that JAX runs on here, or `devices` of its devices, without measured figures."""
    local_devices = members.devices()
    count = len(local_devices) if devices is None else devices
    first = local_devices[0]
    if count > len(local_devices):
        platform = first.platform.upper()
        fix = "Use fewer."
        if platform == "CPU":
            fix = (
                f"Start with more: partita run --devices {count}, "
                f"or call request_cpu_devices({count}) before JAX starts."
            )
        raise MachineError(
            f"Cannot use {count} devices: JAX has {len(local_devices)} ({platform}). {fix}"
        )
    if first.platform == "cpu":
        return _cpu(count)
    memory = first.memory_stats() or {}
    return accelerator(
        first.device_kind,
        count,
        memory.get("bytes_limit"),
    )


def _cpu(count: int) -> Machine:
    """This host as `count` virtual devices, over all processes."""
    if count > 1:
        keep_freed_memory()
    if os.environ.get("PARTITA_LAUNCHED"):
        devices_here = count
    else:
        membership = group()
        processes_here = membership.local_count if membership is not None else 1
        devices_here = jax.local_device_count() * processes_here
    machine = host(count, host_memory_bytes() * count // min(devices_here, count))
    if alone():
        return machine
    return replace(machine, backend=replace(machine.backend, combines=False))


def accelerator(
    kind: str,
    count: int,
    memory_bytes: int | None,
) -> Machine:
    """The machine of `count` accelerators of a kind, as JAX names it, with the memory that JAX may
    use.
    """
    preset = _preset_of(kind)
    if preset is None:
        generic = replace(read(GENERIC, "a generic machine"), name=f"{kind}:{count}")
        machine = generic.with_devices(count)
    elif preset.endswith("-cluster"):
        machine = load(preset).with_devices(count)
    else:
        machine = load(f"{preset}:{count}")
    if memory_bytes is None:
        return machine
    memory = machine.device.memories[0]
    capacity = f"device.memory.{memory.name}.capacity"
    source = f"what JAX may use of a {kind}"
    return machine.revised({capacity: memory_bytes * memory.shared_by}, source)


def _preset_of(kind: str) -> str | None:
    for pattern, preset in PRESETS:
        if re.search(pattern, kind, re.IGNORECASE):
            return preset
    return None


def _platforms() -> str | None:
    """The platforms that JAX was told to use, first choice first, with commas between."""
    return getattr(jax.config, "jax_platforms", None)


def absent_platform_sentence() -> str:
    """A sentence if JAX cannot start on the platforms that it was told to use; "" if it can, or was
    told none. It starts JAX.
    """
    platforms = _platforms()
    if not platforms:
        return ""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError for "cuda" without a GPU
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "there is no such device here"
        return (
            f"JAX cannot start with JAX_PLATFORMS={platforms}: {reason.rstrip('.')}. "
            "Unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu."
        )
    return ""


def computes_on_cpu(
    files: Callable[[str], list[str]] = glob.glob,
    is_installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> bool:
    """Whether JAX will compute on the CPU, told without starting JAX.

    It does where `jax_platforms` (or JAX_PLATFORMS) says so. Without a word it takes an accelerator
    that the system has and for which a package is installed.
    """
    platforms = _platforms()
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(files(pattern) and is_installed(package) for pattern, package in ACCELERATORS)


def skip_absent_gpus() -> None:
    """Keeps JAX from looking for GPUs on a machine that has the compiler for them and no GPU.

    It would fail and print a traceback.
    """
    plugins = find_spec("jax_plugins")
    if _platforms() or plugins is None or not plugins.submodule_search_locations:
        return
    names = [module.name for module in pkgutil.iter_modules(plugins.submodule_search_locations)]
    if all(name.startswith(("xla_cuda", "xla_rocm")) for name in names):
        jax.config.update("jax_platforms", "cpu")


def request_cpu_devices(count: int) -> None:
    """Makes JAX's CPU `count` virtual devices of one thread each. MachineError if JAX has started
    with fewer.

    Call it before the first JAX computation. Where an accelerator computes, the CPU keeps all its
    threads: XLA compiles with them (on an H100, with one thread the first epoch of a small network
    took 43 s, and 5 s with all).
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        started = len(jax.devices("cpu"))
        if started < count:
            devices = "device" if started == 1 else "devices"
            raise MachineError(
                f"JAX has already started with {started} CPU {devices}, and {count} are needed. "
                "Request them before the first computation, or start Python with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count} NPROC=1."
            ) from None
        return
    if computes_on_cpu():
        os.environ["NPROC"] = "1"  # XLA reads it when it starts: one thread per device


def keep_freed_memory() -> bool:
    """Lets the C library keep memory that XLA frees on a CPU, instead of returning it to the
    system; whether that worked.

    XLA allocates the temporary values of a step as one block in every step. glibc maps a block
    larger than 32 MiB anew each time, and the system then clears it page by page: up to a third of
    a training step (`docs/execute.md`). The settings are those of mallopt(3): no mapping, no
    trimming, one arena. Threads then wait for each other's small allocations, about 25 us of a
    step, so one device alone keeps its settings. `PARTITA_RETURN_MEMORY=1` leaves the C library
    alone.
    """
    if os.environ.get("PARTITA_RETURN_MEMORY", "0") != "0":
        return False
    return _set_allocation({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1})


def return_freed_memory(peak_bytes: int, capacity_bytes: int | None) -> bool:
    """Has memory that XLA frees on a CPU returned to the system again, if a plan needs it; whether
    that was done.

    Kept blocks of memory leave gaps that new ones do not fit, so a process takes more than the peak
    of its plan.
    """
    is_short = capacity_bytes is not None and peak_bytes * (1 + KEPT_SHARE) > capacity_bytes
    if not is_short or not computes_on_cpu():
        return False
    return _set_allocation({MMAP_MAX: DEFAULT_MAPS, TRIM_THRESHOLD: DEFAULT_TRIM_BYTES})


def _set_allocation(settings: Mapping[int, int]) -> bool:
    """Sets parameters of mallopt(3); whether all were accepted, False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all([mallopt(parameter, value) for parameter, value in settings.items()])


def start_host_devices(count: int | None = None) -> None:
    """Sets up virtual CPU devices before JAX starts: `count`, else the number that the environment
    sets, else one per core.

    If JAX has started already, its devices stay.
    """
    if computes_on_cpu():
        skip_absent_gpus()
        if count != 1 or group() is not None:
            keep_freed_memory()
    if count is not None:
        request_cpu_devices(count)
        return
    configured = getattr(jax.config, "jax_num_cpu_devices", -1) != -1
    flags = os.environ.get("XLA_FLAGS", "")
    if not configured and "host_platform_device_count" not in flags:
        with contextlib.suppress(MachineError):
            request_cpu_devices(os.cpu_count() or 1)
