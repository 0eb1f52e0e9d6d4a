"""Metrics of stored predictions: rows of predictions.jsonl in, numbers with bootstrap intervals out, without torch.

First what one row is worth, then the metrics of all rows.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from answers import Segment, parse_response
from config import ANSWER_MODES, UNANSWERED_MODES
from metrics.intervals import bootstrap_interval, resampled_means
from records.tasks import TASKS
from rewards import temporal_iop, temporal_iou

Row = Mapping[str, Any]  # a line of predictions.jsonl
Scored = tuple[Row, dict[str, float]]  # and its value, from 0 to 1, of every metric of its task


# ---- one row -------------------------------------------------------------------------------------------------------
def sample_values(row: Row, answer: str = "tagged") -> dict[str, float]:
    """One prediction row's value, from 0 to 1, of every metric of its task (a metric is 100 x their mean).

    The row has `task`, the truth, and either `response` (raw text), or `responses` (several: values are means over
    them, `<metric>_best` the best of each), or `pred_choice` / `pred_segments` (null / []: a parse failure). Grounding
    follows the official scripts, which take the first predicted segment, not clipped, against the best true one, for
    IoU and IoP separately. `*_set` compares unions. Raises ValueError naming the key that is missing or bad.
    """
    each = [_values(one, answer) for one in _each(row)]
    if row.get("responses") is None:
        return each[0]
    best = {f"{name}_best": max(value[name] for value in each) for name in each[0] if name != "parse_fail"}
    return {name: sum(value[name] for value in each) / len(each) for name in each[0]} | best


def _each(row: Row) -> list[Row]:
    """A row for each response where there are several, else the row alone."""
    responses = row.get("responses")
    if responses is None:
        return [row]
    if not isinstance(responses, list) or not responses:
        raise ValueError("key 'responses': expected a list of at least one text")
    return [{**row, "response": response} for response in responses]


def _values(row: Row, answer: str) -> dict[str, float]:
    name = _get(row, "task")
    if name not in TASKS:
        raise ValueError(f"key 'task': {name!r} is none of {', '.join(TASKS)}")
    task, (choice, pred) = TASKS[name], _answer_of(row, answer)
    if task.has_options and not _is_letter(_get(row, "answer")):
        raise ValueError(f"key 'answer': {row['answer']!r} is no upper-case option letter")
    right = task.has_options and choice == row["answer"]
    if not task.has_segments:
        return {"accuracy": float(right), "parse_fail": float(choice is None)}
    truth = _spans(row, "segments")
    if not truth:
        raise ValueError("key 'segments': expected at least one [start, end] with finite start <= end")
    iou, iop = (max(f(pred[:1], [true]) for true in truth) for f in (temporal_iou, temporal_iop))
    values = {"miou": iou, "miou_set": temporal_iou(pred, truth)}
    if not task.has_options:
        return values | {f"r1@{t}": float(iou >= t) for t in (0.3, 0.5, 0.7)} | {"parse_fail": float(not pred)}
    values |= {"accuracy": float(right), "acc_gqa": float(right and iop >= 0.5)}
    values |= {"miop": iop, "miop_set": temporal_iop(pred, truth)}
    values |= {f"{name}@{t}": float(value >= t) for name, value in (("iop", iop), ("iou", iou)) for t in (0.3, 0.5)}
    return values | {"parse_fail": float(choice is None or not pred)}


def _answer_of(row: Row, answer: str) -> tuple[str | None, list[Segment]]:
    """The option (None for grounding) and the spans ([] for multiple choice) of a row with one response, or stored."""
    response, options = row.get("response"), row.get("options")
    if response is not None and not isinstance(response, str):
        raise ValueError("key 'response': expected a string")
    if options is not None and not (isinstance(options, list | tuple) and all(isinstance(o, str) for o in options)):
        raise ValueError("key 'options': expected a list of texts")
    task = TASKS[row["task"]]
    if response is not None:
        choice, segments = parse_response(response, options, answer)
        return choice if task.has_options else None, segments if task.has_segments else []
    choice = _get(row, "pred_choice") if task.has_options else None
    if choice is not None and not _is_letter(choice):
        raise ValueError(f"key 'pred_choice': expected an upper-case option letter or null, got {choice!r:.40}")
    return choice, _spans(row, "pred_segments") if task.has_segments else []


def _get(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"key {key!r}: missing")
    return row[key]


def _is_letter(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1 and "A" <= value <= "Z"


def _spans(row: Row, key: str) -> list[Segment]:
    """Spans stored in a row; [] when one is reversed or not finite, as in a parsed answer."""
    try:
        spans = [(float(start), float(end)) for start, end in _get(row, key) or ()]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"key {key!r}: expected a list of [start, end] in seconds") from error
    return spans if all(-math.inf < start <= end < math.inf for start, end in spans) else []


# ---- all rows ------------------------------------------------------------------------------------------------------
def score_predictions(
    rows: Sequence[Row], answer: str = "tagged", unanswered: str = "wrong", seed: int = 0
) -> dict[str, Any]:
    """The metrics of prediction rows: {"tasks": {task: metrics}, "types": {task: {type: metrics}}, ...}.

    Metrics are `n` (rows scored) and percentages from 0 to 100, each with its 95% interval beside it (`miou_ci95`).
    The bootstrap draws videos, where rows have a `video`, because questions about one video are not independent.
    Rows in which nothing can be read are wrong answers, as are those with an `error` (`num_unreadable`) and without a
    prediction (`num_missing`). With `unanswered="skip"` they are left out, as some official scripts do (`num_skipped`).
    `types` has the rows with a `type`, a path from general to special such as `causal/CW`, at every level. `videos` and
    `responses` say how many tokens those took. Raises ValueError naming row and key.
    """
    check_modes(answer, unanswered)
    scored: dict[str, list[Scored]] = {row.get("task"): [] for row in rows}
    for row, value in score_each(rows, answer, unanswered):
        scored[row["task"]].append((row, value))
    tasks, types = {}, {}
    for task, of_task in scored.items():
        mine = [row for row in rows if row["task"] == task]
        tasks[task] = {
            "num_unreadable": sum("error" in row for row in mine),
            "num_missing": sum(bool(row.get("missing")) for row in mine),
            "num_skipped": len(mine) - len(of_task),
        }
        tasks[task] |= _metrics(of_task, seed) | _macro_accuracy(of_task, seed)
        by_type = _by_type(of_task)
        if by_type:
            types[task] = {kind: _metrics(by_type[kind], seed) for kind in sorted(by_type)}
    return {"tasks": tasks, "types": types, "videos": _video_use(rows), "responses": _response_use(rows)}


def check_modes(answer: Any, unanswered: Any) -> None:
    """Raises ValueError for what is none of the modes."""
    for name, value, modes in (("answer", answer, ANSWER_MODES), ("unanswered", unanswered, UNANSWERED_MODES)):
        if value not in modes:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(modes)}")


def score_each(rows: Sequence[Row], answer: str = "tagged", unanswered: str = "wrong") -> list[Scored]:
    """The rows that count, each with its `sample_values`.

    Raises ValueError naming row (from 1) and key, also for an id that is repeated.
    """
    scored, seen, several = [], set(), any("responses" in row for row in rows)
    for number, row in enumerate(rows, 1):
        try:
            row_id = _get(row, "id")
            if not isinstance(row_id, str | int) or row_id in seen:
                raise ValueError(f"key 'id': {row_id!r} is repeated, or neither a string nor an integer")
            seen.add(row_id)
            value = sample_values(row, answer)
            if several:  # the best of a row with one response, or none, is that one
                best = {name: v for name, v in value.items() if name != "parse_fail" and "_best" not in name}
                value = {f"{name}_best": v for name, v in best.items()} | value
            scored.append((row, value))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    if unanswered == "wrong":
        return scored
    return [(row, value) for row, value in scored if any(any(_answer_of(one, answer)) for one in _each(row))]


def cluster_of(row: Row) -> str | int:
    """What a bootstrap draws together: the video, or the row alone where it has none."""
    return f"{row.get('video')} {row.get('clip')}" if row.get("video") else row["id"]


def _metrics(scored: list[Scored], seed: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {"n": len(scored)}
    if not scored:
        return metrics
    names = list(scored[0][1])
    percent_NM = 100 * np.array([[value[name] for name in names] for _, value in scored])
    low, high = bootstrap_interval(percent_NM, seed, [cluster_of(row) for row, _ in scored])
    for index, name in enumerate(names):
        metrics[name] = float(percent_NM[:, index].mean())
        metrics[f"{name}_ci95"] = [float(low[index]), float(high[index])]
    return metrics


def _macro_accuracy(scored: list[Scored], seed: int) -> dict[str, Any]:
    """`accuracy_macro`, the mean over the types at the top, of multiple choice where there are several."""
    tops = [str(row.get("type") or "").partition("/")[0] for row, _ in scored]
    if len(set(tops)) < 2 or not all(tops) or "miou" in scored[0][1]:
        return {}
    in_type_NK = np.array([[top == kind for kind in sorted(set(tops))] for top in tops])
    right_N1 = 100 * np.array([[value["accuracy"]] for _, value in scored])
    clusters = [cluster_of(row) for row, _ in scored]
    macro_R = np.nanmean(resampled_means(right_N1 * in_type_NK, clusters, seed, in_type_NK), axis=1)
    mean = float(np.mean((right_N1 * in_type_NK).sum(0) / in_type_NK.sum(0)))
    return {"accuracy_macro": mean, "accuracy_macro_ci95": np.percentile(macro_R, (2.5, 97.5)).tolist()}


def _by_type(scored: list[Scored]) -> dict[str, list[Scored]]:
    """The rows of every type, and of every level above it."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for row, value in scored:
        parts = str(row["type"]).split("/") if row.get("type") else []
        for depth in range(1, len(parts) + 1):
            groups["/".join(parts[:depth])].append((row, value))
    return groups


def _video_use(rows: Sequence[Row]) -> dict[str, float]:
    used = _numbers(rows, "video_tokens", "frames_cut")
    if not used:
        return {}
    tokens, cut = np.mean(used, axis=0)
    return {"tokens_mean": float(tokens), "tokens_max": max(used)[0], "frames_cut_mean": float(cut)}


def _response_use(rows: Sequence[Row]) -> dict[str, float]:
    """Means over responses: a row may have several."""
    used = _numbers(rows, "num_tokens", "num_truncated")
    if not used:
        return {}
    num = sum(len(row.get("responses") or [None]) for row in rows if "num_tokens" in row)
    tokens, truncated = np.sum(used, axis=0)
    return {"tokens": int(tokens), "tokens_mean": float(tokens / num), "frac_truncated": float(truncated / num)}


def _numbers(rows: Sequence[Row], *keys: str) -> list[tuple[int, ...]]:
    """What the rows say of these keys, without rows that say nothing, or something else than a number."""
    found = [tuple(row.get(key) for key in keys) for row in rows]
    return [numbers for numbers in found if all(type(n) is int and abs(n) < 1e15 for n in numbers)]
