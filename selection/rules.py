"""Which scored items to train on: the rules, the budget, and what is shown of them.

An item comes with the rewards of its K responses. A reward here is the task's own, without the format: IoU for tvg,
right or wrong for mcqa, the mean of both for gqa (`rewards.task_reward`). Its standard deviation is the one that
training calls a group dead by (`grpo.group_std`). The rules, `select.rule`:

    mixed         the paper's (arXiv 2506.01908): rewards differ; for tvg and gqa their standard deviation is at least
                  min_std and the best of them at least min_best
    mean_range    the mean lies in [low, high], as in Time-R1's difficulty band (arXiv 2503.13377); one reward is enough
    top_variance  those with the largest standard deviation, as many as the budget says
    random        as many as the budget says: the control

Thresholds are ours: neither paper publishes the ones for this statistic. Where more items pass than `select.budget`,
each pair of task and source gets its share of it, by largest remainder; within one, those with the largest standard
deviation (mixed, top_variance) or any (mean_range, random) are kept, equals in an order drawn from select.seed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from grpo import group_stats, group_std
from records.tasks import TASKS

REASONS = {
    "unreadable": "the video cannot be read",
    "unparsed": "no response has an answer that can be read",
    "too_easy": "all right, or a mean above select.high",
    "too_hard": "all wrong, or a mean below select.low",
    "low_variance": "rewards alike, or a standard deviation below select.min_std",
    "low_best": "a best reward below select.min_best",
    "over_budget": "passed, but select.budget is smaller",
}
NEED_VARIANCE = ("mixed", "top_variance")


@dataclass(frozen=True)
class Item:
    """One item of the data with the rewards of its responses, each from 0 to 1."""

    id: str
    task: str
    source: str
    rewards: tuple[float, ...] = ()  # none where there is an error
    parsed: bool = True  # a response at least has an answer that can be read
    error: str = ""  # why its video cannot be read

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Item":
        """A row of scores, see selection/scores.py."""
        rewards = tuple(row.get("rewards", ()))
        parsed = row.get("parse_fail", 0) < max(1, len(rewards))
        return Item(row["id"], row["task"], row["source"], rewards, parsed, row.get("error", ""))

    @cached_property
    def mean(self) -> float:
        return float(np.mean(self.rewards))

    @cached_property
    def std(self) -> float:
        """With ddof 1; nan of one reward."""
        if len(self.rewards) == 1:
            return float("nan")
        return group_std(torch.tensor([self.rewards], dtype=torch.float64)).item()

    @property
    def best(self) -> float:
        return max(self.rewards)

    def statistics(self) -> dict[str, float | None]:
        """As they are written; without a standard deviation where there is one reward."""
        return {"mean": self.mean, "std": self.std if len(self.rewards) > 1 else None, "best": self.best}


def reason(item: Item, cfg) -> str:
    """Why the item is rejected, one of `REASONS`; "" when it passes. `cfg` is the section select.

    >>> from config import RuleConfig
    >>> reason(Item("a", "tvg", "", (0.0, 0.1, 0.4)), RuleConfig(min_std=0.1, min_best=0.5))
    'low_best'
    """
    if item.error:
        return "unreadable"
    if cfg.rule in ("random", "top_variance"):
        return ""
    if not item.parsed:
        return "unparsed"
    if cfg.rule == "mean_range":
        return "too_hard" if item.mean < cfg.low else "too_easy" if item.mean > cfg.high else ""
    counts = group_stats(torch.tensor([item.rewards], dtype=torch.float64))
    if not counts["mixed"]:
        return "too_easy" if counts["all_good"] else "too_hard" if counts["all_bad"] else "low_variance"
    if not TASKS[item.task].has_segments:  # its rewards are 0 or 1
        return ""
    return "low_variance" if item.std < cfg.min_std else "low_best" if item.best < cfg.min_best else ""


def choose(items: Sequence[Item], cfg) -> list[str]:
    """For every item "" when it is kept, else the reason. `cfg` is the section select.

    Raises ValueError when the rule needs a variance and an item has one reward.
    """
    single = next((item for item in items if len(item.rewards) == 1), None)
    if cfg.rule in NEED_VARIANCE and single:
        raise ValueError(f"select.rule={cfg.rule} needs at least 2 rewards of every item, {single.id!r} has 1")
    reasons = [reason(item, cfg) for item in items]
    if not cfg.budget:
        return reasons
    by_std, drawn = cfg.rule in NEED_VARIANCE, np.random.default_rng(cfg.seed).permutation(len(items))
    strata: dict[tuple[str, str], list[int]] = {}  # those that passed, by task and source
    passed = [i for i, why in enumerate(reasons) if not why]
    for i in sorted(passed, key=lambda i: (-items[i].std if by_std else 0.0, drawn[i])):
        strata.setdefault((items[i].task, items[i].source), []).append(i)
    names = sorted(strata)
    for name, share in zip(names, largest_remainder([len(strata[name]) for name in names], cfg.budget)):
        for i in strata[name][share:]:
            reasons[i] = "over_budget"
    return reasons


def check_kept(reasons: Sequence[str], cfg) -> None:
    """Raises ValueError saying which condition removed how many, when nothing is kept."""
    counts = Counter(reasons)
    if not counts[""]:
        told = "; ".join(f"{counts[why]} {why} ({text})" for why, text in REASONS.items() if counts[why])
        raise ValueError(f"select.rule={cfg.rule} keeps none of {len(reasons)} items: {told}")


def largest_remainder(sizes: Sequence[int], budget: int) -> list[int]:
    """`budget` shared out in proportion to `sizes`, never more than there is (Hamilton's method; ties: the first).

    >>> largest_remainder([20, 30, 50], 7), largest_remainder([2, 1], 5)  # 1.4, 2.1, 3.5
    ([1, 2, 4], [2, 1])
    """
    total = sum(sizes)
    budget = min(budget, total)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(budget * sizes[i] % total))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def counts_by_stratum(items: Sequence[Item], reasons: Sequence[str]) -> dict[str, dict[str, int]]:
    """{"task/source": {"items", "kept" and each of `REASONS`: how many}}, and "all" of them last."""
    counts: dict[str, Counter] = {}
    for item, why in zip(items, reasons, strict=True):
        for name in ("/".join(filter(None, (item.task, item.source))), "all"):
            counts.setdefault(name, Counter()).update(["items", why or "kept"])
    return {
        name: {key: counts[name][key] for key in ("items", "kept", *REASONS)}
        for name in [*sorted(counts.keys() - {"all"}), "all"]
    }


def table(counts: dict[str, dict[str, int]]) -> Iterator[str]:
    """The lines of a table: a row per task and source."""
    width, columns = max(map(len, counts)), list(counts["all"])
    yield " ".join([" " * width, *(column.rjust(12) for column in columns)])
    for name, row in counts.items():
        yield " ".join([name.ljust(width), *(str(row[column]).rjust(12) for column in columns)])


def plot(items: Sequence[Item], reasons: Sequence[str], cfg, path: Path) -> None:
    """Histograms of the statistics by task, all items and the kept ones, with the thresholds of the rule drawn."""
    tasks = sorted({item.task for item in items})
    lines = {"mean_range": {"mean": (cfg.low, cfg.high)}, "mixed": {"std": (cfg.min_std,), "best": (cfg.min_best,)}}
    figure = Figure(figsize=(11, 2.6 * len(tasks) + 0.4), layout="constrained")
    axes = figure.subplots(len(tasks), 3, squeeze=False)
    for row, task in zip(axes, tasks):
        pairs = [(item, why) for item, why in zip(items, reasons) if item.task == task and item.rewards]
        for axis, name, end in zip(row, ("std", "mean", "best"), (0.75, 1.0, 1.0)):
            edges = np.linspace(0, end, 31)
            for label, some in (("all", pairs), ("kept", [pair for pair in pairs if not pair[1]])):
                values = np.array([getattr(item, name) for item, _ in some])
                heights, _ = np.histogram(values[np.isfinite(values)], edges)
                axis.stairs(heights, edges, fill=True, alpha=0.6, label=f"{label} {len(some)}")
            drawn = cfg.rule != "mixed" or TASKS[task].has_segments
            for threshold in lines.get(cfg.rule, {}).get(name, ()) if drawn else ():
                axis.axvline(threshold, color="black", linestyle="--", label=f"{threshold:g}")
            axis.set(title=f"{task}: {name} of an item's rewards", ylabel="items")
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})
