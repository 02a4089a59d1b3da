"""Names of instructions, as JAX gives them: layer path and phase.

The name of a location is a path: `jit(train_step)/transpose(jvp(block/dense))/dot_general`.
Wrappers like `jvp(...)` say which transformation made the instruction, and so its phase.
"""

from __future__ import annotations

import re
from typing import Any

from jax.extend.mlir import ir

from partita.graph.operator_graph import Phase

MODULE_SCOPE = "torch:"
"""Begin of a scope that names a PyTorch module by its path. Scopes inside it are PyTorch's
functions, and left out."""
_NOISE = re.compile(
    r"^(jit|vmap|pmap|custom_jvp_call|custom_vjp_call|remat\d?|xla_call|cond|scan)(\(.*\))?$"
    r"|^(while|body|call_exported|closed_call|checkpoint|rematted_computation|branch_\d+_fun"
    r"|custom_jvp_call|custom_vjp_call|fori_loop.*)$|->"
    r"|^(static|dynamic)_sparsity_splash$|^splash_m[hq]a_"
)
_WRAPPER = re.compile(r"^(transpose|jvp|vmap|remat|checkpoint|linearize)\((.*)\)$")


def location_name(operation: Any) -> str:
    """The name that JAX gave an instruction, empty if it gave none.

    For example `jit(train_step)/jvp(conv1)/conv_general_dilated`.
    """
    location = operation.location
    return location.name_str if isinstance(location, ir.NameLoc) else ""


def split_name(name: str) -> list[str]:
    """The parts of a name between slashes that are not inside brackets."""
    parts = []
    depth = 0
    start = 0
    for position, letter in enumerate(name):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        elif letter == "/" and depth == 0:
            parts.append(name[start:position])
            start = position + 1
    return [*parts, name[start:]]


def layer_path(name: str) -> str:
    """The layer path in a name.

    Wrappers of transformations, jitted helpers and the primitive are left out.
    """
    path: list[str] = []
    for position, part in enumerate(split_name(name)[:-1]):
        while match := _WRAPPER.match(part):
            part = match.group(2)
        is_program = position == 0 and part.startswith("jit(")
        if part and not is_program and not _NOISE.search(part):
            path += [layer for layer in part.split("/") if layer]
    modules = [layer for layer in path if layer.startswith(MODULE_SCOPE)]
    if modules:
        return modules[-1].removeprefix(MODULE_SCOPE)
    return "/".join(path)


def phase_of(name: str) -> Phase:
    """The phase of an instruction with this name.

    JAX transposes the forward pass to get the backward pass.
    """
    if "transpose(" in name:
        return "backward"
    if "jvp(" in name:
        return "forward"
    return "update"
