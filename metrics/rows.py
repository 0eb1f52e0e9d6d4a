"""Rows of predictions.jsonl: the file, the truth that a row repeats of its record, and hashes of both."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import jsonl

TRUTH = ("task", "question", "video", "clip", "options", "answer", "segments", "duration", "type")  # of the record


# ---- rows and their truth ------------------------------------------------------------------------------------------
def truth_of(sample: Any) -> dict[str, Any]:
    """What a row of predictions repeats of its record: the id and the truth."""
    truth = {key: getattr(sample, key) for key in ("id", *TRUTH)} | {"video": os.path.basename(sample.video)}
    return {key: value for key, value in truth.items() if key not in ("clip", "type") or value}


def truth_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the questions that rows answer: equal where the same truth was scored, in the same order."""
    return hash_of([[row["id"], *(row.get(key) for key in TRUTH)] for row in rows])


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def with_truth(rows: Sequence[Mapping[str, Any]], samples: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    """Predictions with the truth of the records `samples`, in their order; those without a prediction are `missing`.

    Raises ValueError naming the row whose id is repeated, or not in `path`, where the samples are from.
    """
    predicted: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        row_id = row.get("id") if isinstance(row.get("id"), str) else repr(row.get("id"))
        if row_id not in samples or row_id in predicted:
            problem = "is repeated" if row_id in predicted else f"is not in {path}"
            raise ValueError(f"row {number}: key 'id': {row_id!r} {problem}")
        predicted[row_id] = row
    missing = {"response": "", "missing": True}
    return [{"id": i, **predicted.get(i, missing), **truth_of(sample)} for i, sample in samples.items()]


# ---- files ---------------------------------------------------------------------------------------------------------
def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. Raises ValueError naming the row (from 1) that is no JSON object."""
    rows = [row for _, row in jsonl.read(path, "row ")]
    if not rows:
        raise ValueError("no rows")
    return rows
