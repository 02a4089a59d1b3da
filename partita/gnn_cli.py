"""`partita gnn`: graphs for full-graph training, made, converted and looked at. Parse, call `partita.gnn`, print.

What it calls is imported inside the commands, so that other commands do not wait for it.
"""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Full-graph training of graph neural networks: make, convert and look at graphs.")


@app.callback()
def gnn() -> None:
    """Full-graph training of graph neural networks: make, convert and look at graphs."""
