"""Storage of variables: ZeRO and FSDP over all devices, or over those of a node (HSDP).

A rule says how all variables of an operator are stored, whatever its choice. A plan has a storage
per variable; `planned_rule` is the rule of an operator with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from partita.cost.operator_terms import OperatorTerms, StoredVariable
from partita.cost.reshard import Axes
from partita.plans.layout import label_sharding, spare_axes
from partita.plans.plan import Mesh, Plan


@dataclass(frozen=True)
class StorageRule:
    """How the variables of an operator are stored."""

    zero: int = 0
    """ZeRO level: 0, 1 or 3. In a step that is one program, ZeRO-2 is ZeRO-1."""
    outermost: int = 0
    """The outermost level of the machine over which variables are split (HSDP: the node's)."""
    planned: tuple[tuple[str, Axes], ...] = ()
    """(path, axes) of the variables of a plan, which replace the axes of the rule."""
    offload: bool = False
    """Whether optimizer slots are in the memory of the host."""
    planned_offload: frozenset[str] | None = None
    """Paths of the variables whose slots a plan offloads, which replace `offload`."""
    in_pieces: bool = False
    """Whether the program that slices a gradient is another one than the program that sums it."""

    def offloads(self, variable: StoredVariable) -> bool:
        """Whether the slots of a variable are in the memory of the host."""
        if self.planned_offload is not None:
            return variable.path in self.planned_offload
        return self.offload

    def axes(
        self,
        variable: StoredVariable,
        mesh: Mesh,
        assignment: Mapping[int, Axes],
    ) -> Axes:
        """The axes over which a variable is stored, beyond its operator's choice."""
        if not self.zero:
            return ()
        if self.planned:
            return dict(self.planned).get(variable.path, ())
        split = storage_axes(variable, mesh, assignment, self.outermost)
        return split[1] if split else ()


PLAIN = StorageRule()
"""Every device that computes with a variable stores it."""


def storage_axes(
    variable: StoredVariable,
    mesh: Mesh,
    assignment: Mapping[int, Axes],
    outermost: int = 0,
) -> tuple[int, Axes] | None:
    """(dim, axes) over which a parameter can be split for storage, beyond its operator's choice.

    The axes are of the level `outermost` and the levels inside it. None if no dim divides.
    """
    sharding = label_sharding(variable.label, assignment)
    return spare_axes(variable.shape, sharding, mesh, outermost)


def storage_rules(mesh: Mesh, within_nodes: bool, offload: bool = False) -> tuple[StorageRule, ...]:
    """The rules that a search tries: plain, ZeRO-1, ZeRO-3, and ZeRO-3 inside each inner level;
    with `offload` each with optimizer slots in the memory of the host too.
    """
    rules = [StorageRule(zero) for zero in (0, 1, 3)]
    levels = sorted({axis.level for axis in mesh.axes if axis.level >= 0})
    if within_nodes:
        rules += [StorageRule(3, level) for level in levels[1:]]
    if offload:
        rules += [replace(rule, offload=True) for rule in rules]
    return tuple(rules)


def planned_rule(terms: OperatorTerms, plan: Plan) -> StorageRule:
    """The rule of an operator under a plan."""
    offload = frozenset(v.path for v in terms.stored if v.path in plan.offload)
    planned_offload = offload or None
    stored = [v for v in terms.stored if v.path in plan.storage]
    if not stored:
        return StorageRule(planned_offload=planned_offload) if offload else PLAIN
    level = max(plan.storage[variable.path].zero for variable in stored)
    index = plan.mesh.index
    planned = []
    for variable in stored:
        names = plan.storage[variable.path].axes
        planned.append((variable.path, tuple(sorted(index[name] for name in names))))
    return StorageRule(
        1 if level == 2 else level, planned=tuple(planned), planned_offload=planned_offload
    )
