"""A Keras layer over several kinds of edges (`Graph.from_relations`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.data.arrays import as_count
from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import PACKAGE, AbstractConv, product
from partita.gnn.nn.pieces import BlockPiece


@keras.saving.register_keras_serializable(PACKAGE)
class RelationalConv(AbstractConv):
    """Graph convolution with a matrix for every kind of edges (Schlichtkrull et al. 2018, eq. 2).

    The result for a vertex is its own row times a matrix plus, for each of `relations` kinds, the
    mean (or 'sum') over its in-edges of that kind times the kind's matrix. With `bases`, matrices
    are combinations of that many (eq. 3). Edge features mark kinds, as `Graph.from_relations` makes
    them. The sums pass over all edges once for each kind.
    """

    OPTIONS = ("relations", "aggregation", "bases", "root_weight")

    def __init__(
        self,
        units: int,
        relations: int,
        *,
        aggregation: str = "mean",
        bases: int | None = None,
        root_weight: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        if aggregation not in ("mean", "sum"):
            raise GraphError(f"aggregation={aggregation!r} is unknown: use 'mean' or 'sum'.")
        self.relations = as_count("relations", relations, 1)
        self.aggregation = aggregation
        self.bases = None if bases is None else as_count("bases", bases, 1)
        self.root_weight = root_weight

    def build(self, input_shape: Any) -> None:
        width = self.width_of(input_shape)
        self.kernels = self.add_weight(
            shape=(self.bases or self.relations, width, self.units),
            initializer="glorot_uniform",
            regularizer=self.kernel_regularizer,
            name="kernels",
        )
        self.shares = None
        if self.bases is not None:
            self.shares = self.matrix("shares", self.relations, self.bases)
        self.own = self.matrix("own", width, self.units) if self.root_weight else None
        self.shift = self.bias()

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        def convolve(graph: Block, column: Any, x: Any) -> tuple[Any]:
            total = self._of_edges(graph, x)
            if self.own is not None:
                total = total + product(x, self.own)
            return (self.finished(total, self.shift),)

        return (BlockPiece("whole", ("x",), ("y",), convolve),)

    def _of_edges(self, graph: Block, x: Any) -> Any:
        """[rows, units]: the sum over kinds of aggregated rows times the kind's matrix."""
        ones = jnp.ones((x.shape[0], 1), x.dtype)
        sums = graph.sums_by_feature(jnp.concatenate([x, ones], axis=1))
        kinds = sums.shape[1]
        if kinds != self.relations:
            raise GraphError(
                f"RelationalConv {self.name!r} has relations={self.relations}, and the graph has "
                f"{kinds} edge features: make it with relations={kinds}."
            )
        rows, counts = sums[:, :, :-1], sums[:, :, -1:]
        if self.aggregation == "mean":
            rows = rows / jnp.maximum(counts, 1)
        kernels: Any = keras.ops.convert_to_tensor(self.kernels, x.dtype)
        if self.shares is None:
            return jnp.einsum("vrf,rfu->vu", rows, kernels)
        shares: Any = keras.ops.convert_to_tensor(self.shares, x.dtype)
        of_bases = jnp.einsum("vrf,rb->vbf", rows, shares)
        return jnp.einsum("vbf,bfu->vu", of_bases, kernels)
