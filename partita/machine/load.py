"""Reading machines: presets by name, descriptions in TOML by path, and the host this process runs on.

A description is tables of numbers. A number is `{ value = "900 GB/s", source = "datasheet", status = "recalled" }`, or
just its value where the table it stands in (or one around that) says `source` and `status` for all. What is wrong is
refused by name: file, line, key path, and what may stand there. docs/machines.md shows a whole description.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from partita.errors import MachineError, PartitaError
from partita.machine.check import Wrong, check, check_number, check_source, listed, one_of
from partita.machine.machine import (
    DTYPES,
    OP_CLASSES,
    Backend,
    Device,
    DeviceKind,
    Domain,
    Engine,
    Level,
    Machine,
    Memory,
    OperatingPoint,
    Source,
    number_fields,
    path_fields,
    slowest_kind,
)
from partita.units import EXAMPLES, format_bytes, parse

_NODES = {  # presets counted in nodes (the outermost level): the file that describes them
    "dgx-v100": "v100",
    "dgx-a100": "a100",
    "dgx-h100": "h100",
    "dgx-h200": "h200",
    "p100-cluster": "p100-cluster",
    "k80-cluster": "k80-cluster",
}
BOTH = "device and kind stand together: describe equal devices as [device], or every kind of them as [kind.NAME] with its count."
_ALL = ("p100-cluster", "k80-cluster")  # taken whole where no count is given; of all others one


def presets() -> tuple[str, ...]:
    """The names that `load` knows."""
    files = (file.name for file in resources.files("partita.machine").joinpath("presets").iterdir())
    return tuple(
        sorted({*(name.removesuffix(".toml") for name in files if name.endswith(".toml")), *_NODES})
    )


def load(name_or_path: str | Path) -> Machine:
    """The machine of a preset ("h100:64", "dgx-h100:8") or of a TOML file ("mine.toml").

    After the colon stands how many: nodes for the `dgx-*` and `*-cluster` presets, devices for the others. Without it
    one of them, or the whole of a `*-cluster`.
    """
    text = str(name_or_path)
    if text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            raise MachineError(
                f"There is no file '{text}'. Presets are written without .toml: {listed(presets())}."
            )
        return read(path.read_text(encoding="utf-8"), text)
    name, colon, count = text.partition(":")
    if name not in presets():
        near = difflib.get_close_matches(name.lower(), presets(), 1)
        meant = f"Did you mean '{near[0]}'? " if near else ""
        raise MachineError(
            f"There is no machine '{name}'. {meant}Presets are {listed(presets())}; "
            f"your own machine is a file that ends in .toml."
        )
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise MachineError(
            f"'{text}' asks for '{count}' of '{name}': write a number above 0, as in '{name}:8'."
        )
    whole = _preset(_NODES.get(name, name))
    if name in _ALL and not colon:
        return whole
    wanted = int(count or 1)
    node = whole.devices // whole.levels[0].size if name in _NODES else 1
    if wanted * node > whole.devices:
        what = "nodes" if name in _NODES else "devices"
        raise MachineError(
            f"'{text}' asks for {wanted} {what}, and '{name}' has {whole.devices // node}. "
            f"Ask for fewer, or describe a larger machine in a file."
        )
    return replace(whole, name=text).with_devices(wanted * node)


def host(devices: int, memory_bytes: int) -> Machine:
    """This kind of machine: a CPU that stands for `devices` devices, which share `memory_bytes` of memory in all.

    Its rates are assumed ones per core; measure the host and use `Machine.revised` for better ones.
    """
    most = _preset("host").devices
    if devices > most:
        raise MachineError(
            f"{devices} devices are asked for, and a CPU stands for at most {most}. Ask for fewer, or plan for a machine that has so many, as in "
            f"--machine h100:{devices}."
        )
    machine = replace(_preset("host"), name=f"host:{devices}").with_devices(devices)
    share = {"device.memory.dram.capacity": memory_bytes // devices}
    return machine.revised(
        share, f"an equal part of {format_bytes(memory_bytes)}, as given", "derived"
    )


@lru_cache
def _preset(name: str) -> Machine:
    text = (
        resources.files("partita.machine")
        .joinpath(f"presets/{name}.toml")
        .read_text(encoding="utf-8")
    )
    return read(text, f"presets/{name}.toml")


def read(text: str, file: str = "machine.toml") -> Machine:
    """The machine that a TOML description means; `file` names it in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MachineError(f"{file} is not TOML: {error}.") from None
    try:
        machine = _Reader().machine(table)
        check(machine)
    except Wrong as error:
        line = _line(text, error.path)
        raise MachineError(f"{file}{f', line {line}' if line else ''}: {error}") from None
    return machine


class _Reader:
    """Turns tables into the parts of a machine, collecting where each number comes from."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def machine(self, table: dict[str, Any]) -> Machine:
        _known("", table, ("name", "notes", "device", "kind", "level", "domain", "backend"))
        default = _origin(table, (None, None))
        if "name" not in table or ("device" in table) == ("kind" in table):
            lacks = [
                key
                for key in ("name", "device")
                if key not in table and (key == "name" or "kind" not in table)
            ]
            raise Wrong(
                "",
                f"{lacks[0]} is missing: a machine needs a name and a [device]." if lacks else BOTH,
            )
        kinds = tuple(
            self.device(DeviceKind, f"kind.{key}", given, default, key=key)
            for key, given in _table("kind", table.get("kind", {})).items()
        )
        if "kind" in table and not kinds:
            raise Wrong(
                "kind", "is empty: add [kind.NAME] for every kind of device, with its count."
            )
        return Machine(
            name=_string("name", table["name"]),
            notes=_string("notes", table.get("notes", "")),
            device=slowest_kind(kinds)
            if kinds
            else self.device(Device, "device", table["device"], default),
            kinds=kinds,
            levels=self.named(Level, "level", table.get("level", {}), default),
            domains=self.named(Domain, "domain", table.get("domain", {}), default),
            backend=self.part(Backend, "backend", table["backend"], default)
            if "backend" in table
            else Backend(),
            sources=tuple(sorted(self.sources, key=lambda known: known.path)),
        )

    def device(
        self, cls: type, path: str, table: Any, default: tuple[Any, Any], **given: Any
    ) -> Any:
        """A device, or a kind of them, with its memories and engines."""
        table = _table(path, table)
        inside = ("memory", "engine", "operating_point")
        _known(path, table, ("name", "overhead", *inside, *(("count",) if given else ())))
        inherited = _origin(table, default)
        parts = {
            "memories": self.named(Memory, f"{path}.memory", table.get("memory", {}), inherited),
            "engines": self.engines(f"{path}.engine", table.get("engine", {}), inherited),
            "points": self.named(
                OperatingPoint,
                f"{path}.operating_point",
                table.get("operating_point", {}),
                inherited,
            ),
        }
        return self.part(
            cls,
            path,
            {key: value for key, value in table.items() if key not in inside},
            default,
            **parts,
            **given,
        )

    def named(self, cls: type, path: str, tables: Any, default: tuple[Any, Any]) -> tuple[Any, ...]:
        tables = _table(path, tables)
        inherited = _origin(tables, default)
        return tuple(
            self.part(cls, f"{path}.{name}", table, inherited, name=name)
            for name, table in tables.items()
            if name not in ("source", "status")
        )

    def engines(self, where: str, tables: Any, default: tuple[Any, Any]) -> tuple[Engine, ...]:
        tables = _table(where, tables)
        found = []
        for op_class, table in tables.items():
            if op_class in ("source", "status"):
                continue
            path = f"{where}.{op_class}"
            one_of(path, "operator class", op_class, OP_CLASSES)
            table = _table(path, table)
            inherited = _origin(table, _origin(tables, default))
            for dtype, engine in table.items():
                if dtype in ("source", "status"):
                    continue
                one_of(f"{path}.{dtype}", "dtype", dtype, DTYPES)
                found.append(
                    self.part(
                        Engine, f"{path}.{dtype}", engine, inherited, op_class=op_class, dtype=dtype
                    )
                )
        return tuple(found)

    def part(self, cls: type, path: str, table: Any, default: tuple[Any, Any], **given: Any) -> Any:
        """One dataclass from one table; what `given` and the key path say is not looked for in the table."""
        table = _table(path, table)
        wanted = {
            field.name: field
            for field in fields(cls)
            if field.name not in (*given, *path_fields(cls))
        }
        _known(path, table, tuple(wanted))
        inherited = _origin(table, default)
        dimensions = dict(number_fields(cls))
        for name, field in wanted.items():
            if name in table:
                if name in dimensions:
                    given[name] = self.number(
                        f"{path}.{name}", table[name], dimensions[name], inherited
                    )
                elif isinstance(field.default, bool):
                    if not isinstance(table[name], bool):
                        raise Wrong(f"{path}.{name}", f"is {table[name]!r}: write true or false.")
                    given[name] = table[name]
                else:
                    given[name] = _string(f"{path}.{name}", table[name])
            elif field.default is MISSING or (name in dimensions and field.default is not None):
                raise Wrong(path, f"lacks {name}{_example(dimensions.get(name))}.")
        return cls(**given)

    def number(self, path: str, written: Any, dimension: str, default: tuple[Any, Any]) -> float:
        source, status = default
        if isinstance(written, dict):
            _known(path, written, ("value",))
            if "value" not in written:
                raise Wrong(path, f"lacks value{_example(dimension)}.")
            source, status = _origin(written, default)
            written = written["value"]
        value = _value(path, written, dimension)
        check_number(path, value, dimension)
        check_source(path, source, status)
        self.sources.append(Source(path, value, source, status))
        return value


def _value(path: str, written: Any, dimension: str) -> float:
    if dimension in ("count", "efficiency", "fraction"):
        whole = dimension == "count"
        if isinstance(written, bool) or not isinstance(written, int if whole else (int, float)):
            raise Wrong(
                path,
                f"is {written!r}: write a plain {'whole ' if whole else ''}number{_example(dimension)}.",
            )
        return written if whole else float(written)
    if not isinstance(written, str):
        raise Wrong(path, f"is {written!r}, without a unit{_example(dimension)}.")
    try:
        value = parse(written, dimension)
    except PartitaError as error:
        raise Wrong(path, f"is wrong: {error}") from None
    return int(value) if dimension == "B" else value


def _example(dimension: str | None) -> str:
    """How a number of a dimension is written; nothing for what is no number."""
    if dimension is None:
        return ""
    plain = {"count": "4", "efficiency": "0.8", "fraction": "0.5"}
    return f", for example {plain[dimension] if dimension in plain else repr(EXAMPLES[dimension])}".replace(
        "'", '"'
    )


def _known(path: str, table: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for key in table:
        if key not in (*allowed, "source", "status"):
            near = difflib.get_close_matches(key, allowed, 1)
            meant = f"did you mean '{near[0]}'? " if near else ""
            raise Wrong(
                f"{path}.{key}".lstrip("."),
                f"is not a key that Partita knows: {meant}Keys here are {listed((*allowed, 'source', 'status'))}.",
            )


def _origin(table: dict[str, Any], default: tuple[Any, Any]) -> tuple[Any, Any]:
    return table.get("source", default[0]), table.get("status", default[1])


def _table(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(path, f"is {value!r}: a table is needed, [{path}].")
    return value


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong(path, f"is {value!r}: write a text in quotes.")
    return value


def _line(text: str, path: str) -> int | None:
    """The line that says most of a key path: its key, else the header of its table."""
    wanted = path.split(".")
    header: list[str] = []
    best, line_found = 0, None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+([^\]=]+)\]+\s*(#.*)?$", line):
            header = here = _keys(match[1])
        elif match := re.match(r"\s*([\w.\"'*-]+)\s*=", line):
            here = [*header, *_keys(match[1])]
        else:
            continue
        shared = min(len(here), len(wanted))
        if best < shared and here[:shared] == wanted[:shared]:
            best, line_found = shared, number
    return line_found


def _keys(dotted: str) -> list[str]:
    return [key.strip().strip("\"'") for key in dotted.split(".")]
