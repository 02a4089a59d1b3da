"""Full-graph training of graph neural networks: the graph store.

>>> import partita.gnn as gnn
>>> gnn.Graph.from_edges([0, 1], [1, 0], features=[[1.0], [2.0]])
graph: 2 vertices, 2 edges, 1 features
"""

from partita.gnn import generate, order
from partita.gnn.files import convert, open, save, transpose
from partita.gnn.graph import Graph, Transposed, check
from partita.gnn.stream import EdgeStream

__all__ = ["EdgeStream", "Graph", "Transposed", "check", "convert", "generate", "open", "order", "save", "transpose"]
