"""Run folders as trainings and evaluations leave them, written without a model."""

import json
import math
from pathlib import Path

import yaml

from metrics.rows import truth_hash
from metrics.tasks import score_predictions

CONFIG = {
    "run": {"steps": 3, "seed": 0},
    "model": {"path": "tiny_world/model", "lora_rank": 0},
    "data": {"train": "tiny_world/tvg_train.yaml", "validation": "", "batch_size": 2},
    "rollout": {"group_size": 2, "max_new_tokens": 16, "temperature": 1.0},
    "optim": {"lr": 5e-4, "schedule": "cosine"},
}
ENV = {"commit": "0123456789abcdef", "diff": "", "devices": ["cpu, 1 threads"], "packages": {"torch": "2.13.0"}}
HOSTILE = (
    "<script>window.__pwned = 1</script>",
    '"onload="window.__pwned = 1',
    "<img src=x onerror=window.__pwned=1>",
    "</script><script>window.__pwned = 1</script>",
    "<!--<script>",
    "{{ 7 * 7 }} {% raw %}",
    "\u202eright to left\u2066\u2028line\u2029",
    "' onclick='window.__pwned = 1",
    "javascript:window.__pwned=1",
    "</title></style><svg onload=alert(1)>",
)


def metrics_row(step: int, num_steps: int, **changes) -> dict:
    """Of a training whose reward goes from 0 to 1."""
    share = step / num_steps
    row = {
        "step": step,
        "reward/total": share,
        "reward/iou": share**2,
        "length/mean": 8 + math.sin(step),
        "kl": 0.01 * share,
    }
    row |= {"group/frac_mixed": 0.75, "group/frac_all_good": 0.25 * share, "group/frac_all_bad": 0.0, "clip_frac": 0.0}
    row |= {"time/data": 0.1, "time/data_wait": 0.05, "time/rollout": 0.3, "time/update": 0.5, "time/step": 1.0 + share}
    return row | changes


def sample_row(step: int = 1, id: str = "a", **changes) -> dict:
    """Of a grounding question about 20 s, one of whose two completions is right."""
    row = {
        "step": step,
        "group": 0,
        "id": id,
        "task": "tvg",
        "video": "/nowhere/a.mp4",
        "duration": 20.0,
        "question": "When?",
    }
    row |= {"segments": [[5.0, 15.0]], "completions": ["<answer>5 to 15</answer>", "<answer>0 to 4</answer>"]}
    row |= {"rewards": [1.0, 0.5], "parts": [{"format": 1.0, "iou": 1.0}, {"format": 1.0, "iou": 0.0}]}
    return row | {"advantages": [0.7071, -0.7071]} | changes


def write_training(folder: Path, metrics=(), samples=(), config=CONFIG, finished: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps(ENV))
    for name, rows in (("metrics", metrics), ("samples", samples)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if finished:
        (folder / "final").mkdir(exist_ok=True)
    return folder


def prediction(id: str, start: float, **changes) -> dict:
    """Of a question about 20 s whose answer is 5 to 15: a span of 10 s from `start`."""
    row = {
        "id": id,
        "task": "tvg",
        "question": "When?",
        "video": f"{id}.mp4",
        "segments": [[5.0, 15.0]],
        "duration": 20.0,
    }
    return row | {"response": f"<answer>{start:g} to {start + 10:g}</answer>"} | changes


def write_evaluation(folder: Path, rows: list[dict], **spec) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"answer": "tagged", "unanswered": "wrong", "model": "m", "data_hash": truth_hash(rows)} | spec
    content = {"spec": spec, "predictions": "predictions.jsonl"} | score_predictions(rows)
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("data: {test: tiny_world/tvg_test.yaml}\n")
    return folder
