"""Machines by name or file: presets, descriptions in TOML, and this host.

A description is tables of numbers. A number is `{ value = "900 GB/s", source = "datasheet",
status = "recalled" }`, or only its value where its table, or a table around that, gives `source`
and `status` for all. Errors give the file, the line, the key path, and the allowed values.
docs/machines.md shows a whole description.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import MISSING, Field, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from partita.errors import MachineError, PartitaError
from partita.files.reading import FileKind, parse_toml, read_text
from partita.files.schema import LONGEST_TEXT, shown
from partita.machine.check import (
    DescriptionError,
    check,
    check_number,
    check_source,
    did_you_mean,
    listed,
    one_of,
)
from partita.machine.machine import Machine
from partita.machine.parts import (
    DTYPES,
    OP_CLASSES,
    PLAIN_DIMENSIONS,
    Attached,
    Backend,
    Device,
    DeviceKind,
    Domain,
    DomainPoint,
    Engine,
    Grid,
    Leakage,
    Level,
    Memory,
    OperatingPoint,
    Source,
    Thermal,
    Trip,
    Value,
    list_depth,
    number_fields,
    path_fields,
    slowest_kind,
)
from partita.units import EXAMPLES, format_bytes, parse

_NODE_PRESETS = {
    "dgx-v100": "v100",
    "dgx-a100": "a100",
    "dgx-h100": "h100",
    "dgx-h200": "h200",
    "dgx-b200": "b200",
    "p100-cluster": "p100-cluster",
    "k80-cluster": "k80-cluster",
    "k80-flat": "k80-flat",
}
"""Presets counted in nodes (the outermost level) -> the file with their description."""
_WHOLE_PRESETS = (
    "p100-cluster",
    "k80-cluster",
    "k80-flat",
    "odroid-xu3",
    "rk3399",
    "rk3588",
    "manycore-64",
)
"""Presets that are whole without a count. Without a count, all others are one device or node."""
_SECTIONS = (
    "name",
    "notes",
    "device",
    "kind",
    "level",
    "domain",
    "backend",
    "thermal",
    "grid",
    "attached",
)
"""Keys of a whole description."""
MACHINE_FILE = FileKind(
    "a machine",
    "write it as docs/machines.md shows",
    MachineError,
    most_bytes=2**24,
)
_ORIGIN_KEYS = ("source", "status")
MOST_COUNT = 2**62
"""The largest whole number of a description (`endurance_writes`)."""
_PLAIN_EXAMPLES = {"count": "4", "efficiency": "0.8", "fraction": "0.5", "number": "0.25"}
"""Examples of numbers without a unit, by dimension."""


def presets() -> tuple[str, ...]:
    """The names that `load` knows."""
    names = set(_NODE_PRESETS)
    for file in resources.files("partita.machine").joinpath("presets").iterdir():
        if file.name.endswith(".toml"):
            names.add(file.name.removesuffix(".toml"))
    return tuple(sorted(names))


def load(name_or_path: str | Path) -> Machine:
    """The machine of a preset ("h100:64", "dgx-h100:8") or of a TOML file ("mine.toml").

    The number after the colon counts nodes for `dgx-*` and `*-cluster` presets, devices for all
    others. Default: one, or the whole of a `*-cluster`.
    """
    text = str(name_or_path)
    if text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            raise MachineError(
                f"There is no file '{text}'. Presets are written without .toml: "
                f"{listed(presets())}."
            )
        return read(read_text(path, MACHINE_FILE), text)
    if "," in text:
        raise MachineError(
            f"'{text}' names several machines, and one is needed here. 'partita plan --machine "
            f"{text}' compares them."
        )
    name, colon, count = text.partition(":")
    if name not in presets():
        raise _unknown_preset(name)
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise MachineError(
            f"'{text}' asks for '{count}' of '{name}': write a number above 0, as in '{name}:8'."
        )
    whole = _preset(_NODE_PRESETS.get(name, name))
    if name in _WHOLE_PRESETS and not colon:
        return whole
    units = int(count or 1)
    unit_name = "devices"
    unit_size = 1
    if name in _NODE_PRESETS:
        unit_name = "nodes"
        unit_size = whole.devices // whole.levels[0].size
    if units * unit_size > whole.devices:
        raise MachineError(
            f"'{text}' asks for {units} {unit_name}, but '{name}' has "
            f"{whole.devices // unit_size}. Use fewer, or describe a larger machine in a file."
        )
    return replace(whole, name=text).with_devices(units * unit_size)


def _unknown_preset(name: str) -> MachineError:
    matches = difflib.get_close_matches(name.lower(), presets(), 1)
    meant = f"Did you mean '{matches[0]}'? " if matches else ""
    return MachineError(
        f"There is no machine '{name}'. {meant}Presets are {listed(presets())}; "
        "your own machine is a file that ends in .toml."
    )


def host(devices: int, memory_bytes: int) -> Machine:
    """This host: a CPU in place of `devices` devices, which share `memory_bytes` bytes of memory.

    Its rates are assumed ones per core. Measure the host and use `Machine.revised` for better ones.
    """
    limit = _preset("host").devices
    if devices > limit:
        raise MachineError(
            f"A CPU stands for at most {limit} devices, not {devices}. Use fewer devices, "
            f"or plan for another machine: partita plan --machine h100:{devices}."
        )
    machine = replace(_preset("host"), name=f"host:{devices}").with_devices(devices)
    return machine.revised(
        {"device.memory.dram.capacity": memory_bytes // devices},
        source=f"an equal part of {format_bytes(memory_bytes)}, as given",
        status="derived",
    )


@lru_cache
def _preset(name: str) -> Machine:
    file = f"presets/{name}.toml"
    folder = resources.files("partita.machine")
    return read(folder.joinpath(file).read_text(encoding="utf-8"), file)


def read(text: str, file: str = "machine.toml") -> Machine:
    """The machine of a TOML description. `file` names it in errors."""
    table = parse_toml(text, file, MACHINE_FILE)
    try:
        machine = _DescriptionReader().machine(table)
        check(machine)
    except DescriptionError as error:
        line = _line(text, error.path)
        where = f"{file}, line {line}" if line else file
        raise MachineError(f"{where}: {error}") from None
    return machine


class _Provenance(NamedTuple):
    """Source and status that a table gives for all of its numbers."""

    source: Any
    status: Any

    def inside(self, table: dict[str, Any]) -> _Provenance:
        """The origin inside a table, which may give its own."""
        return _Provenance(table.get("source", self.source), table.get("status", self.status))


class _DescriptionReader:
    """Turns tables into the parts of a machine, and collects the sources of all numbers."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def machine(self, table: dict[str, Any]) -> Machine:
        """The machine of a whole description."""
        _check_keys("", table, _SECTIONS)
        _check_devices_given(table)
        origin = _Provenance(None, None).inside(table)
        kinds = self.kinds(table.get("kind", {}), origin)
        if "kind" in table and not kinds:
            raise DescriptionError(
                "kind", "is empty: add [kind.NAME] for every kind of device, with its count."
            )
        device = slowest_kind(kinds) if kinds else self.one_device(table["device"], origin)
        levels = self.named(
            Level,
            "level",
            table.get("level", {}),
            origin,
        )
        domains = self.domains(table.get("domain", {}), origin)
        thermal = self.thermal(table["thermal"], origin) if "thermal" in table else None
        grids = self.named(
            Grid,
            "grid",
            table.get("grid", {}),
            origin,
        )
        attached = self.attached(table.get("attached", {}), origin)
        backend = Backend()
        if "backend" in table:
            backend = self.part(
                Backend,
                "backend",
                table["backend"],
                origin,
            )
        self.sources.sort(key=lambda source: source.path)
        return Machine(
            name=_string("name", table["name"]),
            notes=_string("notes", table.get("notes", "")),
            device=device,
            kinds=kinds,
            levels=levels,
            domains=domains,
            backend=backend,
            sources=tuple(self.sources),
            thermal=thermal,
            grids=grids,
            attached=attached,
        )

    def domains(self, tables: Any, origin: _Provenance) -> tuple[Domain, ...]:
        """The domains, with their operating points and leakage."""
        tables = _table("domain", tables)
        inherited = origin.inside(tables)
        domains = []
        for name, table in tables.items():
            if name in _ORIGIN_KEYS:
                continue
            path = f"domain.{name}"
            own_origin = inherited.inside(_table(path, table))
            points = self.named(
                DomainPoint,
                f"{path}.operating_point",
                table.get("operating_point", {}),
                own_origin,
            )
            leakage = None
            if "leakage" in table:
                leakage = self.part(
                    Leakage,
                    f"{path}.leakage",
                    table["leakage"],
                    own_origin,
                )
            plain = _without(table, "operating_point", "leakage")
            parts = {"name": name, "points": points, "leakage": leakage}
            domains.append(self.part(Domain, path, plain, inherited, **parts))
        return tuple(domains)

    def thermal(self, table: Any, origin: _Provenance) -> Thermal:
        """The thermal model with its trips."""
        own_origin = origin.inside(_table("thermal", table))
        trips = self.named(
            Trip,
            "thermal.trip",
            table.get("trip", {}),
            own_origin,
        )
        return self.part(Thermal, "thermal", _without(table, "trip"), origin, trips=trips)

    def attached(self, tables: Any, origin: _Provenance) -> tuple[Attached, ...]:
        """The compute attached to memory, with its engines."""
        tables = _table("attached", tables)
        inherited = origin.inside(tables)
        attached = []
        for name, table in tables.items():
            if name in _ORIGIN_KEYS:
                continue
            path = f"attached.{name}"
            own_origin = inherited.inside(_table(path, table))
            engines = self.engines(f"{path}.engine", table.get("engine", {}), own_origin)
            plain = _without(table, "engine")
            parts = {"name": name, "engines": engines}
            attached.append(self.part(Attached, path, plain, inherited, **parts))
        return tuple(attached)

    def kinds(self, tables: Any, origin: _Provenance) -> tuple[DeviceKind, ...]:
        """The kinds of different devices."""
        kinds = []
        for key, table in _table("kind", tables).items():
            path = f"kind.{key}"
            device_fields, parts = self.device_parts(
                path,
                table,
                origin,
                ("count",),
            )
            kinds.append(self.part(DeviceKind, path, device_fields, origin, key=key, **parts))
        return tuple(kinds)

    def one_device(self, table: Any, origin: _Provenance) -> Device:
        """The device of a machine with equal devices."""
        device_fields, parts = self.device_parts(
            "device",
            table,
            origin,
            (),
        )
        return self.part(Device, "device", device_fields, origin, **parts)

    def device_parts(
        self,
        path: str,
        table: Any,
        origin: _Provenance,
        extra_keys: tuple[str, ...],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a device's table, and the memories, engines and points inside it."""
        table = _table(path, table)
        inner_keys = ("memory", "engine", "operating_point")
        _check_keys(path, table, ("name", "overhead", *inner_keys, *extra_keys))
        inherited = origin.inside(table)
        memories = table.get("memory", {})
        engines = table.get("engine", {})
        points = table.get("operating_point", {})
        parts = {
            "memories": self.named(
                Memory,
                f"{path}.memory",
                memories,
                inherited,
            ),
            "engines": self.engines(f"{path}.engine", engines, inherited),
            "points": self.named(
                OperatingPoint,
                f"{path}.operating_point",
                points,
                inherited,
            ),
        }
        return {key: table[key] for key in table if key not in inner_keys}, parts

    def named(
        self,
        part: type,
        path: str,
        tables: Any,
        origin: _Provenance,
    ) -> tuple[Any, ...]:
        """The parts of a table of tables, each with its name."""
        tables = _table(path, tables)
        inherited = origin.inside(tables)
        parts = []
        for name, table in tables.items():
            if name not in _ORIGIN_KEYS:
                parts.append(
                    self.part(
                        part,
                        f"{path}.{name}",
                        table,
                        inherited,
                        name=name,
                    )
                )
        return tuple(parts)

    def engines(
        self,
        path: str,
        tables: Any,
        origin: _Provenance,
    ) -> tuple[Engine, ...]:
        """The engines of a device, by operator class and dtype."""
        tables = _table(path, tables)
        inherited = origin.inside(tables)
        engines: list[Engine] = []
        for op_class, table in tables.items():
            if op_class not in _ORIGIN_KEYS:
                class_path = f"{path}.{op_class}"
                one_of(
                    class_path,
                    "operator class",
                    op_class,
                    OP_CLASSES,
                )
                engines += self.class_engines(
                    class_path,
                    op_class,
                    table,
                    inherited,
                )
        return tuple(engines)

    def class_engines(
        self,
        path: str,
        op_class: str,
        table: Any,
        origin: _Provenance,
    ) -> list[Engine]:
        """The engines of one operator class, by dtype."""
        table = _table(path, table)
        inherited = origin.inside(table)
        engines = []
        for dtype, engine in table.items():
            if dtype in _ORIGIN_KEYS:
                continue
            engine_path = f"{path}.{dtype}"
            one_of(
                engine_path,
                "dtype",
                dtype,
                DTYPES,
            )
            keys = {"op_class": op_class, "dtype": dtype}
            engines.append(self.part(Engine, engine_path, engine, inherited, **keys))
        return engines

    def part(self, part: type, path: str, table: Any, origin: _Provenance, **given: Any) -> Any:
        """One part from one table, without its `given` fields and those of the key path."""
        table = _table(path, table)
        absent = (*given, *path_fields(part))
        table_fields = [field for field in fields(part) if field.name not in absent]
        _check_keys(path, table, tuple(field.name for field in table_fields))
        inherited = origin.inside(table)
        dimensions = dict(number_fields(part))
        values = dict(given)
        for field in table_fields:
            dimension = dimensions.get(field.name)
            if field.name in table:
                field_path = f"{path}.{field.name}"
                value = table[field.name]
                values[field.name] = self.field(
                    field,
                    field_path,
                    value,
                    dimension,
                    inherited,
                    list_depth(part, field.name),
                )
            elif _is_required(field, dimension):
                raise DescriptionError(path, f"lacks {field.name}{_example(dimension)}.")
        return part(**values)

    def field(
        self,
        field: Field[Any],
        path: str,
        value: Any,
        dimension: str | None,
        origin: _Provenance,
        depth: int,
    ) -> Any:
        """The value of one field of a part."""
        if dimension is not None:
            return self.number(
                path,
                value,
                dimension,
                origin,
                depth,
            )
        if not isinstance(field.default, bool):
            return _string(path, value)
        if not isinstance(value, bool):
            raise DescriptionError(path, f"is {shown(value)}: write true or false.")
        return value

    def number(
        self,
        path: str,
        given: Any,
        dimension: str,
        origin: _Provenance,
        depth: int = 0,
    ) -> Value:
        """A number, or nested lists of numbers, after their source is recorded."""
        if isinstance(given, dict):
            _check_keys(path, given, ("value",))
            if "value" not in given:
                raise DescriptionError(path, f"lacks value{_example(dimension)}.")
            origin = origin.inside(given)
            given = given["value"]
        value = _values(path, given, dimension, depth)
        check_number(path, value, dimension)
        check_source(path, origin.source, origin.status)
        self.sources.append(
            Source(
                path,
                value,
                origin.source,
                origin.status,
            )
        )
        return value


def _check_devices_given(table: dict[str, Any]) -> None:
    if "name" not in table:
        missing = "name"
    elif "device" not in table and "kind" not in table:
        missing = "device"
    elif "device" in table and "kind" in table:
        raise DescriptionError(
            "",
            "device and kind are both given: describe equal devices as [device], or every kind of "
            "device as [kind.NAME] with its count.",
        )
    else:
        return
    raise DescriptionError("", f"{missing} is missing: a machine needs a name and a [device].")


def _is_required(field: Field[Any], dimension: str | None) -> bool:
    """Whether a table must have a field. Numbers must be given, even those with a default."""
    if dimension is not None and field.default is not None:
        return True
    return field.default is MISSING


def _without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _values(path: str, given: Any, dimension: str, depth: int) -> Value:
    """The numbers of lists nested `depth` deep; all inner lists of one length."""
    if not depth:
        return _value(path, given, dimension)
    if not isinstance(given, list) or not given:
        noun = "a list of numbers" if depth == 1 else "a list of rows"
        raise DescriptionError(path, f"is {shown(given)}: write {noun}, [...].")
    values: tuple[Any, ...] = tuple(_values(path, item, dimension, depth - 1) for item in given)
    if depth > 1 and len({len(row) for row in values}) > 1:
        raise DescriptionError(path, "has rows of different lengths: write equally long rows.")
    return values


def _value(
    path: str,
    given: Any,
    dimension: str,
) -> float:
    if dimension in PLAIN_DIMENSIONS:
        return _plain_value(path, given, dimension)
    if not isinstance(given, str):
        raise DescriptionError(path, f"is {shown(given)}, without a unit{_example(dimension)}.")
    try:
        value = parse(given, dimension)
    except PartitaError as error:
        raise DescriptionError(path, f"is wrong: {error}") from None
    if not math.isfinite(value):
        raise DescriptionError(path, f"is {shown(given)}: write a finite number.")
    return int(value) if dimension == "B" else value


def _plain_value(
    path: str,
    given: Any,
    dimension: str,
) -> float:
    """A number without a unit."""
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if dimension == "count":
        if not is_number or not isinstance(given, int) or given > MOST_COUNT:
            raise DescriptionError(
                path, f"is {shown(given)}: write a plain whole number{_example(dimension)}."
            )
        return given
    if not is_number or abs(given) > 2**62:
        raise DescriptionError(
            path, f"is {shown(given)}: write a plain number{_example(dimension)}."
        )
    return float(given)


def _example(dimension: str | None) -> str:
    """An example of a number of a dimension, empty for fields that hold no number."""
    if dimension is None:
        return ""
    if dimension in PLAIN_DIMENSIONS:
        return f", for example {_PLAIN_EXAMPLES[dimension]}"
    return f', for example "{EXAMPLES[dimension]}"'


def _check_keys(
    path: str,
    table: dict[str, Any],
    allowed: tuple[str, ...],
) -> None:
    for key in table:
        if key not in allowed and key not in _ORIGIN_KEYS:
            raise DescriptionError(
                f"{path}.{key}".lstrip("."),
                f"is an unknown key: {did_you_mean(key, allowed)}"
                f"Use one of {listed((*allowed, *_ORIGIN_KEYS))}.",
            )


def _table(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DescriptionError(path, f"is {shown(value)}: write a table, [{path}].")
    return value


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise DescriptionError(path, f"is {shown(value)}: write a text in quotes.")
    return value


def _line(text: str, path: str) -> int | None:
    """The line of a key path, or of the longest prefix of it that has a line."""
    target = path.split(".")
    header: list[str] = []
    longest = 0
    line_number = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+([^\]=]+)\]+\s*(#.*)?$", line):
            header = _keys(match[1])
            keys = header
        elif match := re.match(r"\s*([\w.\"'*-]+)\s*=", line):
            keys = [*header, *_keys(match[1])]
        else:
            continue
        length = min(len(keys), len(target))
        if length > longest and keys[:length] == target[:length]:
            longest = length
            line_number = number
    return line_number


def _keys(dotted: str) -> list[str]:
    return [key.strip().strip("\"'") for key in dotted.split(".")]
