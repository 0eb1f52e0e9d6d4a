"""Two or more results side by side, with paired intervals of their differences; different specifications are refused.

It scores stored predictions (metrics.py) and runs no model. `python eval.py compare a/metrics.json b/metrics.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import records_of
from metrics import all_values, paired_interval, read_rows, with_truth
from records import Sample

MAY_DIFFER = {"model"}  # what a comparison is about


@dataclass(frozen=True)
class Result:
    """One metrics.json and the predictions it was made from."""

    path: str
    spec: dict[str, Any]  # flat: section.key
    tasks: dict[str, dict[str, Any]]  # metrics by task
    values: dict[str, dict[str | int, dict[str, float]]]  # by task and id, from 0 to 1


def read_result(path: str) -> Result:
    """Raises ValueError naming file and key for anything malformed, FileNotFoundError for a file that is not there."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        spec, tasks, name = content["spec"], content["tasks"], content["predictions"]
        answer, unanswered = spec["answer"], spec["unanswered"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a metrics.json of eval.py ({error!r})") from None
    predictions = Path(path).parent / name
    if not predictions.is_file():
        raise FileNotFoundError(f"{path}: its predictions are not there: {predictions}")
    try:
        rows = read_predictions(predictions, content.get("data") and str(Path(path).parent / content["data"]))
        scored = zip(rows, all_values(rows, answer))
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from None
    values: dict[str, dict[str | int, dict[str, float]]] = {}
    for row, value in scored:
        if unanswered == "wrong" or value["parse_fail"] < 1:
            values.setdefault(row["task"], {})[row["id"]] = value
    return Result(path, flat(spec), tasks, values)


def read_predictions(path: str | Path, data: str | None) -> list[dict[str, Any]]:
    """Rows of predictions; with `data` every record of that file has one, with its truth. Raises ValueError."""
    rows = read_rows(path)
    if not data:
        return rows
    samples: dict[str, Sample] = {}
    for where, record in records_of(data):
        if not isinstance(record, Sample):
            raise ValueError(f"{where}: {record}")
        samples[record.id] = record
    return with_truth(rows, samples, data)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots.

    >>> flat({"video": {"fps": 2.0}, "answer": "tagged"})
    {'video.fps': 2.0, 'answer': 'tagged'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differing_keys(results: Sequence[Result], allowed: Sequence[str]) -> dict[str, list[Any]]:
    """Keys of the specification whose values are not all equal, with the values; an allowed section allows its keys.

    The hash of the prompt says something of its own only where the wording is equal: the chat template differs.
    """
    keys = sorted(set().union(*(result.spec for result in results)) - MAY_DIFFER)
    found = {key: [result.spec.get(key) for result in results] for key in keys}
    found = {key: values for key, values in found.items() if any(value != values[0] for value in values)}
    if any(key.startswith("prompt.") for key in found):
        found.pop("prompt_hash", None)
    return {key: values for key, values in found.items() if not any(f"{key}.".startswith(f"{a}.") for a in allowed)}


def compare(paths: Sequence[str], allowed: Sequence[str] = ()) -> list[str]:
    """Lines of a table for each task: every result's metrics, and the difference of each to the first.

    Differences are paired over the samples that both have scored, with bootstrap 95% intervals. Raises ValueError for
    fewer than two results, and where specifications differ in a key that is not `allowed`.
    """
    if len(paths) < 2:
        raise ValueError("a comparison needs at least two results")
    results = [read_result(path) for path in paths]
    keys = differing_keys(results, allowed)
    if keys:
        listed = "; ".join(f"{key} ({', '.join(map(_short, values))})" for key, values in keys.items())
        raise ValueError(f"different specifications: {listed}. --allow KEY for those you mean to vary")
    lines = [f"[{i}] {result.path}: {result.spec.get('model', '')}" for i, result in enumerate(results)]
    tasks = [task for task in results[0].values if all(task in result.values for result in results)]
    if not tasks:
        raise ValueError("no task that all results have")
    for task in tasks:
        lines += ["", *_table(task, results)]
    return lines


def _table(task: str, results: Sequence[Result]) -> list[str]:
    first, others = results[0].values[task], results[1:]
    shared = [[i for i in first if i in other.values[task]] for other in others]
    if not all(shared):
        raise ValueError(f"{task}: two results have no sample in common")
    sizes = ", ".join(str(len(result.values[task])) for result in results)
    pairs = ", ".join(str(len(ids)) for ids in shared)
    head = "".join(f"{f'[{i}]':>9}" for i in range(len(results)))
    head += "".join(f"{f'[{i}] - [0], 95% interval':>28}" for i in range(1, len(results)))
    lines = [f"{task}: n {sizes}; paired {pairs}", f"{'':14}{head}"]
    for name in (name for name in _names(first) if all(name in _names(other.values[task]) for other in others)):
        cells = "".join(f"{_mean(result.values[task], name):9.2f}" for result in results)
        for other, ids in zip(others, shared):
            a, b = ([100 * values[i][name] for i in ids] for values in (first, other.values[task]))
            mean, low, high = paired_interval(a, b)
            cells += f"{f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]':>28}"
        lines.append(f"{name:14}{cells}")
    return lines


def _names(values: dict[str | int, dict[str, float]]) -> list[str]:
    return list(next(iter(values.values())))


def _mean(values: dict[str | int, dict[str, float]], name: str) -> float:
    return 100 * sum(value[name] for value in values.values()) / len(values)


def _short(value: Any, length: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
