"""Keras layers over all vertices that give one device's numbers however a graph is split."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from partita.errors import GraphError
from partita.gnn.kernels.pairs import PairPattern, least_bits, mix
from partita.gnn.nn.block import Block, TakesGraph
from partita.gnn.nn.layers import PACKAGE


class SeededDropout(keras.layers.Layer):
    """Dropout with a seed that is saved, so that loaded training continues.

    Keras's own Dropout forgets its seed. Without a rate there is none.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
            raise GraphError(
                f"The dropout of {rate!r} is out of range: give a number from 0 to below 1."
            )
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator() if self.draws() else None
        self.built = True

    def draws(self) -> bool:
        """Whether the layer has a seed."""
        return self.rate > 0

    def next_seed(self) -> Any:
        """uint32 [2]: the next seed."""
        assert self.seed_generator is not None
        return jnp.asarray(self.seed_generator.next()).astype(jnp.uint32)

    def save_own_variables(self, store: Any) -> None:
        if self.seed_generator is not None:
            store["seed"] = np.asarray(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        if self.seed_generator is not None:
            self.seed_generator.state.assign(np.asarray(store["seed"]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(PACKAGE)
class VertexDropout(TakesGraph, SeededDropout):
    """Dropout whose pattern depends on the vertex and not on the device.

    The numbers are the same however a graph is split.
    """

    def draws(self) -> bool:
        return True

    def call(self, x: Any, graph: Block, training: bool = False, column: Any = 0) -> Any:
        """x [rows, ...] after dropout; `column` is the number of its first column."""
        if not training or not self.rate:
            return x
        seed = self.next_seed()
        vertex = graph.vertex
        if vertex is None:
            # a memory plan gives some rows of the block
            vertex = graph.first[0] + jnp.arange(x.shape[0], dtype=jnp.int32)
        first_column = jnp.asarray(column).astype(jnp.uint32)
        columns = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32) + first_column
        row_bits = mix(vertex.astype(jnp.uint32) ^ seed[0])
        column_bits = mix(columns + seed[1])
        bits = mix(row_bits[:, None] + column_bits).reshape(x.shape)
        return jnp.where(bits >= least_bits(self.rate), x / (1 - self.rate), 0)

    def compute_output_shape(self, input_shape: Any, *_: Any) -> Any:
        return input_shape


@keras.saving.register_keras_serializable(PACKAGE)
class PairDropout(SeededDropout):
    """Dropout of values per edge and head, whose pattern depends on the numbers of both vertices.

    The numbers are the same however a graph is split.
    """

    def pattern(self, heads: int, first_head: Any, source: Any, target: Any) -> PairPattern:
        """The pattern of the next seed, for heads from `first_head` on.

        `source` and `target`, int32, are the numbers of the vertices at the ends of edges.
        """
        seed = self.next_seed()
        numbers = jnp.arange(heads, dtype=jnp.uint32) + jnp.asarray(first_head).astype(jnp.uint32)
        return PairPattern(
            mix(source.astype(jnp.uint32) ^ seed[0]).astype(jnp.int32),
            target,
            mix(numbers + seed[1]).astype(jnp.int32),
            jnp.full(1, least_bits(self.rate)).astype(jnp.int32),
            jnp.full(1, 1 / (1 - self.rate), jnp.float32),
        )


@keras.saving.register_keras_serializable(PACKAGE)
class VertexBatchNormalization(TakesGraph, keras.layers.Layer):
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

    def compute_output_shape(self, input_shape: Any, *_: Any) -> Any:
        return input_shape

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
