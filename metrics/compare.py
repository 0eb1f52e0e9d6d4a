"""Two or more results side by side, with paired intervals of their differences; different specifications are refused.

It scores stored predictions and runs no model: `python eval.py compare a/metrics.json b/metrics.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import EvalRunConfig, flat
from metrics.intervals import in_points, paired_difference
from metrics.rows import hash_of, read_rows, with_truth
from metrics.tasks import check_modes, cluster_of, score_each
from records.files import read_samples

MAY_DIFFER = {"model", "weights"}  # what a comparison is about
FOLLOWS = {"prompt_hash", "commit"}  # from the wording and the chat template, from the code


@dataclass(frozen=True)
class Result:
    """One metrics.json and the predictions it was made from."""

    path: str
    spec: dict[str, Any]  # flat: section.key
    values: dict[str, dict[str | int, dict[str, float]]]  # by task and id, from 0 to 1
    clusters: dict[str | int, str | int]  # by id: what a bootstrap draws together

    def percent(self, task: str, metric: str) -> dict[str | int, float]:
        """A metric of every question that has it, by its id, from 0 to 100."""
        return {i: 100 * values[metric] for i, values in self.values[task].items() if metric in values}


def read_result(path: str | Path) -> Result:
    """The result of a metrics.json, or of the folder it is in.

    Raises ValueError naming file and key for anything malformed, FileNotFoundError for a file that is not there.
    """
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        spec, data = flat(content["spec"]), content.get("data")
        predictions = file.parent / content["predictions"]
        check_modes(spec["answer"], spec["unanswered"])
        data = data and str(file.parent / data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a metrics.json of eval.py ({error!r})") from None
    if not predictions.is_file():
        raise FileNotFoundError(f"{file}: its predictions are not there: {predictions}")
    try:
        rows = read_predictions(predictions, data)
        scored = score_each(rows, spec["answer"], spec["unanswered"])
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from None
    values: dict[str, dict[str | int, dict[str, float]]] = {}
    for row, value in scored:
        values.setdefault(row["task"], {})[row["id"]] = value
    return Result(str(file), spec, values, {row["id"]: cluster_of(row) for row in rows})


def read_predictions(path: str | Path, data: str | None) -> list[dict[str, Any]]:
    """Rows of predictions; with `data` every record of that file has one, with its truth. Raises ValueError."""
    rows = read_rows(path)
    if not data:
        return rows
    return with_truth(rows, {sample.id: sample for sample in read_samples(data, need_videos=False)}, data)


def specification(cfg: EvalRunConfig, tokenizer) -> dict[str, Any]:
    """What must be equal for two results to be comparable, and which model this one is of.

    The size of the batch is a part: in bfloat16 a row's numbers depend on those beside it.
    """
    prompt = asdict(cfg.prompt)
    return {
        "model": cfg.model.path,
        "dtype": cfg.model.dtype,
        "video": asdict(cfg.video),
        "prompt": prompt,
        "prompt_hash": hash_of([prompt, tokenizer.chat_template]),
        "template_hash": hash_of(tokenizer.chat_template),
        "decoding": {
            "max_new_tokens": cfg.eval.max_new_tokens,
            "num_answers": cfg.eval.num_answers,
            "temperature": cfg.eval.temperature,
            "batch_size": cfg.eval.batch_size,
            "seed": cfg.run.seed if cfg.eval.temperature else None,
        },
        "answer": cfg.eval.answer,
        "unanswered": cfg.eval.unanswered,
    }


def differing_keys(results: Sequence[Result], allowed: Sequence[str]) -> dict[str, list[Any]]:
    """Keys of the specification whose values are not all equal, with the values; an allowed section allows its keys."""
    keys = sorted(set().union(*(result.spec for result in results)) - MAY_DIFFER - FOLLOWS)
    found = {key: [result.spec.get(key) for result in results] for key in keys}
    found = {key: values for key, values in found.items() if any(value != values[0] for value in values)}
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
    first, others = results[0], results[1:]
    paired = [len(first.values[task].keys() & other.values[task].keys()) for other in others]
    if not all(paired):
        raise ValueError(f"{task}: two results have no sample in common")
    sizes = ", ".join(str(len(result.values[task])) for result in results)
    head = "".join(f"{f'[{i}]':>9}" for i in range(len(results)))
    head += "".join(f"{f'[{i}] - [0], 95% interval':>28}" for i in range(1, len(results)))
    lines = [f"{task}: n {sizes}; paired {', '.join(map(str, paired))}", f"{'':14}{head}"]
    for name in next(iter(first.values[task].values())):
        percent = [result.percent(task, name) for result in results]
        if all(percent):
            cells = "".join(f"{np.mean(list(values.values())):9.2f}" for values in percent)
            for values in percent[1:]:
                cells += f"{in_points(paired_difference(percent[0], values, first.clusters), digits=2):>28}"
            lines.append(f"{name:14}{cells}")
    return lines


def _short(value: Any, length: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
