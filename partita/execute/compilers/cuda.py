"""XLA:GPU with NVIDIA's libraries, a plugin of JAX: GPUs from the V100 on.

The compiler reads the figures of a card from a text. It has no card to try kernels on, so
autotuning is off. Products go to cuBLAS: the autotuner of a real card mostly chooses it, while the
Triton kernel that stands in without tuning is rarely chosen.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from partita.errors import CompilerError
from partita.execute.compilers.base import CompileTarget, ProgramCompiler
from partita.machine import Machine


@dataclass(frozen=True)
class Card:
    """The figures of a GPU that decide how XLA compiles for it."""

    name: str
    """As CUDA names it."""
    capability: tuple[int, int]
    """CUDA's compute capability."""
    cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    """Bytes."""
    shared_per_core: int
    """Shared memory of a streaming multiprocessor, bytes."""
    shared_per_block: int
    """Shared memory that a block may ask for, bytes."""
    bandwidth: int
    """Of the memory, bytes per second."""


# As CUDA reports them; XLA has the same figures in xla/backends/gpu/target_config/specs.
CARDS = {
    "V100": Card("Tesla V100-SXM2-32GB", (7, 0), 80, 64, 1.53, 6291456, 98304, 98304, 898048000000),
    "A100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 41943040, 167936, 166912, 2039040000000
    ),
    "H100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 52428800, 233472, 232448, 3352320000000
    ),
    "H200": Card(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98, 52428800, 233472, 232448, 4800000000000
    ),
    "B200": Card("NVIDIA B200", (10, 0), 148, 128, 1.965, 132644864, 233472, 232448, 7672320000000),
}
"""Part of the name of a machine's device -> the card."""
CUDA = (12, 9, 0)
"""The version of CUDA that the card is said to have."""
CUDNN = (9, 10, 0)
OLD = r"P100|K80|GTX|Tesla [PKM]\d"
"""Names of cards that today's compilers have left behind."""
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


class CudaCompiler(ProgramCompiler):
    """XLA:GPU for NVIDIA's cards."""

    platform = "cuda"
    name = "XLA:GPU"
    extra = "compile-gpu"
    module = "jax_plugins"
    packages = (*PLUGINS, "nvidia-cudnn-cu12", "nvidia-cublas-cu12")
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

    def target(self, machine: Machine) -> CompileTarget:
        """The cards of a machine, in nodes of its innermost level."""
        card = card_of(machine)
        per_node = machine.levels[-1].size if machine.levels else machine.devices
        nodes = machine.devices // per_node
        return CompileTarget(
            self.platform,
            machine.devices,
            card.name,
            f"1x{nodes}x{per_node}",
            config_of(card, machine.memory_bytes),
        )

    def environment(self, target: CompileTarget) -> dict[str, str]:
        """No look at the driver of this host."""
        return {**super().environment(target), "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

    def devices(self, target: CompileTarget) -> Sequence[Any]:
        """The cards, in an order of nodes."""
        from jax.experimental import topologies

        return topologies.get_topology_desc(
            "", "cuda", target_config=target.config, topology=target.topology
        ).devices

    def check(self) -> None:
        """The plugin must be there, of JAX's own version."""
        for plugin in PLUGINS:
            try:
                plugin_version = version(plugin)
            except PackageNotFoundError:
                continue
            if plugin_version != version("jaxlib"):
                raise CompilerError(
                    f"{self.name} is of JAX {plugin_version} and JAX is {version('jaxlib')}: "
                    f"pip install {plugin}=={version('jaxlib')}."
                )
            module = plugin.replace("-", "_")
            if importlib.util.find_spec(module) is not None:
                return
        raise CompilerError(f"{self.name} is not installed: pip install 'partita[{self.extra}]'.")


def card_of(machine: Machine) -> Card:
    """The card of a machine's devices. CompilerError for one that XLA:GPU does not know."""
    name = machine.device.name
    for part, card in CARDS.items():
        if re.search(rf"\b{part}\b", name, re.IGNORECASE):
            return card
    known = ", ".join(CARDS)
    if re.search(OLD, name, re.IGNORECASE):
        raise CompilerError(
            f"There is no compiler any more for '{name}': its CUDA generation is older than "
            f"XLA:GPU's oldest. Partita compiles for {known}."
        )
    raise CompilerError(f"XLA:GPU has no figures for '{name}'. Partita compiles for {known}.")


def config_of(card: Card, memory_bytes: int) -> str:
    """A card's figures as XLA reads them, a GpuTargetConfigProto in text."""
    major, minor = card.capability
    cudnn = CUDNN
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {card.shared_per_core}
  shared_memory_per_block_optin: {card.shared_per_block}
  core_count: {card.cores}  fpus_per_core: {card.fpus_per_core}  clock_rate_ghz: {card.clock_ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth}  l2_cache_size: {card.l2_cache}
  device_memory_size: {memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} patch: {CUDA[2]} }}
device_description_str: "{card.name}"
"""
