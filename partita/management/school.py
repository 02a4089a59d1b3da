"""Learned policies for a machine: trained on programs, saved and loaded as readable JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partita.errors import PlanError
from partita.files.checksums import sealed, with_checksum
from partita.files.reading import FileKind, read_json
from partita.files.schema import (
    FieldError,
    items,
    number,
    one_of,
    table,
    text,
    version,
    whole_number,
)
from partita.management.features import NAMES
from partita.management.hardware import Hardware
from partita.management.learning import dagger
from partita.management.program import Program
from partita.management.tree import LEAF, DecisionTree
from partita.management.workload import workload_of

VERSION = 1
MOST_NODES = 10**6
POLICY_FILE = FileKind(
    "a policy",
    "give a file that 'partita manage train --save' wrote",
    PlanError,
    by_hand=False,
)
_NODES = items(whole_number(LEAF, MOST_NODES), MOST_NODES, least=1)
_RANGE = items(number(), 2, least=2)
_POLICY = sealed(
    table(
        {
            "partita_policy": version(VERSION, "update Partita"),
            "machine": text(),
            "settings": whole_number(2),
            "programs": items(text()),
            "features": items(one_of(*NAMES), len(NAMES), least=len(NAMES)),
            "ranges": items(_RANGE, len(NAMES), least=len(NAMES)),
            "tree": table(
                {
                    "features": _NODES,
                    "thresholds": items(number(), MOST_NODES),
                    "left": _NODES,
                    "right": _NODES,
                    "labels": items(whole_number(0, MOST_NODES), MOST_NODES),
                    "shares": items(number(0, 1), MOST_NODES),
                }
            ),
        }
    )
)


@dataclass(frozen=True)
class LearnedPolicy:
    """A tree that imitates the oracle of a machine."""

    machine: str
    settings: int
    """Settings of the machine; the tree's labels are their numbers."""
    programs: tuple[str, ...]
    """Programs that it was trained on."""
    tree: DecisionTree
    ranges: tuple[tuple[float, float], ...]
    """[feature]: least and greatest value of the examples."""

    def check(self, hardware: Hardware) -> None:
        """PlanError unless it was trained for this machine."""
        name = hardware.machine.name
        reason = ""
        if self.machine != name:
            reason = f"not for '{name}'"
        elif self.settings != len(hardware.settings):
            reason = f"with {self.settings} settings instead of {len(hardware.settings)}"
        if reason:
            raise PlanError(
                f"The policy was trained for '{self.machine}', {reason}: train one with 'partita "
                f"manage train --machine {name} --save policy.json'."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "partita_policy": VERSION,
            "machine": self.machine,
            "settings": self.settings,
            "programs": list(self.programs),
            "features": list(NAMES),
            "ranges": [list(limits) for limits in self.ranges],
            "tree": {name: list(values) for name, values in asdict(self.tree).items()},
        }

    def to_text(self) -> str:
        """The JSON text with its checksum, a line per field."""
        return json.dumps(with_checksum(self.to_json()), indent=1)


def load_policy(path: str | Path) -> LearnedPolicy:
    """The policy of a file. PlanError names a wrong field."""
    value = read_json(path, POLICY_FILE, _POLICY)
    fields = value["tree"]
    tree = DecisionTree(**{name: tuple(values) for name, values in fields.items()})
    try:
        if tuple(value["features"]) != NAMES:
            raise FieldError("in another order", POLICY_FILE.fix).inside("features")
        _check_tree(tree, value["settings"])
    except FieldError as error:
        raise PlanError(f"{path}: {error}") from None
    return LearnedPolicy(
        value["machine"],
        value["settings"],
        tuple(value["programs"]),
        tree,
        tuple((low, high) for low, high in value["ranges"]),
    )


def _check_tree(tree: DecisionTree, settings: int) -> None:
    """FieldError unless every walk of the tree ends in a setting of the machine."""
    nodes = len(tree.features)
    fix = POLICY_FILE.fix
    if {len(values) for values in asdict(tree).values()} != {nodes}:
        raise FieldError("no tree: its lists have different lengths", fix).inside("tree")
    for node in range(nodes):
        if tree.labels[node] >= settings:
            raise FieldError("above the number of settings", fix).inside("labels").inside("tree")
        if tree.features[node] == LEAF:
            continue
        children = tree.left[node], tree.right[node]
        # Children follow their parents, so a walk ends.
        if tree.features[node] >= len(NAMES) or not all(node < c < nodes for c in children):
            raise FieldError(f"no tree at node {node}", fix).inside("tree")


def train_policy(hardware: Hardware, programs: Sequence[Program]) -> LearnedPolicy:
    """The imitation of the oracle on the hardware as described, by DAgger.

    PartitaError if scikit-learn is not installed.
    """
    workloads = [workload_of(program, hardware) for program in programs]
    result = dagger(workloads)
    return LearnedPolicy(
        hardware.machine.name,
        len(hardware.settings),
        tuple(program.name for program in programs),
        result.tree,
        result.ranges,
    )
