"""Policies on a simulated machine as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from partita.management.comparison import PolicyComparison
from partita.management.hardware import Assumptions
from partita.management.power import PowerRun
from partita.management.replay import Prices, Replay
from partita.report.tables import add_columns, add_row, new_table
from partita.units import format_flops, format_joules, format_seconds

UNCERTAIN = ("recalled", "assumed")
"""Statuses of figures that nobody measured or read."""


def policy_table(comparison: PolicyComparison) -> Table:
    """A row per policy, the best one first."""
    table = new_table(
        f"{comparison.program} on {comparison.machine}, hardware {comparison.hardware}: "
        f"{comparison.steps:,} steps"
    )
    name, *figures = policy_columns(comparison)
    table.add_column(name, no_wrap=True)
    add_columns(table, *figures)
    for run in by_product(comparison):
        add_row(table, *policy_row(comparison, run))
    return table


def by_product(comparison: PolicyComparison) -> list[PowerRun]:
    """The runs of a comparison by their energy-delay product, the best one first."""
    return sorted(comparison.runs, key=lambda run: run.energy_delay)


def policy_columns(comparison: PolicyComparison) -> list[str]:
    """Names of the columns of `policy_row`."""
    has_heat = comparison.oracle.peak_celsius is not None
    heat_columns = ("peak °C", "throttled") if has_heat else ()
    return ["policy", "energy", "time", "J s", "per J", *heat_columns, "regret"]


def policy_row(comparison: PolicyComparison, run: PowerRun) -> list[str]:
    """The figures of a run as text."""
    heat = []
    if run.peak_celsius is not None:
        heat = [f"{run.peak_celsius:.0f}", f"{run.throttled:.0%}"]
    return [
        run.policy,
        format_joules(run.joules),
        format_seconds(run.seconds),
        f"{run.energy_delay:,.0f}",
        format_flops(comparison.flops_per_joule(run)),
        *heat,
        f"{comparison.regret(run):+.1%}",
    ]


def policy_summary(comparisons: Sequence[PolicyComparison], steps: int | None = None) -> list[str]:
    """The meaning of the columns, and the figures that the results rest on.

    `steps`: the training steps that were asked for.
    """
    first = comparisons[0]
    assumptions = Assumptions()
    lines = [
        "J s: E x T. regret: its excess over the clairvoyant oracle's. per J: FLOPs of a joule, "
        "the performance per watt.",
        "All figures are simulated. Hardware 'as described' hides the efficiency of each kernel; "
        "'not as described' also has 30 % less memory bandwidth and a steeper power curve.",
        f"Assumed: {assumptions.serial:.0%} of a kernel runs on one device, and a step waits "
        f"{format_seconds(assumptions.batch_seconds)} a second for its batch.",
    ]
    if steps not in (None, first.steps):
        lines.append(
            f"{steps:,} steps are rounded to {first.steps:,}: a run is simulated in whole passes "
            "of about 1 s."
        )
    for noun, status in (("Times", first.status), ("Joules", first.power_status)):
        if status in UNCERTAIN:
            lines.append(
                f"{noun} rest on {status} figures: run 'partita machine show {first.machine}'."
            )
    return lines


def replay_table(replays: Sequence[Replay], title: str) -> Table:
    """A row per policy of plan changes; the first replay is the oracle's."""
    table = new_table(title)
    name, *figures = replay_columns()
    table.add_column(name, no_wrap=True)
    add_columns(table, *figures)
    for run in sorted(replays, key=lambda run: -run.steps):
        add_row(table, *replay_row(run, replays[0]))
    return table


def replay_columns() -> list[str]:
    """Names of the columns of `replay_row`."""
    return ["policy", "steps", "changes", "price", "behind the oracle"]


def replay_note() -> str:
    """The prices that replays rest on."""
    prices = Prices()
    return (
        f"Assumed: a plan compiles in {prices.compile:g} s and the state moves in "
        f"{prices.move:g} s; a restart costs {prices.restart:g} s. All figures are simulated."
    )


def replay_row(run: Replay, oracle: Replay) -> list[str]:
    """The figures of a replay as text."""
    is_oracle = run is oracle
    price = sum(change.price for change in run.changes)
    return [
        run.policy,
        f"{run.steps:,.0f}",
        "" if is_oracle else f"{len(run.changes)}",
        "" if is_oracle else format_seconds(price),
        f"{1 - run.steps / oracle.steps:.1%}",
    ]
