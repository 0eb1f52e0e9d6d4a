"""Run folders to one HTML page: what was run, curves, results against a baseline, and sampled groups to read.

It trains and scores nothing, and only reads the folders, so a live run can be looked at. report.html.j2 is the page. A
folder is a training or an evaluation (eval.py run); the others of a test set are compared with its first evaluation.

    python report.py runs/demo/grpo runs/demo/eval_base runs/demo/eval_grpo     # writes runs/demo/grpo/report.html
    python report.py runs/a runs/b --out ab.html                                # two trainings in one plot
    python report.py runs/a --id tiny/tvg_train/7                               # groups that are not on the page
    python report.py runs/a --watch 10                                          # until the run has ended
"""

import argparse
import base64
import hashlib
import json
import os
import re
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from config import flat
from metrics.blind import in_words
from metrics.compare import Result, differing_keys, read_result
from metrics.intervals import paired_interval
from metrics.tasks import MAIN_METRIC
from page import samples
from page.curves import Curve, Series, nice_ticks, sections
from page.samples import MAX_NAME, cut, read_rows
from runtime.arguments import user_errors
from runtime.checkpoint import write_text

MAX_DOTS = 1500  # of a scatter plot
FEW = 20  # steps at the start and at the end that rewards are means of
SETTINGS = {  # what the summary says of a configuration, the first form whose keys are there
    "Starting model": ["{model.path}"],
    "Training data": ["{data.train}"],
    "Validation data": ["{data.validation}"],
    "Batch": ["{data.batch_size} videos × {rollout.group_size} completions", "{data.batch_size} videos"],
    "Completions": ["at most {rollout.max_new_tokens} tokens, temperature {rollout.temperature}"],
    "Learning rate": ["{optim.lr}, {optim.schedule}"],
    "LoRA rank": ["{model.lora_rank}"],
    "Advantages": ["{loss.baseline}, {loss.scale}"],
    "Loss": ["{loss.aggregation}, clip {loss.clip_low} / {loss.clip_high}"],
    "KL coefficient": ["{loss.beta}"],
    "Updates per rollout": ["{loss.updates_per_rollout}"],
    "Seed": ["{run.seed}"],
}
CLOSE = "r1@0.7"  # the share of questions whose span is close to the truth, shown beside the main metric
TASKS = {"tvg": "temporal grounding", "mcqa": "multiple choice", "gqa": "grounded QA"}


# ---- run folders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    name: str
    dir: Path
    config: dict[str, Any]  # flat: section.key
    env: dict[str, Any]
    series: Series

    @property
    def num_steps(self) -> int:
        return int(max((steps[-1] for steps, _ in self.series.values()), default=0))

    @property
    def finished(self) -> bool:
        return (self.dir / "final").is_dir()


@dataclass(frozen=True)
class Evaluation:
    name: str
    config: dict[str, Any]  # flat: section.key
    result: Result
    content: dict[str, Any]  # of metrics.json


def read_run(path: Path, name: str) -> Training | Evaluation:
    """Of a run folder, or of a metrics.json. Raises ValueError for what is neither."""
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / "config.yaml")
    if path.is_file() or (folder / "metrics.json").is_file():
        result = read_result(str(path))
        return Evaluation(name, config, result, json.loads(Path(result.path).read_text(encoding="utf-8-sig")))
    if not (folder / "metrics.jsonl").is_file() and "optim.lr" not in config:
        raise ValueError(f"{path}: neither a training nor a finished evaluation (no metrics.jsonl, no metrics.json)")
    env = folder / "env.json"
    environment = json.loads(env.read_text(encoding="utf-8")) if env.is_file() else {}
    return Training(name, folder, config, environment, read_series(folder / "metrics.jsonl"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return flat(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{path} is not a configuration") from None


def read_series(path: Path) -> Series:
    """Every metric of a metrics.jsonl; {} where there is none yet."""
    found: dict[str, tuple[array, array]] = defaultdict(lambda: (array("d"), array("d")))
    for _, row in read_rows(path) if path.is_file() else ():
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                found[name][0].append(row["step"])
                found[name][1].append(value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def short_names(paths: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell them apart.

    >>> short_names([Path("runs/a/run"), Path("runs/b/run")])
    ['a/run', 'b/run']
    """
    folders = [path.parent if path.is_file() else path for path in paths]
    parts, depth = [Path(os.path.abspath(folder)).parts for folder in folders], 1
    while len({of[-depth:] for of in parts}) < len(set(parts)):
        depth += 1
    return [cut("/".join(of[-depth:]), MAX_NAME) for of in parts]


# ---- summary ---------------------------------------------------------------------------------------------------------


def facts(run: Training) -> dict[str, str]:
    """What was trained, how and where, and what came of it, in words."""
    c, env = run.config, run.env
    devices, packages = Counter(env.get("devices", ())), env.get("packages", {})
    found = {
        "State": f"{'finished' if run.finished else 'not finished'}, {run.num_steps:,} of {c.get('run.steps')} steps",
        "Reward": _first_and_last(run.series.get("reward/total")),
        "Best validation score": _best(run.series.get("validation/score")),
        "Time in steps": _time(run.series.get("time/step")),
        "Method": "GRPO" if "rollout.group_size" in c else "SFT",
        **{name: next(filter(None, (_filled(form, c) for form in forms)), "") for name, forms in SETTINGS.items()},
        "Commit": (env.get("commit") or "")[:12] + (" and uncommitted changes" if env.get("diff") else ""),
        "Device": ", ".join(f"{num} × {name}" if num > 1 else name for name, num in devices.items()),
        "Software": ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages),
    }
    return {name: text for name, text in found.items() if text}


def _filled(form: str, config: dict[str, Any]) -> str:
    """The text with every {section.key} replaced; "" where a key is missing."""
    keys = re.findall(r"\{([\w.]+)\}", form)
    return re.sub(r"\{([\w.]+)\}", lambda key: str(config[key[1]]), form) if config.keys() >= set(keys) else ""


def _first_and_last(curve: Curve | None) -> str:
    values = np.zeros(0) if curve is None else curve[1][np.isfinite(curve[1])]
    few = max(1, min(FEW, len(values) // 3))
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    first, last = values[:few].mean(), values[-few:].mean()
    return f"{first:.3f} → {last:.3f}, means of the first and last {few} steps"


def _best(curve: Curve | None) -> str:
    if curve is None or not np.isfinite(curve[1]).any():
        return ""
    return f"{np.nanmax(curve[1]):.1f} % after {curve[0][np.nanargmax(curve[1])]:,.0f} steps"


def _time(curve: Curve | None) -> str:
    if curve is None:
        return ""
    return f"{timedelta(seconds=round(np.nansum(curve[1])))}, {np.nanmedian(curve[1]):.2f} s each"


def table_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A column for each of `rows`, a row for each of their keys, and whether its cells differ."""
    names = dict.fromkeys(chain(*rows))
    table = [
        {"name": cut(name, MAX_NAME), "cells": [cut(str(row.get(name, "")), MAX_NAME) for row in rows]}
        for name in names
    ]
    return [row | {"differs": len(set(row["cells"])) > 1} for row in table]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def by_questions(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Results on the same questions, together; the first of them is the baseline."""
    groups: dict[Any, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        groups[evaluation.result.spec.get("data_hash")].append(evaluation)
    found = []
    for group in groups.values():
        first, others = group[0], group[1:]
        tasks = [task for task in first.result.values if all(task in other.result.values for other in others)]
        found.append(
            {
                "title": cut(str(first.config.get("data.test", first.name)), MAX_NAME),
                "runs": [(e.name, cut(str(e.result.spec.get("model", "")), MAX_NAME)) for e in group],
                "differing": list(differing_keys([e.result for e in group], ())),
                "tasks": [task_table(task, group) for task in tasks],
                "scatters": [scatter(task, first, other) for task in tasks if task != "mcqa" for other in others],
            }
        )
    return found


def task_table(task: str, group: Sequence[Evaluation]) -> dict[str, Any]:
    """Metrics of a task, the main one first: of each result [value, low, high], and so its difference to the first.

    `close` is the stricter metric shown beside the main one, if the task has it. `floor` is what the best constant
    answer of a training set earns, if a result has it: in words, its main cell and its `close` cell. `blind` has the
    same cells, and the name, of each result whose questions were asked with another clip too.
    """
    of, main, rows = [e.content["tasks"][task] for e in group], MAIN_METRIC[task], []
    for name in sorted((n for n, value in of[0].items() if isinstance(value, float)), key=lambda n: n != main):
        cells = [[values.get(name), *values.get(f"{name}_ci95", (None, None))] for values in of]
        rows.append((name, cells, [difference(task, name, group[0].result, e.result) for e in group[1:]]))
    close = next((cells for name, cells, _ in rows if name == CLOSE), None)
    floor = next((e.content["floor"][task] for e in group if task in e.content.get("floor", {})), None)
    if floor:
        words = f"{in_words(floor['constant'])}: the best on {floor['constant']['data']}"
        floor = {"title": cut(words, MAX_NAME)} | two_cells(floor, main)
    blind = [(e.name, e.content.get("blind", {"tasks": {}})["tasks"]) for e in group]
    blind = [{"name": name} | two_cells(tasks[task], main) for name, tasks in blind if main in tasks.get(task, {})]
    shown = [*rows[0][1], *(row["main"] for row in [floor, *blind] if row)]
    ticks = nice_ticks(min(cell[1] for cell in shown), max(cell[2] for cell in shown))
    types = [e.content.get("types", {}).get(task, {}) for e in group]
    by_type = [(cut(name, MAX_NAME), [one.get(name, {}) for one in types]) for name in sorted(set(chain(*types)))]
    table = {"task": task, "n": of[0]["n"], "main": main, "rows": rows, "ticks": ticks, "types": by_type}
    return table | {"close": close, "floor": floor, "blind": blind}


def two_cells(values: dict[str, Any], main: str) -> dict[str, list]:
    """The cells [value, low, high] of the main metric and of `CLOSE` in the metrics of a task."""
    cells = [[values.get(name), *values.get(f"{name}_ci95", (None, None))] for name in (main, CLOSE)]
    return {"main": cells[0], "close": cells[1]}


def paired(task: str, name: str, a: Result, b: Result) -> list[tuple[Any, float, float]]:
    """Id and percentages of what both have scored."""
    ours, theirs = a.values[task], b.values[task]
    return [
        (i, 100 * ours[i][name], 100 * theirs[i][name]) for i in ours if name in ours[i] and name in theirs.get(i, {})
    ]


def difference(task: str, name: str, a: Result, b: Result) -> tuple[float, float, float] | None:
    """b - a in points, and its paired 95% interval."""
    pairs = paired(task, name, a, b)
    if not pairs:
        return None
    ids, before, after = zip(*pairs)
    return paired_interval(before, after, clusters=[a.clusters[i] for i in ids])


def scatter(task: str, a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """IoU of each question before and after, as many as MAX_DOTS drawn, and how many of all got better."""
    pairs = paired(task, "miou", a.result, b.result)
    dots = [(cut(str(i), MAX_NAME), before, after) for i, before, after in pairs[:: len(pairs) // MAX_DOTS + 1]]
    signs = Counter((after > before) - (after < before) for _, before, after in pairs)
    return {"task": task, "names": (a.name, b.name), "dots": dots, "num": len(pairs), "signs": signs}


# ---- page ------------------------------------------------------------------------------------------------------------


def page(runs: Sequence[Training | Evaluation], num: int, steps: Sequence[int], ids: Sequence[str]) -> str:
    """The HTML of one report; at most `num` groups, of these steps and ids if there are any."""
    trainings = [run for run in runs if isinstance(run, Training)]
    browser, counts = browse(trainings, num, steps, ids)
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "page")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    env.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    env.filters |= {"number": number, "signed": signed, "csp_hash": csp_hash}
    return env.get_template("report.html.j2").render(
        title=", ".join(run.name for run in trainings or runs),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        names=[run.name for run in trainings],
        facts=table_of([facts(run) for run in trainings]),
        config=table_of([run.config for run in trainings]),
        sections=sections({run.name: run.series for run in trainings}),
        tests=by_questions([run for run in runs if isinstance(run, Evaluation)]),
        task_names=TASKS,
        browser=browser,
        counts=counts,
    )


def browse(
    trainings: Sequence[Training], num: int, steps: Sequence[int], ids: Sequence[str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the sample browser has, and how much that is of what there is."""
    found, total = [], 0
    for index, run in enumerate(trainings):
        views, num_rows = samples.views_of(run.dir / "samples.jsonl", num // len(trainings), steps, ids)
        found.append([view | {"run": index} for view in views])
        total += num_rows
    views = samples.within_budget([view for turn in zip_longest(*found) for view in turn if view])
    frames = samples.frames_for(views)
    counts = {"shown": len(views), "total": total, "with_frames": sum(view["frames"] >= 0 for view in views)}
    views = [view | {"video": cut(Path(view["video"]).name, MAX_NAME)} for view in views]
    views.sort(key=lambda view: (-view["step"], view["run"], view["place"]))
    return {"runs": [run.name for run in trainings], "samples": views, "frames": frames}, counts


def number(value: float | None) -> str:
    """Four significant digits.

    >>> number(0.12345), number(123456), number(0.00001)
    ('0.1235', '123,456', '1e-05')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def csp_hash(text: str) -> str:
    """The source expression that lets a Content-Security-Policy take this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_report(args: argparse.Namespace, out: Path) -> bool:
    """Write the page; returns whether a training goes on."""
    paths = [Path(name) for name in args.runs]
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths))]
    html = page(runs, args.samples, args.step, args.id)
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))  # no half of a surrogate pair
    print(f"{out}: {len(html) / 1e6:.1f} MB", flush=True)
    return any(isinstance(run, Training) and not run.finished for run in runs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of trainings and evaluations")
    parser.add_argument("--out", type=Path, help="report.html in the first folder unless given")
    parser.add_argument("--samples", type=int, default=200, help="groups in the sample browser at most")
    parser.add_argument("--step", type=int, nargs="+", default=[], help="show the groups of these steps")
    parser.add_argument("--id", nargs="+", default=[], help="show these samples, at every step they were sampled at")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="write it anew until the trainings have ended")
    args = parser.parse_args(argv)
    first = Path(args.runs[0])
    out = args.out or (first if first.is_dir() else first.parent) / "report.html"
    with user_errors():
        while True:
            start = time.monotonic()
            goes_on = write_report(args, out)
            if args.watch is None or not goes_on:
                return
            try:
                time.sleep(max(args.watch, 9 * (time.monotonic() - start)))  # a tenth of one core at most
            except KeyboardInterrupt:
                return


if __name__ == "__main__":
    main()
