"""Files of scores: what is written as items are scored, what a finished file may hold, and what it was made with.

A row has `id`, `task`, `source` and either `rewards`, one of each response from 0 to 1, or the `error` of its video.
What else select_data.py writes into one is for people.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from model.folder import weights_hash
from records import jsonl
from records.record import Sample, source_of
from runtime.run import config_differences

SCORES = "scores.jsonl"
MADE_WITH = ("model", "video", "prompt", "rollout", "rewards")  # sections that the statistics depend on


def head_of(sample: Sample) -> dict[str, str]:
    """What every row says of its sample.

    `item` is a hash of what the rewards depend on: scores of an item that has changed since are an error.
    """
    asked = (sample.question, sample.options, sample.answer, sample.segments, sample.clip, Path(sample.video).name)
    item = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    return {"id": sample.id, "task": sample.task, "source": source_of(sample), "item": item}


def read_scores(path: Path, samples: Sequence[Sample]) -> list[dict]:
    """The rows of a score file in the order of the samples, with their task and source. Raises ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"select.scores {path} not found")
    known = {sample.id: head_of(sample)["item"] for sample in samples}
    rows: dict[str, dict] = {}
    for number, content in jsonl.read(path):
        try:
            row = _checked(content)
            if row["id"] in rows:
                raise ValueError(f"the id {row['id']!r} stands in a row before it")
            if row["id"] not in known:
                raise ValueError(f"the id {row['id']!r} is not in data.train: scores of other data")
            if row.get("item", known[row["id"]]) != known[row["id"]]:
                raise ValueError(f"{row['id']!r} was scored with another question or truth than data.train has now")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        rows[row["id"]] = row
    missing = [sample.id for sample in samples if sample.id not in rows]
    if missing:
        raise ValueError(f"{path}: no scores of {len(missing)} of the {len(samples)} items, the first: {missing[0]!r}")
    return [rows[sample.id] | head_of(sample) for sample in samples]


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row; its `rewards` are made of `extra.difficulty` where it has those alone. Raises ValueError."""
    if not isinstance(row.get("id"), str):
        raise ValueError("id is missing or not a text")
    if not isinstance(row.get("parse_fail", 0), int):
        raise ValueError("parse_fail must be a whole number")
    if isinstance(row.get("error"), str) and row["error"]:
        return {"id": row["id"], "error": row["error"]}
    extra = row.get("extra")
    if "rewards" not in row and isinstance(extra, dict) and _is_number(extra.get("difficulty")):
        row["rewards"] = [extra["difficulty"] / 100]
    rewards = row.get("rewards")
    if not isinstance(rewards, list) or not rewards or not all(_is_number(x) and 0 <= x <= 1 for x in rewards):
        raise ValueError("rewards must be a list of numbers from 0 to 1, or extra.difficulty one from 0 to 100")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def origin(path: Path, config_yaml: str, allowed: Sequence[str]) -> dict[str, Any]:
    """What the scores were made with, from the files beside them; {} where those are not there.

    Raises ValueError when that is not what `config_yaml` says, but for the keys and sections `allowed`.
    """
    beside = path.parent / "config.yaml"
    if not beside.is_file():
        print(f"{path}: no config.yaml beside it, so nobody knows which model and video specification made it")
        return {}
    differing = config_differences(beside, config_yaml)
    free, sections = {"rollout.group_size", "rollout.micro_batch_size", *allowed}, set(MADE_WITH) - set(allowed)
    keys = [key for key in differing if key not in free and key.partition(".")[0] in sections]
    if keys:
        raise ValueError(
            f"{path} was made with another {', '.join(differing[key] for key in keys)}; "
            f"select.allow=[{','.join(keys)}] takes it all the same"
        )
    made, env = yaml.safe_load(beside.read_text()), path.parent / "env.json"
    known = json.loads(env.read_text()) if env.is_file() else {}
    then, model = known.get("weights"), yaml.safe_load(config_yaml)["model"]["path"]
    if then and made["model"]["path"] == model and not {"model", "model.path"} & set(allowed):
        now = weights_hash(model)
        if now and now != then:
            raise ValueError(
                f"{path} was made with other weights than {model} has now: give another run.dir (there, with "
                f"select.scores={path}, select.allow=[model.path] takes it all the same)"
            )
    return {section: made.get(section) for section in MADE_WITH} | {
        key: known.get(key) for key in ("weights", "packages", "commit")
    }
