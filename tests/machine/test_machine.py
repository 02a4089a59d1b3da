import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import MachineError
from partita.machine import (
    Backend,
    Device,
    Domain,
    Engine,
    Level,
    Machine,
    Memory,
    OperatingPoint,
    check,
    host,
    load,
    presets,
    read,
)
from partita.machine.machine import numbers
from partita.machine.parts import DTYPES, FABRICS, OP_CLASSES, STATUSES

ROOT = Path(__file__).parents[2]
MACHINES_PAGE = (ROOT / "docs/machines.md").read_text()
EXAMPLE = re.findall(r"```toml\n(.*?)```", MACHINES_PAGE, re.S)[0]


PAIR = Level("node", 2, "switch", 1.0, 1.0)


def small(levels=(PAIR,), **changes) -> Machine:
    device = Device("thing", 0.0, (Memory("main", 1000, 10.0),), (Engine("*", "*", 1.0, 1.0),))
    return replace(Machine("small", device, tuple(levels)), **changes)


# ---- presets


@pytest.mark.parametrize("name", presets())
def test_every_number_of_a_preset_has_a_source_and_a_status(name):
    machine = load(name)
    check(machine)
    origin = machine.provenance()
    assert set(origin) == {path for path, _, _ in numbers(machine)} and len(origin) > 10
    for path, (_, source, status) in origin.items():
        assert source and source != "set in code" and status in STATUSES, path


@pytest.mark.parametrize("name", presets())
def test_a_preset_saves_and_loads(name):
    machines = [load(name)]
    # A machine whose devices differ, or with attached compute, is whole.
    if not machines[0].kinds and not machines[0].attached:
        machines.append(load(f"{name}:4"))
    for machine in machines:
        again = read(machine.to_toml())
        assert again == machine and again.provenance() == machine.provenance()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("h100", (1, 1)),
        ("h100:8", (1, 8)),
        ("h100:64", (8, 8)),
        ("h100:12", (2, 6)),
        ("h100:10000", (1250, 8)),
        ("dgx-h100", (1, 8)),
        ("dgx-h100:8", (8, 8)),
        ("dgx-a100:16", (16, 8)),
        ("p100-cluster", (4, 4)),
        ("p100-cluster:1", (1, 4)),
        ("k80-cluster", (16, 2, 2)),
        ("tpu-v5e:4", (2, 2)),
        ("tpu-v5e:8", (2, 4)),
        ("tpu-v5e:32", (4, 8)),
        ("tpu-v5e:256", (16, 16)),
        ("host:6", (6,)),
    ],
)
def test_counts(name, sizes):
    machine = load(name)
    assert tuple(level.size for level in machine.levels) == sizes
    assert machine.name == name
    assert machine.devices == eval("*".join(map(str, sizes)))


def test_a_cut_torus_is_open_and_a_whole_one_closed():
    assert [level.fabric for level in load("tpu-v5e:128").levels] == ["mesh", "torus"]
    assert [level.fabric for level in load("tpu-v5e:256").levels] == ["torus", "torus"]


def test_a_cpu_stands_for_at_most_64_devices() -> None:
    assert host(64, 2**36).devices == 64
    with pytest.raises(
        MachineError,
        match="A CPU stands for at most 64 devices, not 1000. Use fewer devices",
    ):
        host(1000, 2**36)


def test_host_divides_its_memory():
    machine = host(4, 8 * 2**30)
    check(machine)
    assert (machine.devices, machine.memory_bytes, machine.memory_bandwidth) == (4, 2 * 2**30, 10e9)
    assert machine.provenance()["device.memory.dram.capacity"][1:] == (
        "an equal part of 8.0 GiB, as given",
        "derived",
    )
    assert machine.rate("dot", "float32") == 30e9
    assert machine.backend == Backend(
        platform="cpu",
        reduce_scatter=False,
        promotes_16_bit_all_reduce=True,
        dense_grouped_gradients=True,
        recomputes=True,
        transposed_copies=True,
    )
    assert read(machine.to_toml()) == machine


def test_print():
    assert str(load("p100-cluster")).splitlines()[:4] == [
        "machine p100-cluster: 16 x NVIDIA P100 SXM2 16 GB, 16.0 GiB at 549 GB/s each",
        "  nodes: 4 by switch, 12.5 GB/s, 2.00 us, shared by 4",
        "  node: 4 by switch, 60.0 GB/s, 2.00 us",
        "  * *: 3.2 TFLOP/s of 10.6 TFLOP/s",
    ]


# ---- rates and shares


def test_the_most_specific_engine_counts():
    engines = [("dot", "bfloat16", 8.0), ("dot", "*", 4.0), ("*", "bfloat16", 2.0), ("*", "*", 1.0)]
    machine = small()
    machine = replace(
        machine, device=replace(machine.device, engines=tuple(Engine(*e, 0.5) for e in engines))
    )
    assert machine.rate("dot", "bfloat16") == 4.0
    assert machine.rate("dot", "int8") == 2.0
    assert machine.rate("sort", "bfloat16") == 1.0
    assert machine.rate("sort", "int32") == 0.5


def test_float32_products_run_as_the_backend_runs_them():
    a100 = load("a100")
    assert a100.rate("dot", "float32") == a100.rate("dot", "tf32") == 156e12 * 0.8
    exact = replace(a100, backend=replace(a100.backend, float32_products="float32"))
    assert exact.rate("dot", "float32") == 19.5e12 * 0.85
    assert a100.rate("elementwise", "float32") == 19.5e12 * 0.3


def test_a_missing_engine_is_named():
    machine = small()
    machine = replace(
        machine, device=replace(machine.device, engines=(Engine("dot", "float32", 1.0, 1.0),))
    )
    with pytest.raises(MachineError) as error:
        machine.rate("sort", "int8")
    assert str(error.value) == (
        "Machine 'small' has no engine for 'sort' in int8: its engines are dot/float32. "
        'Add int8 = { peak = ..., efficiency = ... } to [device.engine.sort], or an engine for "*".'
    )


def test_a_shared_memory_is_divided():
    machine = small()
    memory = Memory("main", 1000, 10.0, efficiency=0.5, shared_by=2)
    machine = replace(machine, device=replace(machine.device, memories=(memory,)))
    assert (machine.memory_bytes, machine.memory_bandwidth) == (500, 2.5)
    alone = machine.with_devices(1)
    assert (alone.memory_bytes, alone.memory_bandwidth) == (1000, 5.0)


@given(st.lists(st.integers(1, 6), max_size=3), st.integers(1, 250))
def test_with_devices_gives_the_number_or_refuses_it(sizes, count):
    machine = small([Level(f"l{i}", size, "switch", 1.0, 1.0) for i, size in enumerate(sizes)])
    possible = {1}
    for size in sizes:
        possible = {have * n for have in possible for n in range(1, size + 1)}
    if count in possible:
        smaller = machine.with_devices(count)
        assert smaller.devices == count
        check(smaller)
    else:
        with pytest.raises(MachineError):
            machine.with_devices(count)


def test_with_devices_keeps_the_link_per_part():
    cluster = load("p100-cluster")
    assert cluster.with_devices(6).levels[0].shared_by == 3  # three devices a node on its one card
    assert cluster.with_devices(16) == cluster
    assert cluster.with_devices(4).provenance()["level.nodes.size"] == (
        1,
        "follows from taking 4 devices",
        "derived",
    )
    assert load("v100:16").levels[0].shared_by == 2


def test_with_devices_names_the_nearest_numbers():
    cluster = load("p100-cluster")
    with pytest.raises(MachineError) as error:
        cluster.with_devices(11)
    assert str(error.value) == (
        "Cannot take 11 devices of 'p100-cluster', which has 16 as 4 (nodes) x 4 (node): "
        "every part must get the same number. Use 9 or 12."
    )
    with pytest.raises(MachineError, match=r"Use 16\.$"):
        cluster.with_devices(17)
    with pytest.raises(MachineError, match=r"Use 1\.$"):
        cluster.with_devices(0)


def test_measured_numbers_have_their_source():
    machine = load("p100-cluster").revised(
        {"level.node.bandwidth": 33e9}, "ring benchmark, 2026-01-02"
    )
    assert machine.levels[1].bandwidth == 33e9
    assert machine.provenance()["level.node.bandwidth"] == (
        33e9,
        "ring benchmark, 2026-01-02",
        "measured",
    )
    with pytest.raises(MachineError) as error:
        small().revised({"level.node.speed": 1.0}, "x")
    assert str(error.value).startswith(
        "Machine 'small' has no number level.node.speed: it has device.overhead, "
    )


def test_the_digest_of_a_machine_is_that_of_its_numbers():
    machine = load("h100:4")
    renamed = replace(machine, name="mine", notes="a note", sources=())
    assert renamed.digest == machine.digest == read(machine.to_toml()).digest
    for path, (value, _, _) in machine.provenance().items():
        other = machine.revised({path: value * 2 if value else 0.1}, "an edit", "assumed")
        assert other.digest != machine.digest, path
    ring = replace(machine.levels[0], fabric="ring")
    assert replace(machine, levels=(ring, *machine.levels[1:])).digest != machine.digest


def test_a_number_changed_in_code_loses_its_source():
    cluster = load("p100-cluster")
    faster = replace(
        cluster, levels=(replace(cluster.levels[0], bandwidth=1e12), cluster.levels[1])
    )
    assert faster.provenance()["level.nodes.bandwidth"] == (1e12, "set in code", "assumed")
    assert read(faster.to_toml()).levels == faster.levels


def test_weakest_status_looks_at_links_in_use_only():
    levels = (Level("net", 2, "switch", 1.0, 1.0), Level("node", 2, "switch", 1.0, 1.0))
    machine = small(levels)
    values = {path: value for path, value, _ in numbers(machine)}
    machine = machine.revised(values, "a bench", "measured").revised(
        {"level.net.latency": 2.0}, "a guess", "assumed"
    )
    assert machine.weakest_status() == "assumed"
    assert machine.with_devices(2).weakest_status() == "measured"  # one node: the network is idle


# ---- saving and loading anything

positive = st.floats(1e-12, 1e18)
some = {
    "count": st.integers(1, 10**9),
    "text": st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
    "name": st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True).filter(
        lambda n: n not in ("source", "status")
    ),
}


def named(cls, **strategies):
    part = st.builds(cls, name=some["name"], **strategies)
    return st.lists(part, max_size=3, unique_by=lambda part: part.name).map(tuple)


machines = st.builds(
    Machine,
    name=some["text"],
    notes=some["text"],
    device=st.builds(
        Device,
        name=some["text"],
        overhead=st.just(0.0) | positive,
        memories=named(
            Memory,
            capacity=st.integers(1, 2**50),
            bandwidth=positive,
            efficiency=st.floats(0.01, 1.0),
            shared_by=some["count"],
            endurance_writes=st.none() | some["count"],
            energy_per_bit=st.none() | positive,
        ).filter(len),
        engines=st.lists(
            st.builds(
                Engine,
                st.sampled_from(OP_CLASSES),
                st.sampled_from(DTYPES),
                positive,
                st.floats(0.01, 1.0),
            ),
            min_size=1,
            max_size=4,
            unique_by=lambda engine: (engine.op_class, engine.dtype),
        ).map(lambda engines: tuple(sorted(engines, key=lambda engine: engine.op_class))),
        points=named(
            OperatingPoint, frequency=positive, power=positive, voltage=st.none() | positive
        ),
    ),
    levels=named(
        Level,
        size=st.integers(1, 200),
        fabric=st.sampled_from(FABRICS),
        latency=st.just(0.0) | positive,
        bandwidth=positive,
        shared_by=some["count"],
    ),
    domains=named(
        Domain, kind=st.sampled_from(("clock", "power", "failure")), devices=some["count"]
    ),
    backend=st.builds(
        Backend,
        st.booleans(),
        st.floats(0, 1),
        st.booleans(),
        st.sampled_from(("float32", "tf32", "bfloat16")),
    ),
)


@given(machines)
def test_saving_and_loading_is_the_identity(machine):
    values = {path: value for path, value, _ in numbers(machine)}
    machine = machine.revised(values, 'a "bench"', "measured")
    check(machine)
    assert read(machine.to_toml()) == machine


# ---- reading, and refusing by name


def test_the_documented_example_loads(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(EXAMPLE)
    machine = load(path)
    assert machine == load(str(path)) == read(EXAMPLE)
    assert (machine.devices, machine.memory_bytes, machine.overhead) == (64, 40 * 2**30, 4e-6)
    assert isinstance(machine.device.memories[0].capacity, int)
    assert [memory.name for memory in machine.device.memories] == ["hbm", "host"]
    assert machine.device.memories[1].endurance_writes == 10**9
    assert machine.device.points == (OperatingPoint("base", 1.1e9, 250.0, 0.8),)
    assert machine.domains == (Domain("rack", "failure", 32),)
    assert machine.levels[0] == Level("network", 16, "switch", 2e-6, 12.5e9, 4)
    assert machine.provenance()["device.overhead"] == (4e-6, "profiler, empty kernel", "measured")
    assert machine.provenance()["level.node.latency"] == (1e-6, "data sheet", "recalled")


def test_the_documented_presets_are_all_presets():
    table = MACHINES_PAGE.split("## Presets")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(.*?)`", row)} == set(presets())


def test_the_documented_error_is_the_error():
    shown = re.search(r"^lab.toml, .*$", MACHINES_PAGE, re.M)
    assert shown
    with pytest.raises(MachineError) as error:
        read(EXAMPLE.replace("tf32 = { peak", "float23 = { peak"), "lab.toml")
    assert str(error.value) == shown[0]


STATUS_LIST = "measured, verified, derived, recalled, assumed"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'latency = "1 us"',
            'latancy = "1 us"',
            "m.toml, line 46: level.node.latancy is an unknown key: did you mean 'latency'? "
            "Use one of size, fabric, latency, bandwidth, shared_by, "
            "energy_per_bit, source, status.",
        ),
        (
            "[domain.rack]",
            "[zone.rack]",
            "m.toml, line 50: zone is an unknown key: "
            "Use one of name, notes, device, kind, level, domain, backend, thermal, grid, attached, source, status.",
        ),
        (
            'bandwidth = "300 GB/s"',
            'bandwidth = "300 GB"',
            "m.toml, line 47: level.node.bandwidth is wrong: '300 GB' is in B, but B/s is needed: "
            'write for example "900 GB/s".',
        ),
        (
            'bandwidth = "300 GB/s"',
            "bandwidth = 300",
            'm.toml, line 47: level.node.bandwidth is 300, without a unit, for example "900 GB/s".',
        ),
        (
            'bandwidth = "300 GB/s"',
            'bandwidth = "0 GB/s"',
            "m.toml, line 47: level.node.bandwidth is 0 B/s: it must be more than zero.",
        ),
        (
            'bandwidth = "1555 GB/s"',
            'bandwidth = "-1 GB/s"',
            "m.toml, line 12: device.memory.hbm.bandwidth is -1e+09 B/s: "
            "it must be more than zero.",
        ),
        (
            'bandwidth = "300 GB/s"\n',
            "",
            'm.toml, line 43: level.node lacks bandwidth, for example "900 GB/s".',
        ),
        (
            'value = "4 us", ',
            "",
            'm.toml, line 8: device.overhead lacks value, for example "5 us".',
        ),
        (
            'latency = "1 us"',
            'latency = "-1 us"',
            "m.toml, line 46: level.node.latency is -1e-06 s: it must be zero seconds or more.",
        ),
        (
            'tf32 = { peak = "156 TFLOP/s", efficiency = 0.8 }',
            'tf32 = { peak = "156 TFLOP/s", efficiency = 80 }',
            "m.toml, line 26: device.engine.dot.tf32.efficiency is 80: "
            "it must be a number above 0 and at most 1.",
        ),
        (
            "overlap = { value = 0.5",
            "overlap = { value = 1.5",
            "m.toml, line 57: backend.overlap is 1.5: it must be a number from 0 to 1.",
        ),
        (
            "size = 16",
            "size = 0",
            "m.toml, line 37: level.network.size is 0: it must be a whole number of at least 1.",
        ),
        (
            "size = 16",
            "size = 16.5",
            "m.toml, line 37: level.network.size is 16.5: "
            "write a plain whole number, for example 4.",
        ),
        (
            "efficiency = 0.8\nshared_by = 4",
            'efficiency = "80 %"\nshared_by = 4',
            "m.toml, line 20: device.memory.host.efficiency is '80 %': "
            "write a plain number, for example 0.8.",
        ),
        (
            'status = "recalled"\n',
            "",
            "m.toml, line 10: device.memory.hbm.capacity has no status: "
            f"add status = one of {STATUS_LIST} to it or to its section.",
        ),
        (
            'source = "data sheet" ',
            "",
            "m.toml, line 11: device.memory.hbm.capacity has no source: "
            'add source = "where the number was read" to it or to its section.',
        ),
        (
            'status = "recalled"',
            'status = "remembered"',
            f"m.toml, line 11: device.memory.hbm.capacity has the unknown status 'remembered': "
            f"Use one of {STATUS_LIST}.",
        ),
        (
            "[device.engine.dot]",
            "[device.engine.dots]",
            "m.toml, line 24: device.engine.dots has the unknown operator class 'dots': "
            "did you mean 'dot'? Use one of dot, conv, attention, elementwise, gather, reduce, sort, *.",
        ),
        (
            'fabric = "switch"\nlatency = "1 us"',
            'fabric = "swich"\nlatency = "1 us"',
            "m.toml, line 45: level.node.fabric has the unknown fabric 'swich': "
            "did you mean 'switch'? Use one of switch, tree, bus, ring, torus, mesh.",
        ),
        (
            'kind = "failure"',
            'kind = "fire"',
            "m.toml, line 51: domain.rack.kind has the unknown kind of domain 'fire': "
            "did you mean 'failure'? Use one of clock, power, thermal, failure.",
        ),
        (
            "reduce_scatter = true",
            'reduce_scatter = "yes"',
            "m.toml, line 56: backend.reduce_scatter is 'yes': write true or false.",
        ),
        (
            'fabric = "switch"\nlatency = "1 us"',
            'fabric = 3\nlatency = "1 us"',
            "m.toml, line 45: level.node.fabric is 3: write a text in quotes.",
        ),
        (
            "[level.node]",
            "[level.'no.de']",
            "m.toml, line 43: level.no.de is not a valid name: use letters, digits, '-' and '_'.",
        ),
        (
            'name = "lab"\n',
            "",
            "m.toml: name is missing: a machine needs a name and a [device].",
        ),
        ("[level.node]", "[level.node", "m.toml is not TOML ("),
    ],
)
def test_a_mistake_is_refused_by_name(before, after, message):
    assert EXAMPLE.count(before) == 1
    with pytest.raises(MachineError) as error:
        read(EXAMPLE.replace(before, after), "m.toml")
    if message.endswith("TOML ("):
        assert str(error.value).startswith(message)
    else:
        assert str(error.value) == message


def test_tables_and_numbers_are_not_confused():
    with pytest.raises(MachineError) as error:
        read('name = "m"\ndevice = 3\nlevel = {}\n', "m.toml")
    assert str(error.value) == "m.toml, line 2: device is 3: write a table, [device]."


def test_a_machine_made_in_code_is_checked_too():
    level = Level("node", 2, "switch", 1.0, 1.0)
    device = small().device
    for wrong, message in [
        (small([level, level]), "level.node is used twice: use different names."),
        (
            small([replace(level, bandwidth=0.0)]),
            "level.node.bandwidth is 0 B/s: it must be more than zero.",
        ),
        (
            small(device=replace(device, memories=())),
            "device.memory is missing: add [device.memory.main] with its capacity and bandwidth.",
        ),
        (
            small(device=replace(device, engines=())),
            'device.engine is missing: add [device.engine."*"] '
            'with "*" = { peak = ..., efficiency = ... }.',
        ),
    ]:
        with pytest.raises(MachineError) as error:
            check(wrong)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "h10",
            f"There is no machine 'h10'. Did you mean 'h100'? Presets are {', '.join(presets())}; "
            "your own machine is a file that ends in .toml.",
        ),
        (
            "abacus-9",
            f"There is no machine 'abacus-9'. Presets are {', '.join(presets())}; "
            "your own machine is a file that ends in .toml.",
        ),
        (
            "h100:many",
            "'h100:many' asks for 'many' of 'h100': write a number above 0, as in 'h100:8'.",
        ),
        ("h100:0", "'h100:0' asks for '0' of 'h100': write a number above 0, as in 'h100:8'."),
        (
            "h100:8,a100:8",
            "'h100:8,a100:8' names several machines, and one is needed here. "
            "'partita plan --machine h100:8,a100:8' compares them.",
        ),
        (
            "p100-cluster:8",
            "'p100-cluster:8' asks for 8 nodes, but 'p100-cluster' has 4. "
            "Use fewer, or describe a larger machine in a file.",
        ),
        (
            "nowhere.toml",
            "There is no file 'nowhere.toml'. Presets are written without .toml: "
            f"{', '.join(presets())}.",
        ),
    ],
)
def test_an_unknown_machine(name, message):
    with pytest.raises(MachineError) as error:
        load(name)
    assert str(error.value) == message


KINDS_OF_DEVICES = """name = "two"
source = "a test"
status = "assumed"
[kind.new]
count = 3
name = "New"
overhead = "4 us"
memory.hbm = { capacity = "40 GiB", bandwidth = "1555 GB/s", efficiency = 0.8, shared_by = 1 }
engine."*"."*" = { peak = "20 TFLOP/s", efficiency = 0.5 }
[kind.old]
count = 5
name = "Old"
overhead = "8 us"
memory.main = { capacity = "16 GiB", bandwidth = "500 GB/s", efficiency = 0.8, shared_by = 1 }
engine."*"."*" = { peak = "10 TFLOP/s", efficiency = 0.5 }
[level.node]
size = 8
fabric = "switch"
latency = "1 us"
bandwidth = "300 GB/s"
shared_by = 1
"""


def test_devices_that_differ_are_kinds_and_a_file_like_any_other() -> None:
    machine = read(KINDS_OF_DEVICES, "two.toml")
    assert [(k.key, k.count, k.name) for k in machine.kinds] == [
        ("new", 3, "New"),
        ("old", 5, "Old"),
    ] and machine.devices == 8
    assert machine.device_kinds() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (
        machine.device.name == "Old"
        and machine.memory_bytes == 16 << 30
        and machine.of_kind(0).memory_bytes == 40 << 30
    )
    assert (
        replace(read(machine.to_toml()), sources=()) == replace(machine, sources=())
        and read(machine.to_toml()).provenance() == machine.provenance()
    )
    faster = machine.revised({"kind.old.engine.*.*.peak": 1e14}, "a test")
    assert faster.device.name == "New" and faster.provenance()["kind.old.engine.*.*.peak"] == (
        1e14,
        "a test",
        "measured",
    )
    assert "3 of 8 x New" in str(machine) and "old: * *:" in str(machine)
    assert machine.with_devices(8) is machine
    with pytest.raises(MachineError, match="Cannot take 4 devices of 'two': its 8 devices differ"):
        machine.with_devices(4)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "count = 5",
            "count = 4",
            "two.toml, line 4: kind has 3 + 4 = 7 devices, but the levels have 8 = 8: "
            "change a count or a size.",
        ),
        ("count = 3\n", "", "two.toml, line 4: kind.new lacks count, for example 4."),
        (
            "[kind.old]",
            '[device]\nname = "Old"\n[kind.old]',
            "two.toml: device and kind are both given: describe equal devices as [device], "
            "or every kind of device as [kind.NAME] with its count.",
        ),
        (
            '"16 GiB"',
            '"0 GiB"',
            "two.toml, line 14: kind.old.memory.main.capacity is 0 B: it must be more than zero.",
        ),
        (
            KINDS_OF_DEVICES[KINDS_OF_DEVICES.index("[level") :],
            "",
            "two.toml, line 4: kind has 3 + 5 = 8 devices without links: "
            "add [level.NAME] with the size, fabric, latency and bandwidth of their links.",
        ),
    ],
)
def test_kinds_that_do_not_fit_are_refused(before: str, after: str, message: str) -> None:
    with pytest.raises(MachineError) as error:
        read(KINDS_OF_DEVICES.replace(before, after), "two.toml")
    assert str(error.value) == message


def test_a_long_unknown_key_is_shortened_in_the_message() -> None:
    with pytest.raises(MachineError) as error:
        read(f'name = "x"\n{"9" * 5000} = 1\n', "mine.toml")
    assert f"mine.toml, line 2: {'9' * 120}... is an unknown key" in str(error.value)
