"""Metrics over steps as the lines of small plots: fewer points, round ticks, places in a square.

Not a reader of files, and no markup: report.html.j2 draws what stands here. Nothing to run.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # steps and values, (N,) each
Series = dict[str, Curve]  # of one run, by metric


class Stack(NamedTuple):
    """Metrics drawn on top of each other, in the section it is named after."""

    title: str
    layers: str  # pattern of their names
    whole: str | None = None  # the metric that they are parts of; None: of 1
    part_of_a_part: str | None = None  # a metric that is no layer of its own

    def has(self, name: str) -> bool:
        return fnmatch(name, self.layers) and name not in (self.whole, self.part_of_a_part)


MAX_POINTS = 80  # of a line; those of a longer run are means of as many buckets
MAX_DOTS = 30  # a line of at most so many points has a dot at each
SIDE = 1000  # of the square that lines are drawn in, y downwards
SECTIONS = {  # title: metrics, in this order; each is drawn where it is first named
    "Reward": ("reward/total", "reward/*"),
    "Validation": ("validation/score", "validation/*/miou", "validation/*/accuracy", "validation/*/acc_gqa"),
    "Groups": ("group/*",),
    "Completions": ("length/*", "frac_truncated"),
    "Policy": ("loss", "kl", "entropy", "clip_frac", "grad_norm", "lr", "logp_gap/*"),
    "Speed": ("time/step", "tokens_per_s"),
    "Memory": ("memory/*",),
    "Others": ("*",),
}
STACKS = {
    "Groups": Stack("shares of groups", "group/frac_*"),
    "Speed": Stack("time per step by phase", "time/*", whole="time/step", part_of_a_part="time/data_wait"),
}
UNITS = {
    "length/*": "tokens",
    "tokens/*": "tokens",
    "kl": "nats per token",
    "entropy": "nats per token",
    "logp_gap/*": "nats per token",
    "time*": "s",
    "tokens_per_s": "tokens/s",
    "memory/*": "GiB",
    "validation/num_*": "",
    "validation/*": "%",
}


def downsample(steps: np.ndarray, values: np.ndarray, num: int = MAX_POINTS) -> np.ndarray:
    """(M, 4), M <= num: mean step, and mean, least and greatest value, of buckets of as many rows each.

    What is not finite does not count; a bucket of nothing else is nan.

    >>> downsample(np.arange(4), np.array([1.0, 3.0, np.nan, np.inf]), 2).tolist()
    [[0.5, 2.0, 1.0, 3.0], [2.5, nan, nan, nan]]
    """
    edges, rows = np.linspace(0, len(steps), min(num, len(steps)) + 1).astype(int), []
    for start, stop in pairwise(edges):
        finite = values[start:stop][np.isfinite(values[start:stop])]
        numbers = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        rows.append((steps[start:stop].mean(), *numbers))
    return np.array(rows)


def nice_ticks(low: float, high: float) -> list[float]:
    """2 to 6 round numbers, evenly spaced, the first at most `low` and the last at least `high`.

    The first is 0 where that wastes less than half of the range.

    >>> nice_ticks(0.31, 0.74), nice_ticks(38.9, 50.3)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [35.0, 40.0, 45.0, 50.0, 55.0])
    """
    if 0 < low <= high / 2:
        low = 0.0
    if high - low <= max(1e-30, 1e-9 * abs(low), 1e-9 * abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 5, 10):
        step = power * factor
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < 6:
            break
    return [round(i * step, 1 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """As many decimals as tell ticks apart.

    >>> tick_labels([1000.0, 1000.5, 1001.0]), tick_labels([0.0, 2e-6])
    (['1,000.0', '1,000.5', '1,001.0'], ['0', '2e-06'])
    """
    if max(map(abs, ticks)) < 1e-3:
        return [f"{tick:g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def sections(runs: Mapping[str, Series]) -> list[dict[str, Any]]:
    """What is drawn of runs, by name: [{title, panels, constant}]; a panel has a line for every run with the metric.

    `constant` has metrics with one and the same value in all rows, which are no curves.
    """
    left = sorted(set().union(*runs.values()))
    ends = [steps[[0, -1]] for series in runs.values() for steps, _ in series.values()]
    span = (float(np.min(ends)), float(np.max(ends))) if ends else (0.0, 0.0)
    found = []
    for title, patterns in SECTIONS.items():
        panels, constant = [], {}
        for run, series in runs.items() if title in STACKS else ():
            panels += [stacked | {"run": run} for stacked in stack(series, span, STACKS[title])]
        if panels:
            left = [name for name in left if not STACKS[title].has(name)]
        for name in dict.fromkeys(name for pattern in patterns for name in left if fnmatch(name, pattern)):
            curves = [series.get(name) for series in runs.values()]
            values = np.unique(np.concatenate([curve[1] for curve in curves if curve]))
            if len(values) == 1:
                constant[name] = float(values[0])
            else:
                panels.append(panel(name, curves, span))
            left.remove(name)
        found.append({"title": title, "panels": panels, "constant": constant})
    return [section for section in found if section["panels"] or section["constant"]]


def panel(name: str, curves: Sequence[Curve | None], span: tuple[float, float]) -> dict[str, Any]:
    """One metric: a line for each run that has it, with a band from least to greatest where points are means."""
    drawn = [None if curve is None else downsample(*curve) for curve in curves]
    all_M4 = np.concatenate([line for line in drawn if line is not None])
    finite = all_M4[np.isfinite(all_M4[:, 1])]
    ticks = nice_ticks(finite[:, 2].min(), finite[:, 3].max()) if len(finite) else [0.0, 1.0]
    lines = [_line(i, line, span, ticks) for i, line in enumerate(drawn) if line is not None]
    num_bad = sum(int((~np.isfinite(curve[1])).sum()) for curve in curves if curve is not None)
    return _panel(name, lines, ticks, span) | {"num_bad": num_bad}


def stack(series: Series, span: tuple[float, float], of: Stack) -> list[dict[str, Any]]:
    """One panel, or none: layers of a run on top of each other, in the end `other`, what they leave of the whole."""
    names = [name for name in series if of.has(name)]
    if not names or (of.whole and of.whole not in series):
        return []
    steps, total = series[of.whole or names[0]]
    total = np.ones(len(steps)) if of.whole is None else np.nan_to_num(total)
    top, tops = np.zeros(len(steps)), {}
    for name in names:
        if len(series[name][1]) == len(steps):
            tops[name.rpartition("/")[2].removeprefix("frac_")] = top = top + np.nan_to_num(series[name][1])
    if (total - top).max() > 1e-6:
        tops["other"] = top = np.maximum(top, total)
    drawn = {name: downsample(steps, values) for name, values in tops.items()}
    ticks = [0.0, 0.5, 1.0] if of.whole is None else nice_ticks(0.0, downsample(steps, top)[:, 1].max())
    lines = [_line(i, line[:, [0, 1, 1, 1]], span, ticks) | {"name": n} for i, (n, line) in enumerate(drawn.items())]
    return [_panel(of.title, lines, ticks, span) | {"stacked": True}]


def _panel(
    title: str, lines: list[dict[str, Any]], ticks: Sequence[float], span: tuple[float, float]
) -> dict[str, Any]:
    unit = next((unit for pattern, unit in UNITS.items() if fnmatch(title, pattern)), "")
    frame = {"title": title, "unit": unit, "ticks": ticks, "labels": tick_labels(ticks), "span": span}
    return frame | {"lines": lines, "num_bad": 0, "stacked": False, "run": ""}


def _line(index: int, line_M4: np.ndarray, span: tuple[float, float], ticks: Sequence[float]) -> dict[str, Any]:
    """Points as SVG has them, one text for each stretch without a gap; likewise the outline of the band."""
    width, height = span[1] - span[0] or 1.0, ticks[-1] - ticks[0]
    x_M = SIDE * ((line_M4[:, 0] - span[0]) / width if span[1] > span[0] else np.full(len(line_M4), 0.5))
    y_M3 = SIDE * (1 - (line_M4[:, 1:] - ticks[0]) / height)
    points, bands = [], []
    gaps = np.flatnonzero(np.isnan(y_M3[:, 0]))
    for part in np.split(np.arange(len(x_M)), gaps):
        part = part[np.isfinite(y_M3[part, 0])]
        if not len(part):
            continue
        points.append(_points(x_M[part], y_M3[part, 0]))
        if (y_M3[part, 1] != y_M3[part, 2]).any():
            bands.append(_points(x_M[part], y_M3[part, 1]) + " " + _points(x_M[part][::-1], y_M3[part, 2][::-1]))
    few = sum(text.count(" ") + 1 for text in points) <= MAX_DOTS
    return {"index": index, "points": points, "bands": bands, "dots": few}


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.2f},{b:.1f}" for a, b in zip(x, y))
