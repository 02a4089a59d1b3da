"""Files that commands write: checked before an hour's work, written after it, old ones kept till
then (`partita.files.writing`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from partita.errors import PlanError
from partita.files import writing
from partita.plans.plan import Plan
from partita.simulation.timeline import Timeline


def check_writable(script: Path | None = None, **files: Path | None) -> None:
    """PlanError if one of the files, given by its kind, cannot be written, or would replace another
    one or the script."""
    named = {"script": script, **files}
    kinds: dict[str, str] = {}
    for kind, path in named.items():
        if path is None:
            continue
        if kind != "script":
            _write(path, kind, lambda path=path: writing.check_writable(path))
        file = os.path.realpath(path)
        if file in kinds and not writing.is_special(path):
            raise PlanError(
                f"The {kind} would replace the {kinds[file]} in {str(path)!r}. Name another file."
            )
        kinds[file] = kind


def save_plan(plan: Plan, path: Path) -> None:
    """Writes a plan to a file."""
    _write(path, "plan", lambda: plan.save(path))


def save_model(model: Any, path: Path) -> None:
    """Writes a Keras model to a file."""

    def write() -> None:
        with writing.open_drafts(path) as drafts:
            model.save(drafts.path(path))

    _write(path, "model", write)


def save_text(text: str, path: Path, kind: str) -> None:
    """Writes a text to a file; `kind` names it in messages."""
    _write(path, kind, lambda: writing.write_text(path, text))


def save_page(
    path: Path,
    plan: Plan | None,
    timeline: Timeline | None,
    measured: Any = None,
    decisions: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the page of a plan with its simulated step, and the decisions of its training, to a
    file; without a plan, the page of the step alone."""
    from partita.report.html import page, timeline_page

    if plan is not None:
        text = page(plan, measured, timeline, decisions)
    else:
        assert timeline is not None, "a page shows a plan or a timeline"
        text = timeline_page(timeline)
    save_text(text, path, "report")


def _write(path: Path, kind: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        fix = "Name a file in a folder that exists and can be written."
        if error.errno in writing.FULL:
            fix = "The old file, if any, is as it was. Free space, or write to another disk."
        raise PlanError(
            f"The {kind} cannot be written to {str(path)!r}: {error.strerror}. {fix}"
        ) from None
