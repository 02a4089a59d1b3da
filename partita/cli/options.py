"""Options that commands share, and groups of options: frozen dataclasses that a command takes as
one parameter.

Typer reads a command's options from the parameters of its function. `command` lets a parameter be a
group, and shows Typer the options of the group in its place.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from partita.cli.terminal import errors, say
from partita.errors import PartitaError

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer's settings of a command that passes unknown options on to a script."""
_MODULE = "partita.module"
_AFTER_DASHES = "partita.after_dashes"
"""Keys of a context's `meta`: whether the script is a module, and the words after `--`."""
LIKELY_SLIP = 0.8
"""Similarity, between 0 and 1, from which an option of a script is pointed out as a slip."""
POSSIBLE_SLIP = 0.5


def command(
    app: typer.Typer, name: str | None = None, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that registers a function, whose parameters may be groups of options, as a
    command of an app."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name, **settings)(_with_flat_options(function))
        return function

    return register


def _with_flat_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options of its groups as parameters of their own."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters += _options_of(hint)
        else:
            parameters.append(
                parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(function)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            members = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**members)
        function(**values)

    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(flat)["__signature__"] = inspect.Signature(parameters)
    return flat


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


# ------------------------------------------------------------------------------------- the script


class ScriptCommand(TyperCommand):
    """A command whose argument is a script: a file, or after `-m` a module."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        dashes = args.index("--") if "--" in args else len(args)
        words = ["--manage=act" if word == "--manage" else word for word in args[:dashes]]
        ctx.meta[_AFTER_DASHES] = args[dashes + 1 :]
        position = self._position_of_m(words)
        ctx.meta[_MODULE] = position is not None
        if position is not None:
            del words[position]
        return super().parse_args(ctx, words + args[dashes:])

    def _position_of_m(self, words: list[str]) -> int | None:
        """Position of a `-m` before the script; a later one is the script's own."""
        takes_value = {
            name: not getattr(parameter, "is_flag", False)
            for parameter in self.params
            for name in parameter.opts
            if name.startswith("-")
        }
        position = 0
        while position < len(words) and words[position].startswith("-"):
            if words[position] == "-m":
                return position
            position += 2 if takes_value.get(words[position]) else 1
        return None


class SentenceGroup(TyperGroup):
    """A group of commands that answers a wrong number by one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            fix = _number_fix(error)
            if not fix or error.param is None:
                raise
            with errors():
                raise PartitaError(f"{error.param.opts[0]} is {fix}") from None


def _number_fix(error: typer.BadParameter) -> str:
    """The given word and the right numbers, "" for an error that is not of a number."""
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return ""
    detail = details()[0]
    kind = detail["type"]
    bounds = detail.get("ctx", {})
    right = {"int_parsing": "whole number", "float_parsing": "number"}.get(kind)
    if kind == "greater_than_equal":
        right = f"number of at least {bounds['ge']:g}"
    elif kind == "less_than_equal":
        right = f"number of at most {bounds['le']:g}"
    return f"{detail['input']}: give a {right}." if right else ""


def is_module(context: typer.Context) -> bool:
    """Whether the script is given as a module: `-m package.train`."""
    return bool(context.meta.get(_MODULE))


def _check_script(context: typer.Context, script: Path) -> Path:
    """The script; a usage error if an unknown option stands in its place."""
    word = str(script)
    if word == "-":
        raise typer.BadParameter(
            "'-' names no script. Write the script into a file, or give /dev/stdin."
        )
    if word.startswith("-"):
        near = _similar_option(context, word, POSSIBLE_SLIP)
        hint = f" Did you mean {near!r}?" if near else ""
        raise typer.BadParameter(
            f"there is no option {word!r}.{hint} Options for the script come after the script."
        )
    return script


def _similar_option(context: typer.Context, word: str, similarity: float) -> str:
    """The option of a command that is most similar to a word, or ""."""
    options = [name for parameter in context.command.params for name in parameter.opts]
    long_options = [name for name in options if name.startswith("--")]
    near = difflib.get_close_matches(word.partition("=")[0], long_options, 1, similarity)
    return near[0] if near else ""


def note_slips(context: typer.Context) -> None:
    """Points out options of the script that are nearly the command's own, unless they stand after
    `--`."""
    meant = Counter(context.meta.get(_AFTER_DASHES, ()))
    for word in context.args:
        if not word.startswith("--"):
            continue
        if meant[word]:
            meant[word] -= 1
            continue
        near = _similar_option(context, word, LIKELY_SLIP)
        if near:
            say(f"{word!r} is passed to the script. If you mean {near!r}, write that.")


# ---------------------------------------------------------------------------------------- options


Script = Annotated[
    Path,
    typer.Argument(
        help="A training script, or -m and a module; options not listed below go to it.",
        show_default=False,
        callback=_check_script,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(help="Number of devices.", min=1, show_default="all local devices"),
]
Processes = Annotated[
    int,
    typer.Option(help="Processes on this host, each with a share of its cores.", min=1),
]
Restarts = Annotated[int, typer.Option(help="Times to start again after a lost process.", min=0)]
Manage = Annotated[
    str | None,
    typer.Option(
        help="Answer lost and slow processes. 'ready': compiled before; 'watch': only told.",
        metavar="[=ready|watch]",
        show_default=False,
    ),
]
MeasureOperators = Annotated[
    bool,
    typer.Option(
        "--measure-operators",
        help="Time operators on the local devices first; the times are cached.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class Target:
    """The machine to plan for."""

    devices: Devices = None
    machine: Annotated[
        str | None,
        typer.Option(
            help="A machine that need not exist here: 'dgx-h100:8', 'h100:16', a .toml file.",
            show_default="this one",
        ),
    ] = None


@dataclass(frozen=True)
class PlanFiles:
    """Files that a plan is written to."""

    save_plan: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None
    report: Annotated[
        Path | None, typer.Option(help="Write a page about the plan to this .html file.")
    ] = None


@dataclass(frozen=True)
class Search:
    """How to search."""

    seconds: Annotated[
        float | None,
        typer.Option(help="Time limit of the search.", min=0, show_default="no limit"),
    ] = None
    search: Annotated[str, typer.Option(help="portfolio, elimination, mcmc or exhaustive.")] = (
        "portfolio"
    )
    stages: Annotated[
        bool | None,
        typer.Option(
            "--stages/--no-stages",
            help="Search pipelines, microbatches and rematerialization too.",
            show_default="with --machine",
        ),
    ] = None
    measure_operators: MeasureOperators = False


@dataclass(frozen=True)
class Pricing:
    """How to compare machines."""

    objective: Annotated[
        str, typer.Option(help="Order of machines: step, cost-per-epoch or joules.")
    ] = "step"
    price: Annotated[
        str,
        typer.Option(
            help="Price of a device for an hour, '2.5' or 'h100=2.5,a100=1.5'.",
            show_default="device hours are counted",
        ),
    ] = ""
    samples: Annotated[int, typer.Option(help="Samples of an epoch.", min=1)] = 1_000_000
