"""Aggregations over in-edges, one per file, each with its gradient.

`bridge` connects them to XLA on a CPU; `codegen` generates instructions that numba would not.
"""
