"""PyTorch's recurrent layers on JAX: a product of all inputs, then one loop over time.

PyTorch's own definition would be unrolled: a step of a few hundred positions would take minutes to
compile. Packed sequences are not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

State = tuple[jax.Array, ...]
"""What a layer carries through time: (hidden,), for an LSTM (hidden, cell); each [samples, H]."""
Cell = Callable[[jax.Array, jax.Array, State], State]
"""The next state of the gates of the inputs, those of the hidden state, and the state."""


def layer(
    kind: str,
    inputs: jax.Array,
    start: State,
    weights: Sequence[jax.Array],
    has_biases: bool,
    reverse: bool,
) -> tuple[jax.Array, State]:
    """(hidden states [time, samples, H], last state) of one layer in one direction.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        inputs: [time, samples, features].
        start: The state before the first position.
        weights: As in PyTorch: of inputs, of hidden states, their two biases if there are, and the
            projection of an LSTM with `proj_size`.
        has_biases: Whether there are biases.
        reverse: Whether time runs backward.
    """
    input_weight, hidden_weight, *others = weights
    input_gates = inputs @ input_weight.T
    hidden_bias = jnp.zeros((), inputs.dtype)
    if has_biases:
        input_bias, hidden_bias, *others = others
        input_gates += input_bias

    def position(state: State, gates: jax.Array) -> tuple[State, jax.Array]:
        hidden, *cell = CELLS[kind](gates, state[0] @ hidden_weight.T + hidden_bias, state)
        for projection in others:
            hidden = hidden @ projection.T
        return (hidden, *cell), hidden

    last, outputs = jax.lax.scan(position, start, input_gates, reverse=reverse)
    return outputs, last


def _lstm(inputs: jax.Array, hidden: jax.Array, state: State) -> State:
    write, forget, new, read = jnp.split(inputs + hidden, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * state[1] + jax.nn.sigmoid(write) * jnp.tanh(new)
    return jax.nn.sigmoid(read) * jnp.tanh(cell), cell


def _gru(inputs: jax.Array, hidden: jax.Array, state: State) -> State:
    reset, update, new = jnp.split(inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(hidden, 3, axis=-1)
    candidate = jnp.tanh(new + jax.nn.sigmoid(reset + hidden_reset) * hidden_new)
    old = jax.nn.sigmoid(update + hidden_update)
    return ((1 - old) * candidate + old * state[0],)


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda inputs, hidden, state: (jnp.tanh(inputs + hidden),),
    "rnn_relu": lambda inputs, hidden, state: (jax.nn.relu(inputs + hidden),),
}


def network(
    kind: str,
    inputs: jax.Array,
    states: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    has_biases: bool,
    directions: int,
    between: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """(outputs [time, samples, directions * H], last states) of stacked layers.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        inputs: [time, samples, features].
        states: First states, each [layers * directions, samples, H].
        weights: Those of all layers and directions, in PyTorch's order.
        has_biases: Whether there are biases.
        directions: 1 or 2.
        between: Applied to the outputs of all layers but the last: dropout.
    """
    count = states[0].shape[0]
    per_layer = len(weights) // count
    last_states: list[State] = []
    outputs: list[jax.Array] = []
    for number in range(count):
        start = tuple(state[number] for state in states)
        own = weights[number * per_layer : (number + 1) * per_layer]
        is_backward = number % directions == 1
        output, last = layer(kind, inputs, start, own, has_biases, is_backward)
        last_states.append(last)
        outputs.append(output)
        if len(outputs) == directions:
            inputs = jnp.concatenate(outputs, axis=-1)
            outputs = []
            inputs = inputs if number == count - 1 else between(inputs)
    stacked: Any = zip(*last_states, strict=True)
    return inputs, [jnp.stack(states) for states in stacked]
