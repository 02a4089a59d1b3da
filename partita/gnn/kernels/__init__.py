"""Aggregations over in-edges, one a file, each with its gradient; `bridge` is how XLA calls them on a CPU."""
