"""Names of policies in a command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from partita.errors import PlanError


def chosen_names(text: str, known: Sequence[str], kind: str) -> tuple[str, ...]:
    """The names of a list with commas; "all" names all known ones.

    kind: The noun of the policies, for the messages of PlanError about unknown names.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("all",):
        return tuple(known)
    use = f"use all, or some of {', '.join(known)}."
    if not names:
        raise PlanError(f"No {kind} is named: {use}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean '{near[0]}'? " if near else ""
            hint = f"{meant}{use[0].upper()}{use[1:]}" if meant else use
            raise PlanError(f"There is no {kind} '{name}': {hint}")
    return names
