"""Checkpoints of a run folder: which is the newest complete one, and rows written after it."""

import json
from pathlib import Path


def newest_checkpoint(dir: str | Path) -> Path | None:
    complete = [path for path in sorted(Path(dir, "checkpoints").glob("step_*")) if (path / "run.json").is_file()]
    return complete[-1] if complete else None


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of a .jsonl written after `step` steps (rows count them from 1), and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: a completion may hold U+2028
        try:
            row = json.loads(line)
        except ValueError:  # torn, maybe within a character; or nothing, after the last line end
            break
        if row["step"] <= step:
            kept.append(line + b"\n")
    path.write_bytes(b"".join(kept))
