"""Copies of values between device groups: inside a process, and between processes.

`Local` is JAX's `device_put`. `Between` sends shards from process to process by
`jax.experimental.transfer`: the sender offers an array under a number, the receiver asks for it.
Both return at once, so nobody waits in Python and groups overlap. (A jitted collective in their
place blocks Python on a CPU until both sides have reached it.)

Numbers follow from the order of the step's actions, which is the same in all processes. A process
that asks for a number that nobody offers would wait forever. So the numbers are compared before the
first step, and a process that waits too long ends with a sentence (`execute.channel`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from partita.execute import members
from partita.execute.dispatch import TransferAction, Value
from partita.execute.piece_text import aval
from partita.execute.process_arrays import channel, replicated
from partita.plans.phases import DataFlow

Index = tuple[tuple[int, int], ...]
"""Per dim the first and the last element of a shard, the last one excluded."""


class HasSharding(Protocol):
    """A place that knows its devices, and how it stores a tensor."""

    @property
    def devices(self) -> Mesh: ...

    def sharding(self, tensor: int) -> NamedSharding: ...

    def destination(self, tensor: int) -> Any: ...


class Local:
    """Copies between devices of one process, asynchronous."""

    def __init__(self, places: Sequence[HasSharding]) -> None:
        self.places = places

    def start_step(self) -> None:
        """Nothing to prepare."""

    def move(self, actions: Sequence[TransferAction], arrays: Sequence[Any]) -> list[Any]:
        """The arrays as the places of the actions' targets store them."""
        targets = [action.target for action in actions]
        places = [self.places[target.place].destination(target.tensor) for target in targets]
        return jax.device_put(list(arrays), places)

    def everywhere(self, outputs: Sequence[Any]) -> list[Any]:
        """Outputs of the step, which the process has."""
        return list(outputs)


@dataclass(frozen=True)
class Message:
    """A shard that goes from a device to devices of one process."""

    number: int
    """Its position among the messages of a step."""
    source: Any
    targets: tuple[Any, ...]
    """Devices of one process."""
    part: tuple[slice, ...] | None
    """The part of the source's shard that is sent; None for all."""
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.number}: {self.source} -> {self.targets}, {self.part}, {self.shape}"


@dataclass(frozen=True)
class Route:
    """The messages of one transfer."""

    gathers: bool
    """Whether the source is gathered on its own devices first."""
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class SharedOutput:
    """An output of the step that one place has and all processes return."""

    place: int
    shape: tuple[int, ...]
    dtype: Any


class Between:
    """Copies between devices of several processes, asynchronous."""

    def __init__(
        self,
        places: Sequence[HasSharding],
        actions: Sequence[TransferAction],
        outputs: Sequence[SharedOutput],
        flow: DataFlow,
    ) -> None:
        self.places = places
        self.outputs = tuple(outputs)
        self.flow = flow
        self.process = members.index()
        self.routes: dict[Value, Route] = {}
        self.first = 0
        """Number of the first message of the running step."""
        self.count = 0
        """Messages of a step."""
        for action in actions:
            self.routes[action.target] = self._route(action)
        self.output_numbers = self._number_outputs()

    @property
    def numbers(self) -> str:
        """All messages of a step as text, the same in every process."""
        lines = []
        for value, route in self.routes.items():
            lines += [f"{value} {route.gathers} {message}" for message in route.messages]
        return "\n".join([*lines, str(self.output_numbers), str(self.outputs)])

    def start_step(self) -> None:
        """Takes numbers for the messages of a step."""
        self.first = channel().reserve(self.count)

    def _aval(self, tensor: int) -> Any:
        return aval(self.flow.graph.tensors[tensor])

    # -------------------------------------------------------------------------------------- routes

    def _route(self, action: TransferAction) -> Route:
        """The messages of a transfer: from a device of the same process where one has the shard."""
        source, target = action.source, action.target
        shape = self._aval(target.tensor).shape
        sources = _indices(self.places[source.place].sharding(source.tensor), shape)
        targets: dict[tuple[int, Index], list[Any]] = defaultdict(list)
        for device, index in _indices(
            self.places[target.place].sharding(target.tensor), shape
        ).items():
            targets[device.process_index, index].append(device)
        gathers = not {index for _, index in targets} <= set(sources.values())
        messages = []
        for (process, index), devices in targets.items():
            having = [d for d, own in sources.items() if gathers or own == index]
            nearest = min(having, key=lambda d: (d.process_index != process, d.id))
            part = tuple(slice(*ends) for ends in index) if gathers else None
            size = tuple(last - first for first, last in index)
            messages.append(Message(self.count, nearest, tuple(devices), part, size))
            self.count += 1
        return Route(gathers, tuple(messages))

    def _number_outputs(self) -> dict[tuple[int, int], int]:
        """(place, process that is not of it) -> the number of the message with its outputs."""
        numbers = {}
        for place in sorted({output.place for output in self.outputs}):
            for process in sorted(set(members.alive()) - set(self._processes(place))):
                numbers[place, process] = self.count
                self.count += 1
        return numbers

    def _processes(self, place: int) -> list[int]:
        """The processes of a place, that of its first device first."""
        devices = self.places[place].devices.devices.flat
        return list(dict.fromkeys(device.process_index for device in devices))

    # ---------------------------------------------------------------------------------- transfers

    def move(self, actions: Sequence[TransferAction], arrays: Sequence[Any]) -> list[Any]:
        """The arrays as the places of the actions' targets store them; None if that is elsewhere.

        An array is None in processes that do not have it.
        """
        return [self._move(*move) for move in zip(actions, arrays, strict=True)]

    def _move(self, action: TransferAction, array: Any) -> Any:
        """The array of one transfer."""
        route = self.routes[action.target]
        if array is not None and route.gathers:
            array = replicated(array)
        received: dict[Any, Any] = {}
        for message in route.messages:
            is_source = message.source.process_index == self.process
            is_target = message.targets[0].process_index == self.process
            if is_source:
                part = _shard(array, message.source)
                if message.part is not None:
                    part = part[message.part]
                if is_target:
                    received.update((d, jax.device_put(part, d)) for d in message.targets)
                else:
                    # A later piece may take over the memory of old state.
                    is_state = action.source.tensor in self.flow.roles
                    channel().offer(self.first + message.number, [part], copies=is_state)
            elif is_target:
                received.update(self._received(message, action))
        if not received:
            return None
        target = action.target
        sharding = self.places[target.place].sharding(target.tensor)
        own = [received[device] for device in sharding.addressable_devices]
        shape = self._aval(target.tensor).shape
        return jax.make_array_from_single_device_arrays(shape, sharding, own)

    def _received(self, message: Message, action: TransferAction) -> dict[Any, Any]:
        """Target device -> the shard that another process sends."""
        first = message.targets[0]
        dtype = self._aval(action.target.tensor).dtype
        shape = jax.ShapeDtypeStruct(message.shape, dtype, sharding=SingleDeviceSharding(first))
        name = self.flow.name(action.source.tensor)
        if action.target.microbatch >= 0:
            name += f" of microbatch {action.target.microbatch}"
        peer = message.source.process_index
        (array,) = channel().ask(peer, self.first + message.number, [shape], name)
        return {device: jax.device_put(array, device) for device in message.targets}

    def everywhere(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs of the step on a device of this process; None are those of other places."""
        results = list(outputs)
        for place in sorted({output.place for output in self.outputs}):
            positions = [n for n, output in enumerate(self.outputs) if output.place == place]
            members = self._processes(place)
            if self.process in members:
                for n in positions:
                    array = results[n]
                    if not array.is_fully_replicated:
                        array = replicated(array)
                    results[n] = array.addressable_data(0)
            self._share(place, members[0], positions, results)
        return results

    def _share(self, place: int, owner: int, positions: list[int], results: list[Any]) -> None:
        """Sends outputs of a place to the processes that are not of it."""
        for (of_place, process), number in self.output_numbers.items():
            if of_place != place:
                continue
            if owner == self.process:
                arrays = [results[n] for n in positions]
                channel().offer(self.first + number, arrays, copies=False)
            elif process == self.process:
                here = SingleDeviceSharding(jax.local_devices()[0])
                shapes = []
                for n in positions:
                    output = self.outputs[n]
                    shapes.append(jax.ShapeDtypeStruct(output.shape, output.dtype, sharding=here))
                received = channel().ask(owner, self.first + number, shapes, "the step's outputs")
                for n, array in zip(positions, received, strict=True):
                    results[n] = array


def _indices(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Index]:
    """Device -> the elements of an array that it has."""
    indices = {}
    for device, slices in sharding.devices_indices_map(shape).items():
        ends = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=True)]
        indices[device] = tuple(ends)
    return indices


def _shard(array: Any, device: Any) -> Any:
    """The part of an array on one device."""
    for shard in array.addressable_shards:
        if shard.device == device:
            return shard.data
    raise AssertionError("the device has a part")
