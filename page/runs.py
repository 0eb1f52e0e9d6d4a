"""Run folders as report.py reads them: trainings and evaluations, and the summary of a training in words."""

import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from config import flat
from metrics.compare import Result, read_result
from page.curves import Curve, Series, finite
from page.samples import cut, read_rows

FEW = 20  # steps at the start and at the end that rewards are means of
SETTINGS = (  # keys of the configuration that the summary has, if they are there
    *("model.path", "model.lora_rank", "data.train", "data.validation", "data.batch_size", "run.seed"),
    *("rollout.group_size", "rollout.max_new_tokens", "rollout.temperature", "optim.lr", "optim.schedule"),
    *("loss.baseline", "loss.scale", "loss.aggregation", "loss.clip_low", "loss.clip_high", "loss.beta"),
    "loss.updates_per_rollout",
)


@dataclass(frozen=True)
class Training:
    name: str
    dir: Path
    config: dict[str, Any]  # flat: section.key
    env: dict[str, Any]
    series: Series

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
    """Read a run folder or a metrics.json. Raises ValueError where `path` is neither."""
    folder = path if path.is_dir() else path.parent
    config_file, env = folder / "config.yaml", folder / "env.json"
    try:
        config = flat(yaml.safe_load(config_file.read_text(encoding="utf-8"))) if config_file.is_file() else {}
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{config_file} is not a configuration") from None
    if path.is_file() or (folder / "metrics.json").is_file():
        result = read_result(str(path))
        return Evaluation(name, config, result, json.loads(Path(result.path).read_text(encoding="utf-8-sig")))
    if not (folder / "metrics.jsonl").is_file() and "optim.lr" not in config:
        raise ValueError(f"{path}: neither a training nor a finished evaluation (no metrics.jsonl, no metrics.json)")
    environment = json.loads(env.read_text(encoding="utf-8")) if env.is_file() else {}
    return Training(name, folder, config, environment, read_series(folder / "metrics.jsonl"))


def read_series(path: Path) -> Series:
    """Every metric of a metrics.jsonl; {} where there is no such file yet."""
    found: dict[str, Curve] = defaultdict(lambda: (array("d"), array("d")))
    for _, row in read_rows(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                found[name][0].append(row["step"])
                found[name][1].append(value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The path of each run folder from the folder that they are all in.

    >>> short_names([Path("runs/a/run"), Path("runs/b/run")])
    ['a/run', 'b/run']
    """
    folders = [os.path.abspath(path.parent if path.is_file() else path) for path in paths]
    root = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    return [cut(os.path.relpath(folder, root)) for folder in folders]


def facts(run: Training) -> dict[str, Any]:
    """What was trained, how and where, and what came of it."""
    c, env, num_steps = run.config, run.env, max((steps[-1] for steps, _ in run.series.values()), default=0)
    state = "finished" if run.finished else "not finished"
    found = {"State": f"{state}, {num_steps:,.0f} of {c.get('run.steps')} steps"}
    metrics, nothing = ("reward/total", "validation/score", "time/step"), np.zeros((2, 0))
    (_, rewards), (steps, scores), (_, seconds) = (finite(run.series.get(name, nothing)) for name in metrics)
    if len(rewards):
        few = max(1, min(FEW, len(rewards) // 3))
        means = f"{rewards[:few].mean():.3f} → {rewards[-few:].mean():.3f}"
        found["Reward"] = f"{means}, means of the first and last {few} steps"
    if len(scores):
        found["Best validation score"] = f"{scores.max():.1f} % after {steps[scores.argmax()]:,.0f} steps"
    if len(seconds):
        found["Time in steps"] = f"{timedelta(seconds=round(seconds.sum()))}, {np.median(seconds):.2f} s each"
    found["Method"] = "GRPO" if "rollout.group_size" in c else "SFT"
    found |= {key: c[key] for key in SETTINGS if key in c}
    devices, packages = Counter(env.get("devices", ())), env.get("packages", {})
    found["Commit"] = (env.get("commit") or "")[:12] + (" and uncommitted changes" if env.get("diff") else "")
    found["Device"] = ", ".join(f"{num} × {name}" if num > 1 else name for name, num in devices.items())
    found["Software"] = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return {name: value for name, value in found.items() if value != ""}
