"""Results over seeds: means, intervals over seeds and questions, paired differences, tables and figures.

It trains and scores nothing. experiments/ablations.py uses it, and experiments/demo.py its tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from metrics.intervals import Values, crossed_interval, in_points, matrix, paired_difference

BySeed = Mapping[int, Mapping[str, Values]]  # one arm's models: percent by seed, column and question
Rows = Mapping[str, Mapping[str, Any]]  # the rows of a question in results.json, by label


# ---- numbers ---------------------------------------------------------------------------------------------------------
def statistics(by_seed: BySeed) -> dict[str, dict[str, Any]]:
    """By column: `mean`, `std` over seeds (None for a single seed), `ci95`, and the mean of each of the `seeds`.

    Raises ValueError where the seeds answered different questions.
    """
    found = {}
    for column in next(iter(by_seed.values())):
        values_SN = matrix([by_seed[seed][column] for seed in sorted(by_seed)])
        mean, *ci95 = crossed_interval(values_SN)
        means = dict(zip(map(str, sorted(by_seed)), values_SN.mean(1).tolist()))
        std = float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None
        found[column] = {"mean": mean, "std": std, "ci95": ci95, "seeds": means}
    return found


def differences(by_seed: BySeed, others: BySeed) -> dict[str, dict[str, Any]]:
    """By column: the mean of ours - theirs over the seeds that both have, `ci95`, and the mean of each of the `seeds`.

    Pairs are of the same seed and question. Raises ValueError where the two sides answered different questions.
    """
    shared = sorted(by_seed.keys() & others.keys())
    found = {}
    for column in by_seed[shared[0]] if shared else ():
        theirs, ours = ([side[seed][column] for seed in shared] for side in (others, by_seed))
        mean, *ci95 = paired_difference(theirs, ours)
        means = (matrix(ours) - matrix(theirs)).mean(1).tolist()
        found[column] = {"mean": mean, "ci95": ci95, "seeds": dict(zip(map(str, shared), means))}
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------
def markdown(columns: Sequence[str], rows: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """The lines of a table; a row is its label and its cells."""
    head = ["| |" + "|".join(columns) + "|", "|---|" + "---|" * len(columns)]
    return head + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]


def with_std(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def table(rows: Rows, columns: Sequence[str]) -> list[str]:
    """Every row's mean and standard deviation over seeds, then the differences with their intervals."""
    found = []
    for label, row in rows.items():
        cells = [row["values"][column] for column in columns]
        found.append((label, [with_std(cell["mean"], cell["std"]) for cell in cells]))
    for label, row in rows.items():
        for other, difference in row["minus"].items():
            cells = [difference[column] for column in columns]
            found.append((f"({label}) - ({other})", [in_points((cell["mean"], *cell["ci95"])) for cell in cells]))
    return markdown(columns, found)


# ---- figures ---------------------------------------------------------------------------------------------------------
def dots(rows: Rows, column: str, ax: Axes) -> None:
    """One line for each row, the first on top: a small dot for each seed, the mean and its 95% interval."""
    for place, row in enumerate(rows.values()):
        _mark(ax, place, row["values"][column], "tab:blue")
    _label(ax, list(rows))


def forest(rows: Rows, column: str, ax: Axes) -> None:
    """One line for each difference, as in `dots`, coloured where the interval is clear of 0, and with the numbers.

    A row that names a `column` of its own is shown in that one.
    """
    shown = {}
    for label, row in rows.items():
        own = row["column"]
        for other, difference in row["minus"].items():
            shown[f"{label} minus {other}" + (f" ({own})" if own else "")] = difference[own or column]
    for place, cell in enumerate(shown.values()):
        low, high = cell["ci95"]
        _mark(ax, place, cell, "tab:gray" if low <= 0 <= high else "tab:green" if low > 0 else "tab:red")
        text = in_points((cell["mean"], low, high))
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize="small")
    ax.axvline(0, color="black", linewidth=0.8)
    _label(ax, list(shown))


def _mark(ax: Axes, place: int, cell: Mapping[str, Any], colour: str) -> None:
    means = list(cell["seeds"].values())
    ax.plot(means, [place + 0.2] * len(means), "o", color="tab:gray", markersize=4, label="a seed")
    ax.plot(cell["ci95"], [place, place], color=colour, label="95% interval")
    ax.plot(cell["mean"], place, "D", color=colour, markersize=6, label="mean")


def _label(ax: Axes, labels: Sequence[str]) -> None:
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    ax.grid(axis="x", alpha=0.3)
