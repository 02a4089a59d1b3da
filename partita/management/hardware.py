"""The settings of a machine, with their speed and power.

A *cluster* is a group of a clock domain: devices with one clock and one voltage. A *setting* gives
every cluster its active devices and its operating point. The fastest cluster may use any number of
its devices if they are few, all others none or all. A machine without clock domains whose devices
have operating points is one cluster.

Equal groups of a domain are exchangeable. On a grid they are places (`placement`): a setting says
where operators run, and only the reflections of a setting are the same one.

`Assumptions` are the figures that no description has. Results rest on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from partita.cost.energy import BITS, group_count, require_power
from partita.errors import MachineError
from partita.machine import Leakage, Machine
from partita.machine.parts import LEAKAGE_CELSIUS
from partita.management.action import Setting
from partita.management.heat import ThermalModel
from partita.management.placement import Placement, placement_of

MOST_SETTINGS = 4096
SMALL_CLUSTER = 8
"""Devices of the largest cluster that may use any number of them."""


@dataclass(frozen=True)
class Assumptions:
    """Figures of the power simulator that a machine's description does not have."""

    serial: float = 0.05
    """Fraction of a kernel that one device computes."""
    exposed: float = 0.25
    """Fraction of the shorter side of the roofline that the longer one does not hide."""
    waiting_activity: float = 0.35
    """Power of a device that waits for memory, relative to a computing one."""
    gated_watts: float = 0.02
    """Of a cluster without active devices."""
    snippet_seconds: float = 0.1
    """Length of a snippet at a medium setting."""
    batch_seconds: float = 0.06
    """Wait for the next batch, once in a pass."""


@dataclass(frozen=True)
class Deviation:
    """The difference of real hardware from its description. The default is none."""

    memory: float = 1.0
    """Factor on the memory bandwidth."""
    power_exponent: float = 0.0
    """Power of the fastest domain grows with (frequency / half its fastest) to this power."""
    efficiency_spread: float = 0.0
    """Each kernel's efficiency is the described one times a factor of 1 ± this."""


HIDDEN_EFFICIENCY = Deviation(efficiency_spread=1 / 3)
"""As described, but for the efficiency of each kernel, which no description knows."""
NOT_AS_DESCRIBED = Deviation(memory=0.7, power_exponent=0.6, efficiency_spread=1 / 3)
"""Memory 30 % slower, power 1.5 times as high at the highest frequency."""


@dataclass(frozen=True, eq=False)
class Cluster:
    """Devices that share a clock. Arrays over points start at the slowest one."""

    name: str
    domain: str
    """"" for a machine without clock domains."""
    kind: int
    """Number of the kind of its devices."""
    devices: int
    frequencies: np.ndarray
    """[point], Hz."""
    volts: np.ndarray
    """[point]; 0 if unknown."""
    watts: np.ndarray
    """[point, active devices]: of computing devices at 60 °C; column 0: the gated cluster."""
    clock: np.ndarray
    """[point]: frequency relative to the point whose peaks the machine's engines state."""
    memory_rate: float
    """Bytes per second that a device draws at most at the clock 1."""
    leakage: Leakage | None
    idle_watts: float = 0.0
    """Of the cluster without work, if power is that of boards."""
    switch_seconds: float = 0.0

    def static_watts(self, point: int, celsius: float) -> float:
        """Power without activity at a point and a temperature."""
        if self.leakage is None:
            return self.idle_watts
        return self.leakage.watts(float(self.volts[point]), celsius)

    def extra_leakage(self, point: int, celsius: float) -> float:
        """Watts of leakage at a point and a temperature beyond those at 60 °C."""
        return self.static_watts(point, celsius) - self.warm_watts[point]

    @cached_property
    def warm_watts(self) -> list[float]:
        """[point]: power without activity at 60 °C, where `watts` are stated."""
        numbers = range(len(self.frequencies))
        return [self.static_watts(number, LEAKAGE_CELSIUS) for number in numbers]


@dataclass(frozen=True, eq=False)
class Hardware:
    """All settings of a machine, with arrays over settings."""

    machine: Machine
    clusters: tuple[Cluster, ...]
    settings: tuple[Setting, ...]
    assumptions: Assumptions = Assumptions()
    deviation: Deviation = Deviation()
    placement: Placement | None = None
    """The groups of the clock domain on the machine's grid."""
    _rates: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)

    def deviating(self, deviation: Deviation) -> Hardware:
        """This hardware with a deviation from its description."""
        return replace(self, deviation=deviation, _rates={})

    @cached_property
    def active(self) -> np.ndarray:
        """[setting, cluster]: active devices."""
        return np.array([setting.active for setting in self.settings])

    @cached_property
    def points(self) -> np.ndarray:
        """[setting, cluster]: operating point."""
        return np.array([setting.points for setting in self.settings])

    @cached_property
    def thermal_model(self) -> ThermalModel | None:
        """The heat of the machine; None if it is not described."""
        thermal = self.machine.thermal
        return None if thermal is None else ThermalModel(thermal)

    @cached_property
    def fastest(self) -> int:
        """The cluster with the most FLOP/s."""
        rates = [cluster.devices * _any_rate(self.machine, cluster) for cluster in self.clusters]
        return int(np.argmax(rates))

    def find(self, active: Sequence[int], points: Sequence[int]) -> Setting:
        """The setting with these active devices and points; gated clusters have point 0.

        It may have equal groups in another order.
        """
        points = [point if count else 0 for count, point in zip(active, points, strict=True)]
        choice = _same_choice(self.clusters, self.placement, tuple(active), tuple(points))
        return self._by_choice[choice]

    @cached_property
    def _by_choice(self) -> dict[Choice, Setting]:
        return {(setting.active, setting.points): setting for setting in self.settings}

    def all_active(self, fractions: Sequence[float]) -> Setting:
        """All devices active, each cluster at the slowest point of at least a fraction of its
        fastest frequency."""
        points = []
        for cluster, fraction in zip(self.clusters, fractions, strict=True):
            least = fraction * cluster.frequencies[-1] * (1 - 1e-9)
            points.append(int(np.searchsorted(cluster.frequencies, least)))
        return self.find([cluster.devices for cluster in self.clusters], points)

    @cached_property
    def medium(self) -> Setting:
        """The setting that snippets are cut by: the fastest cluster alone, at a third of its
        points."""
        active = [0] * len(self.clusters)
        points = [0] * len(self.clusters)
        for number, cluster in enumerate(self.clusters):
            if cluster.domain == self.clusters[self.fastest].domain:
                active[number] = cluster.devices
                points[number] = len(cluster.frequencies) // 3
        return self.find(active, points)

    def limited(self, setting: Setting, limits: Mapping[str, float]) -> Setting:
        """A setting with the frequencies of domains limited, Hz. The slowest point always runs."""
        points = []
        for cluster, point in zip(self.clusters, setting.points, strict=True):
            limit = limits.get(cluster.domain)
            if limit is not None:
                allowed = int(np.searchsorted(cluster.frequencies, limit * (1 + 1e-9))) - 1
                point = min(point, max(allowed, 0))
            points.append(point)
        return self.find(setting.active, points)

    # ---- speed

    @cached_property
    def _clock(self) -> np.ndarray:
        """[setting, cluster]: relative clock; 0 if gated."""
        columns = []
        for c, cluster in enumerate(self.clusters):
            columns.append(np.where(self.active[:, c] > 0, cluster.clock[self.points[:, c]], 0.0))
        return np.stack(columns, 1)

    def seconds_per_flop(self, op_class: str, dtype: str) -> np.ndarray:
        """[setting]: seconds of a FLOP that is `serial` on one device, else on all."""
        key = op_class, dtype
        if key not in self._rates:
            machine = self.machine
            rates = [machine.of_kind(c.kind).rate(op_class, dtype) for c in self.clusters]
            single = (self._clock * rates).max(1)
            together = (self.active * self._clock) @ rates
            serial = self.assumptions.serial
            self._rates[key] = serial / single + (1 - serial) / together
        return self._rates[key]

    @cached_property
    def bandwidth(self) -> np.ndarray:
        """[setting]: bytes per second of main memory."""
        drawn = (self.active * self._clock) @ [cluster.memory_rate for cluster in self.clusters]
        memory = self.machine.device.memories[0]
        memories = max(1, self.machine.devices // memory.shared_by)
        whole = memories * memory.bandwidth * memory.efficiency
        return np.minimum(drawn, whole) * self.deviation.memory

    def kernel_seconds(self, compute: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """Seconds of both sides of the roofline, the shorter one partly exposed."""
        longer = np.maximum(compute, memory)
        return longer + self.assumptions.exposed * np.minimum(compute, memory)

    @cached_property
    def grid_costs(self) -> np.ndarray:
        """[2, setting]: seconds and joules of a byte of results that active groups exchange over
        the grid; 0 without one."""
        if self.placement is None:
            return np.zeros((2, len(self.settings)))
        costs = [self.placement.byte_costs(setting.active) for setting in self.settings]
        return np.array(costs).T

    # ---- power

    @cached_property
    def _busy_watts(self) -> np.ndarray:
        """[setting, cluster]: watts of computing devices at 60 °C."""
        columns = []
        for c, cluster in enumerate(self.clusters):
            watts = cluster.watts[self.points[:, c], self.active[:, c]]
            is_fastest = cluster.domain == self.clusters[self.fastest].domain
            if is_fastest and self.deviation.power_exponent:
                half = cluster.frequencies[-1] / 2
                steeper = (cluster.frequencies / half) ** self.deviation.power_exponent
                watts = np.where(self.active[:, c] > 0, watts * steeper[self.points[:, c]], watts)
            columns.append(watts)
        return np.stack(columns, 1)

    @cached_property
    def _static_watts(self) -> np.ndarray:
        """[setting, cluster]: watts at 60 °C without activity."""
        columns = []
        for c, cluster in enumerate(self.clusters):
            running = np.array(cluster.warm_watts)[self.points[:, c]]
            watts = np.where(self.active[:, c] > 0, running, self._busy_watts[:, c])
            columns.append(np.minimum(watts, self._busy_watts[:, c]))
        return np.stack(columns, 1)

    def cluster_watts(self, activity: np.ndarray) -> np.ndarray:
        """[setting, cluster]: watts at 60 °C, active devices computing a fraction of the time."""
        dynamic = self._busy_watts - self._static_watts
        return self._static_watts + dynamic * activity[:, None]

    def activity(self, seconds: np.ndarray, compute: np.ndarray) -> np.ndarray:
        """Activity of the devices as it counts for power, 0 to 1."""
        waiting = np.maximum(seconds - compute, 0.0)
        computing = compute + self.assumptions.waiting_activity * waiting
        return np.minimum(computing / seconds, 1.0)

    def extra_leakage(self, setting: Setting, celsius: float) -> float:
        """Watts of leakage of all active clusters beyond those at 60 °C."""
        watts = 0.0
        for c, cluster in enumerate(self.clusters):
            if setting.active[c]:
                watts += cluster.extra_leakage(setting.points[c], celsius)
        return watts

    @cached_property
    def constant_watts(self) -> dict[str, float]:
        """Domain -> watts that it always draws, besides those of its points."""
        watts = {}
        for domain in self.machine.domains:
            if domain.watts is not None:
                watts[domain.name] = group_count(self.machine, domain) * domain.watts
        return watts

    @property
    def memory_joules_per_byte(self) -> float:
        """Energy of a byte of main memory; 0 if power is that of boards."""
        if not self.clusters[0].domain:
            return 0.0
        return BITS * (self.machine.device.memories[0].energy_per_bit or 0.0)


def hardware_of(machine: Machine, assumptions: Assumptions | None = None) -> Hardware:
    """The settings of a machine.

    MachineError names missing power figures, or says that there is one operating point.
    """
    require_power(machine)
    assumptions = assumptions or Assumptions()
    clusters = _clusters(machine, assumptions)
    placement = _placement(machine, clusters)
    settings = _settings(clusters, placement)
    if len(settings) == 1:
        raise MachineError(
            f"'{machine.name}' has one operating point, so there is nothing to manage: describe "
            "its other frequencies, or use a machine with several, as odroid-xu3."
        )
    if len(settings) > MOST_SETTINGS:
        raise MachineError(
            f"'{machine.name}' has {len(settings):,} settings of its clock domains, and the "
            f"simulator compares at most {MOST_SETTINGS:,}: describe fewer operating points."
        )
    return Hardware(machine, clusters, settings, assumptions, placement=placement)


def _any_rate(machine: Machine, cluster: Cluster) -> float:
    """FLOP/s of a device of a cluster on its fastest engine, at the fastest point."""
    device = machine.kinds[cluster.kind] if machine.kinds else machine.device
    return max(engine.rate for engine in device.engines) * float(cluster.clock[-1])


def _clusters(machine: Machine, assumptions: Assumptions) -> tuple[Cluster, ...]:
    clusters: list[Cluster] = []
    for domain in machine.domains:
        if not domain.points:
            continue
        kinds = [kind.key for kind in machine.kinds]
        kind = kinds.index(domain.members) if domain.members else 0
        memory = (machine.kinds[kind] if kinds else machine.device).memories[0]
        points = sorted(domain.points, key=lambda point: point.frequency)
        frequencies = np.array([point.frequency for point in points])
        groups = group_count(machine, domain)
        for group in range(groups):
            cluster = Cluster(
                name=domain.name if groups == 1 else f"{domain.name}-{group + 1}",
                domain=domain.name,
                kind=kind,
                devices=domain.devices,
                frequencies=frequencies,
                volts=np.array([point.voltage for point in points]),
                watts=np.array([[assumptions.gated_watts, *point.power] for point in points]),
                clock=frequencies / domain.points[0].frequency,
                memory_rate=memory.device_limit or memory.bandwidth * memory.efficiency,
                leakage=domain.leakage,
                switch_seconds=domain.switch or 0.0,
            )
            clusters.append(cluster)
    return tuple(clusters) or (_board_cluster(machine),)


def _board_cluster(machine: Machine) -> Cluster:
    """All devices of a machine whose operating points are those of boards."""
    device = machine.device
    points = sorted(device.points, key=lambda point: point.frequency)
    count = machine.devices
    idle_watts = count * (device.points[0].idle_power or 0.0)
    memory = device.memories[0]
    watts = np.zeros((len(points), count + 1))
    watts[:, 0] = idle_watts
    watts[:, count] = [count * point.power for point in points]
    frequencies = np.array([point.frequency for point in points])
    return Cluster(
        name="devices",
        domain="",
        kind=0,
        devices=count,
        frequencies=frequencies,
        volts=np.array([point.voltage or 0.0 for point in points]),
        watts=watts,
        clock=frequencies / device.points[0].frequency,
        # Boards have memory clocks of their own.
        memory_rate=memory.device_bandwidth / float(frequencies[0] / device.points[0].frequency),
        leakage=None,
        idle_watts=idle_watts,
    )


def _placement(machine: Machine, clusters: Sequence[Cluster]) -> Placement | None:
    """The clusters on the machine's grid, if they are the groups of one domain of all devices."""
    if len(clusters) < 2 or len({cluster.domain for cluster in clusters}) > 1 or machine.kinds:
        return None
    return placement_of(machine, clusters[0].devices)


def _settings(clusters: Sequence[Cluster], placement: Placement | None) -> tuple[Setting, ...]:
    """All combinations of active devices and points with at least one device active, equal ones
    once."""
    fastest = max(clusters, key=lambda cluster: cluster.devices * float(cluster.watts[-1, -1]))
    several = len(clusters) > 1
    options = []
    for cluster in clusters:
        counts = [cluster.devices]
        if cluster.domain and cluster.devices <= SMALL_CLUSTER and cluster is fastest:
            counts = list(range(1, cluster.devices + 1))
        points = range(len(cluster.frequencies))
        running = [(count, point) for count in counts for point in points]
        options.append([(0, 0), *running] if several else running)
    choices = {}
    for choice in _limited_product(options):
        active = tuple(count for count, _ in choice)
        points = tuple(point for _, point in choice)
        if any(active):
            choices[_same_choice(clusters, placement, active, points)] = None
    return tuple(Setting(index, *choice) for index, choice in enumerate(choices))


def _limited_product(
    options: Sequence[Sequence[tuple[int, int]]],
) -> Iterator[tuple[tuple[int, int], ...]]:
    """The combinations of the options; none of clusters beyond any simulator's reach."""
    combinations = 1
    for option in options:
        combinations *= len(option)
    if combinations > 64 * MOST_SETTINGS:
        raise MachineError(
            f"The clock domains have {combinations:,} combinations of operating points, too many "
            "to simulate: describe fewer operating points or larger domains."
        )
    return product(*options)


Choice = tuple[tuple[int, ...], tuple[int, ...]]
"""[cluster]: active devices, and operating point."""


def _same_choice(
    clusters: Sequence[Cluster],
    placement: Placement | None,
    active: tuple[int, ...],
    points: tuple[int, ...],
) -> Choice:
    """The choice that stands for all equal ones: groups of a domain in another order, or on a grid
    the reflections."""
    pairs = list(zip(active, points, strict=True))
    if placement is not None:
        pairs = max([pairs[group] for group in order] for order in placement.symmetries)
    else:
        by_domain: dict[str, list[tuple[int, int]]] = {}
        for cluster, pair in zip(clusters, pairs, strict=True):
            by_domain.setdefault(cluster.domain, []).append(pair)
        pairs = []
        for group in by_domain.values():
            pairs += sorted(group, reverse=True)
    return tuple(count for count, _ in pairs), tuple(point for _, point in pairs)
