"""Keras layers over all vertices that give one device's numbers however a graph is split."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class VertexDropout(keras.layers.Layer):
    """Dropout whose pattern depends on the vertex and not on the device.

    The numbers are the same however a graph is split.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator()
        self.built = True

    def call(self, x: Any, graph: Block, training: bool = False, column: Any = 0) -> Any:
        """x [rows, columns] after dropout; `column` is the number of its first column."""
        if not training or not self.rate:
            return x
        seed = jnp.asarray(self.seed_generator.next()).astype(jnp.uint32)
        vertex = graph.vertex
        if vertex is None:
            vertex = graph.first[0] + jnp.arange(x.shape[0], dtype=jnp.int32)
        first_column = jnp.asarray(column).astype(jnp.uint32)
        columns = jnp.arange(x.shape[1], dtype=jnp.uint32) + first_column
        row_bits = _mix(vertex.astype(jnp.uint32) ^ seed[0])
        column_bits = _mix(columns + seed[1])
        bits = _mix(row_bits[:, None] + column_bits)
        stays = bits >= jnp.uint32(min(self.rate * 2.0**32, 2**32 - 1))
        return jnp.where(stays, x / (1 - self.rate), 0)

    def save_own_variables(self, store: Any) -> None:
        """Saves the seed, which Keras's own Dropout forgets: loaded training continues."""
        store["seed"] = np.asarray(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        self.seed_generator.state.assign(np.asarray(store["seed"]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(PACKAGE)
class VertexBatchNormalization(keras.layers.Layer):
    """Batch normalization over all vertices (Ioffe and Szegedy 2015, alg. 1), on any devices.

    Mean and variance are of the vertices of all devices, as on one. The moving ones, of momentum
    `momentum`, normalize in evaluation, as in `keras.layers.BatchNormalization`.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **options: Any) -> None:
        super().__init__(**options)
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(shape=shape, initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta")
        self.moving_mean = self.add_weight(
            shape=shape, initializer="zeros", trainable=False, name="moving_mean"
        )
        self.moving_variance = self.add_weight(
            shape=shape, initializer="ones", trainable=False, name="moving_variance"
        )

    def call(self, x: Any, graph: Block, training: bool = False) -> Any:
        rows = jnp.asarray(x).astype(jnp.float32)
        mean = jnp.asarray(keras.ops.convert_to_tensor(self.moving_mean, "float32"))
        variance = jnp.asarray(keras.ops.convert_to_tensor(self.moving_variance, "float32"))
        if training:
            mean, variance = self._moments(rows, graph, mean, variance)
        gamma: Any = keras.ops.convert_to_tensor(self.gamma, "float32")
        beta: Any = keras.ops.convert_to_tensor(self.beta, "float32")
        scale = gamma * (variance + self.epsilon) ** -0.5
        return ((rows - mean) * scale + beta).astype(x.dtype)

    def _moments(self, rows: Any, graph: Block, mean: Any, variance: Any) -> tuple[Any, Any]:
        """Mean and variance of all vertices, which move the moving ones."""
        batch_mean = graph.vertex_mean(rows)
        batch_variance = graph.vertex_mean((rows - batch_mean) ** 2)
        stays = self.momentum
        self.moving_mean.assign(stays * mean + (1 - stays) * batch_mean)
        self.moving_variance.assign(stays * variance + (1 - stays) * batch_variance)
        return batch_mean, batch_variance

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


def _mix(bits: Any) -> Any:
    """Every bit of a uint32 spread over all others (the integer hash 'lowbias32' of C. Wellons)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
