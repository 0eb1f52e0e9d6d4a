"""Metrics over steps, drawn by matplotlib as SVG in the colours and the font of the page around it."""

import io
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curve = tuple[np.ndarray, np.ndarray]  # steps and values, (N,) each
Series = dict[str, Curve]  # of one run, by metric

MAX_POINTS = 80  # of a line; a point of a longer run is the mean of many steps
MAX_DOTS = 30  # a line of at most so many points has a dot at each
NATS = "nats per token"
SECTIONS = {  # title: metrics in this order and their units; each is drawn where it is first named
    "Reward": {"reward/total": "", "reward/*": ""},
    "Validation": {"validation/score": "%", "validation/*/miou": "%", "validation/*/acc*": "%"},
    "Groups": {"group/*": ""},
    "Completions": {"length/*": "tokens", "frac_truncated": ""},
    "Policy": {"loss": "", "kl": NATS, "entropy": NATS, "clip_frac": "", "grad_norm": "", "lr": "", "logp_gap/*": NATS},
    "Speed": {"time/step": "s", "tokens_per_s": "tokens/s", "time/*": "s"},
    "Memory": {"memory/*": "GiB"},
    "Others": {"validation/num_*": "", "validation/*": "%", "tokens/*": "tokens", "*": ""},
}
TOGETHER = {  # section: metrics that each run has one plot of, beside those that the section names
    "Groups": ("shares of groups", "group/frac_*"),
    "Speed": ("time by phase", "time/*"),
}
COLOURS = [f"#0000c{i}" for i in range(8)]  # stand for --c0 to --c7 of the page, which has them light and dark
STYLES = ("-", "--", ":")  # of four lines each, because colour-blind readers see only four colours apart
GRID = "#0000cd"  # stands for --cd
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "axes.formatter.useoffset": False}


def number(value: float | None) -> str:
    """Three significant digits, or all that stand before the point.

    >>> number(0.12345), number(123456), number(0.00001)
    ('0.123', '123,456', '1e-05')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e12 else f"{value:.3g}"


def finite(curve: Curve) -> Curve:
    """The steps whose value is a finite number."""
    return curve[0][np.isfinite(curve[1])], curve[1][np.isfinite(curve[1])]


def downsample(steps: np.ndarray, values: np.ndarray, num: int = MAX_POINTS) -> np.ndarray:
    """(M, 4), M <= num: mean step, and mean, least and greatest value, of buckets of as many rows each.

    Values that are not finite do not count, and a bucket without a finite value is nan.

    >>> downsample(np.arange(4), np.array([1.0, 3.0, np.nan, np.inf]), 2).tolist()
    [[0.5, 2.0, 1.0, 3.0], [2.5, nan, nan, nan]]
    """
    rows = []
    for bucket in zip(*(np.array_split(column, min(num, len(steps))) for column in (steps, values))):
        _, counted = finite(bucket)
        numbers = (counted.mean(), counted.min(), counted.max()) if len(counted) else [np.nan] * 3
        rows.append((bucket[0].mean(), *numbers))
    return np.array(rows)


def sections(runs: Mapping[str, Series]) -> list[dict[str, Any]]:
    """What is drawn of runs, by name: [{title, panels, constant}]; a panel has a line for every run with the metric.

    `constant` has metrics with one and the same value in all rows, which are not drawn.
    """
    left, found = sorted(set().union(*runs.values())), []
    last = max((steps[-1] for series in runs.values() for steps, _ in series.values()), default=1)
    for title, patterns in SECTIONS.items():
        units: dict[str, str] = {}
        for pattern, unit in patterns.items():
            units |= {name: unit for name in left if fnmatch(name, pattern) and name not in units}
        left = [name for name in left if name not in units]
        heading, pattern = TOGETHER.get(title, ("", ""))
        together = [name for name in units if fnmatch(name, pattern) and name not in patterns]
        panels, constant = [], {}
        for run, series in runs.items():
            curves = {name.rpartition("/")[2].removeprefix("frac_"): series.get(name) for name in together}
            if any(curves.values()):
                panels.append(panel(heading + f", {run}" * (len(runs) > 1), curves, last, units[together[0]]))
        for name in (name for name in units if name not in together):
            curves = {run if len(runs) > 1 else "": series.get(name) for run, series in runs.items()}
            values = np.unique(np.concatenate([curve[1] for curve in curves.values() if curve]))
            if len(values) == 1:
                constant[name] = float(values[0])
            else:
                panels.append(panel(name, curves, last, units[name]))
        found.append({"title": title, "panels": panels, "constant": constant})
    return [section for section in found if section["panels"] or section["constant"]]


@matplotlib.rc_context(LOOK)
def panel(title: str, curves: Mapping[str, Curve | None], last: float, unit: str) -> dict[str, Any]:
    """One plot up to step `last`: {title, svg, legend}, where the legend has the place of a curve and its numbers.

    A long curve is the line of `downsample` with a band from least to greatest.
    """
    axes, legend = Figure((3.5, 1.8), layout="constrained").subplots(), []
    for i, (name, curve) in enumerate(curves.items()):
        if not curve:
            continue
        legend.append((i, (f"{name}: " if name else "") + in_words(curve)))
        steps, means, low, high = downsample(*curve).T
        colour, dots = COLOURS[i % 8], "." if len(steps) <= MAX_DOTS else ""
        axes.plot(steps, means, STYLES[i // 4 % 3], color=colour, marker=dots, clip_on=False)
        if len(steps) < len(curve[0]):
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, clip_on=False)
    low, high = axes.get_ylim()
    axes.set(xlim=(0, max(last, 1)), xlabel="step", ylabel=unit, ylim=(0 if 0 < low < high / 2 else low, high))
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, left=False)
    axes.grid(axis="y", color=GRID)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return {"title": title, "svg": _svg(axes.figure), "legend": legend}


def in_words(curve: Curve) -> str:
    """What is read off a curve: its last value, and the least and the greatest with their steps.

    >>> in_words((np.arange(1, 5), np.array([0.5, 0.25, 1.0, np.nan])))
    'last 1, from 0.25 (step 2) to 1 (step 3), 1 not finite'
    """
    steps, values = finite(curve)
    bad = [f"{len(curve[1]) - len(values):,} not finite"] if len(values) < len(curve[1]) else []
    if not len(values):
        return bad[0]
    low, high = (f"{number(values[i])} (step {steps[i]:,.0f})" for i in (values.argmin(), values.argmax()))
    same = values.min() == values.max()
    text = f"always {number(values[-1])}" if same else f"last {number(values[-1])}, from {low} to {high}"
    return ", ".join([text, *bad])


def _svg(figure: Figure) -> Markup:
    """The drawing as an element of the page: without ids of its own, and without styles, which the page forbids."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r'<style.*?</style>| id="[^"]*_\d+"|\n *(?=<)', "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\.\d)\d+(?=[\s"])', r"\1", svg)  # a tenth of a point is enough
    svg = re.sub(r' style="(.*?)"', lambda style: re.sub(r"([\w-]+): (.*?)(; |$)", r' \1="\2"', style[1]), svg)
    return Markup(re.sub(r"#0000(c\w)", r"var(--\1)", svg[svg.index("<svg") :]))
