"""Results over seeds: means, intervals over seeds and questions, paired differences, a table, figures. Nothing to run.

It trains and scores nothing: `Values` in, numbers out. Used by experiments/ablations.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metrics.intervals import crossed_interval

Values = Mapping[str, Mapping[str, float]]  # of one seed's model: percent by column and question


def matrix(by_seed: Mapping[int, Values], column: str, seeds: Sequence[int]) -> np.ndarray:
    """(seeds, questions) of one column, questions sorted. Raises ValueError where two seeds have other questions."""
    questions = sorted(by_seed[seeds[0]][column])
    if any(sorted(by_seed[seed][column]) != questions for seed in seeds):
        raise ValueError(f"{column}: the seeds {list(seeds)} answered different questions")
    return np.array([[by_seed[seed][column][question] for question in questions] for seed in seeds])


def statistics(by_seed: Mapping[int, Values]) -> dict[str, dict[str, Any]]:
    """By column: `mean`, `std` over seeds (None of one), `ci95` and the mean of each of the `seeds`."""
    seeds = sorted(by_seed)
    found = {}
    for column in by_seed[seeds[0]]:
        values_SN = matrix(by_seed, column, seeds)
        mean, *ci95 = crossed_interval(values_SN)
        means_S = values_SN.mean(1)
        std = float(means_S.std(ddof=1)) if len(seeds) > 1 else None
        found[column] = {"mean": mean, "std": std, "ci95": ci95, "seeds": dict(zip(map(str, seeds), means_S.tolist()))}
    return found


def differences(by_seed: Mapping[int, Values], others: Mapping[int, Values]) -> dict[str, dict[str, Any]]:
    """By column: mean of ours - theirs, paired by seed and question, over the seeds that both have, and `ci95`."""
    seeds = sorted(by_seed.keys() & others.keys())
    found = {}
    for column in by_seed[seeds[0]] if seeds else ():
        if by_seed[seeds[0]][column].keys() != others[seeds[0]][column].keys():
            raise ValueError(f"{column}: the two sides answered different questions")
        ours_SN, theirs_SN = matrix(by_seed, column, seeds), matrix(others, column, seeds)
        mean, *ci95 = crossed_interval(ours_SN - theirs_SN)
        means_S = (ours_SN - theirs_SN).mean(1)
        found[column] = {"mean": mean, "ci95": ci95, "seeds": dict(zip(map(str, seeds), means_S.tolist()))}
    return found


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Markdown: every row's mean ± standard deviation over seeds, then the differences with their intervals."""
    lines = ["| |" + "|".join(columns) + "|", "|---|" + "---|" * len(columns)]
    for label, row in rows.items():
        cells = [row["values"][column] for column in columns]
        shown = [f"{c['mean']:.1f}" + ("" if c["std"] is None else f" ± {c['std']:.1f}") for c in cells]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    for label, row in rows.items():
        for other, difference in row["minus"].items():
            cells = [difference[column] for column in columns]
            shown = [f"{c['mean']:+.1f} [{c['ci95'][0]:+.1f}, {c['ci95'][1]:+.1f}]" for c in cells]
            lines.append(f"| ({label}) - ({other}) | " + " | ".join(shown) + " |")
    return lines


def dots(rows: Mapping[str, Mapping[str, Any]], column: str, name: str, ax: Axes) -> None:
    """One line per row, the first on top: a small dot per seed, the mean and its 95% interval."""
    labels = list(rows)
    for place, label in enumerate(labels):
        cell = rows[label]["values"][column]
        means = list(cell["seeds"].values())
        ax.plot(means, [place + 0.2] * len(means), "o", color="tab:gray", markersize=4, label="a seed")
        low, high = cell["ci95"]
        ax.plot([low, high], [place, place], color="tab:blue", label="95% interval")
        ax.plot(cell["mean"], place, "D", color="tab:blue", markersize=6, label="mean")
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5), xlabel=f"{name} (%)")
    ax.grid(axis="x", alpha=0.3)


def dots_figure(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> Figure:
    """`dots` of several columns, given with their names, side by side."""
    figure = Figure(figsize=(2.5 + 2.6 * len(columns), 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (column, name) in zip(axes, columns.items()):
        dots(rows, column, name, ax)
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))
    figure.legend(handles.values(), handles, loc="outside lower right", ncols=3, fontsize="small")
    return figure


def forest(rows: Mapping[str, Mapping[str, Any]], column: str, ax: Axes) -> None:
    """One line per difference, the first on top: a tick per seed, the mean, its 95% interval, both as numbers.

    A row that names a `column` of its own is shown in that one.
    """
    shown = []
    for label, row in rows.items():
        own = row["column"]
        shown += [
            (f"{label} minus {other}" + (f" ({own})" if own else ""), difference[own or column])
            for other, difference in row["minus"].items()
        ]
    for place, (_, cell) in enumerate(shown):
        (low, high), means = cell["ci95"], list(cell["seeds"].values())
        colour = "tab:gray" if low <= 0 <= high else "tab:green" if low > 0 else "tab:red"
        ax.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
        ax.plot(means, [place] * len(means), "|", color="black", markersize=7, alpha=0.6)
        ax.plot(cell["mean"], place, "D", color=colour, markersize=5)
        text = f"{cell['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize="small")
    ax.set(yticks=range(len(shown)), yticklabels=[label for label, _ in shown], ylim=(len(shown) - 0.5, -0.5))
    ax.axvline(0, color="black", linewidth=0.8)
    ax.grid(axis="x", alpha=0.3)


def forest_figure(panels: Sequence[tuple[str, Mapping[str, Mapping[str, Any]], str]]) -> Figure:
    """`forest` of several (title, rows, column) above each other, on one scale; those without a difference left out."""
    nums = [sum(len(row["minus"]) for row in rows.values()) for _, rows, _ in panels]
    panels, nums = [panel for panel, num in zip(panels, nums) if num], [num for num in nums if num]
    figure = Figure(figsize=(10, 1 + 0.4 * len(nums) + 0.22 * sum(nums)), layout="constrained")
    if panels:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=nums)[:, 0]
        for ax, (title, rows, column) in zip(axes, panels):
            forest(rows, column, ax)
            ax.set_title(title, loc="right", fontsize="small", fontweight="bold")
    return figure
