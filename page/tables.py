"""The tables of the page: facts and configurations side by side, and results on the same questions."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from matplotlib.ticker import MaxNLocator

from metrics.blind import in_words
from metrics.compare import differing_keys
from metrics.intervals import paired_difference
from page.runs import Evaluation
from page.samples import cut
from records.tasks import TASKS

MAX_DOTS = 1500  # of a scatter plot
CLOSE = "r1@0.7"  # the share of questions whose span is close to the truth, shown beside the main metric


def table_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A column for each of `rows`, a row for each of their keys, and whether its cells differ."""
    table = [(name, [cut(str(row.get(name, ""))) for row in rows]) for name in dict.fromkeys(chain(*rows))]
    return [{"name": cut(name), "cells": cells, "differs": len(set(cells)) > 1} for name, cells in table]


def by_questions(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Results on the same questions, together; the first of them is the baseline."""
    groups: dict[Any, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        groups[evaluation.result.spec.get("data_hash")].append(evaluation)
    found = []
    for first, *others in groups.values():
        group = [first, *others]
        tasks = [task for task in first.result.values if all(task in other.result.values for other in others)]
        grounded = [task for task in tasks if TASKS[task].has_segments]
        found.append(
            {
                "title": cut(str(first.config.get("data.test", first.name))),
                "runs": [(e.name, cut(str(e.result.spec.get("model", "")))) for e in group],
                "differing": list(differing_keys([e.result for e in group], ())),
                "tasks": [task_table(task, group) for task in tasks],
                "scatters": [scatter(task, first, other) for task in grounded for other in others],
            }
        )
    return found


def task_table(task: str, group: Sequence[Evaluation]) -> dict[str, Any]:
    """Metrics of a task, the main one first: of each result [value, low, high], and so its difference to the first.

    `close` is the stricter metric shown beside the main one, if the task has it. `floor` is what the best constant
    answer of a training set earns, if a result has it: in words, its main cell and its `close` cell. `blind` has the
    same cells, and the name, of each result whose questions were asked with another clip too.
    """
    of, main, first = [e.content["tasks"][task] for e in group], TASKS[task].main_metric, group[0].result
    rows = []
    for name in sorted((n for n, value in of[0].items() if isinstance(value, float)), key=lambda n: n != main):
        before, *others = [e.result.percent(task, name) for e in group]
        gains = [
            paired_difference(before, after, first.clusters) if before.keys() & after else None for after in others
        ]
        rows.append((name, [_cell(values, name) for values in of], gains))
    close = next((cells for name, cells, _ in rows if name == CLOSE), None)
    floor = next((e.content["floor"][task] for e in group if task in e.content.get("floor", {})), None)
    if floor:
        words = f"{in_words(floor['constant'])}: the best on {floor['constant']['data']}"
        floor = {"title": cut(words), "main": _cell(floor, main), "close": _cell(floor, CLOSE)}
    blind = [(e.name, e.content.get("blind", {"tasks": {}})["tasks"].get(task, {})) for e in group]
    blind = [{"name": n, "main": _cell(v, main), "close": _cell(v, CLOSE)} for n, v in blind if main in v]
    shown = [*rows[0][1], *(row["main"] for row in [floor, *blind] if row)]
    ticks = MaxNLocator(5).tick_values(min(cell[1] for cell in shown), max(cell[2] for cell in shown))
    types = [e.content.get("types", {}).get(task, {}) for e in group]
    by_type = [(cut(name), [one.get(name, {}) for one in types]) for name in sorted(set(chain(*types)))]
    table = {"task": task, "n": of[0]["n"], "main": main, "rows": rows, "ends": (ticks[0], ticks[-1])}
    return table | {"types": by_type, "close": close, "floor": floor, "blind": blind}


def _cell(values: Mapping[str, Any], name: str) -> list[float | None]:
    return [values.get(name), *values.get(f"{name}_ci95", (None, None))]


def scatter(task: str, a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """IoU of each question before and after, as many as MAX_DOTS drawn, and how many of all got better."""
    theirs = b.result.percent(task, "miou")
    pairs = [(i, value, theirs[i]) for i, value in a.result.percent(task, "miou").items() if i in theirs]
    dots = [(cut(str(i)), before, after) for i, before, after in pairs[:: len(pairs) // MAX_DOTS + 1]]
    signs = Counter((after > before) - (after < before) for _, before, after in pairs)
    return {"task": task, "names": (a.name, b.name), "dots": dots, "num": len(pairs), "signs": signs}
