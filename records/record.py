"""One record of a data set, a dictionary: what may stand in it, and the `Sample` that it becomes."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from records.tasks import TASKS

PLACEHOLDERS = ("<|video_pad|>", "<|image_pad|>")  # of Qwen-VL's vision tokens
CHAT = "chat"  # a response to imitate and no truth to score another one by: for supervised tuning alone
FIELDS = (
    "id", "task", "video", "duration", "question", "options", "answer", "segments",
    "clip", "fps", "source", "type", "response", "extra",
)  # fmt: skip
CALL_NAMES = {"prompts", "completions", "completion_ids", "trainer_state"}  # what a reward function is called with
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Sample:
    """One record; times in seconds from the start of the clip."""

    id: str
    task: str  # one of TASKS, or CHAT
    video: str  # path of the file, or of a folder of frames
    question: str
    duration: float | None = None
    options: tuple[str, ...] | None = None  # mcqa, gqa
    answer: str | None = None  # upper-case letter of the right option
    segments: tuple[tuple[float, float], ...] | None = None  # tvg, gqa: when it happens, start < end
    clip: tuple[float, float] | None = None  # the part of the file to use; times count from clip[0]
    fps: float | None = None  # frames per second of a folder of frames
    type: str = ""  # question type, for metrics by type
    source: str = ""  # the data set it was taken from
    response: str | None = None  # a full response to imitate (SFT in thinking mode)
    extra: dict[str, Any] | None = None  # further columns, for reward functions (rewards.functions)


def source_of(sample: Sample) -> str:
    """The data set that a sample is from: its `source`, else what stands before the / of its id, else ""."""
    head, slash, _ = sample.id.partition("/")
    return sample.source or (head if slash else "")


class BadRecord(ValueError):
    """A record that cannot be used, with its reason."""

    id: str | None = None  # of the record, where it has one


def reason_kind(reason: str) -> str:
    """A reason without its numbers and quotations, to count by.

    >>> reason_kind("segment [24, 26.5] lies outside the video (20.0 s)")
    'segment [N, N] lies outside the video (N s)'
    """
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", reason))


def refuse_parquet(path: Path, content: bytes) -> None:
    """Raises ValueError, with a command that writes JSON lines, where a file of records is Parquet."""
    if content[:4] == b"PAR1":
        load = f"load_dataset('parquet', data_files='{path}', split='train').to_json('{path.with_suffix('.jsonl')}')"
        raise ValueError(f'{path}: Parquet is not read; as JSON: python -c "from datasets import load_dataset; {load}"')


def to_sample(record: dict[str, Any], folder: Path) -> tuple[Sample, bool]:
    """Check one record; returns the sample, its segments clamped to the video, and whether any had to be clamped.

    Without a duration they are clamped at 0 alone, see `with_duration`. Raises BadRecord with the key and the reason.
    """
    for key in ("id", "task", "video", "question"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise BadRecord(f"{key} is missing or not a text")
    if unknown := set(record) - set(FIELDS):
        valid = ", ".join(sorted(FIELDS))
        raise BadRecord(f"unknown key {min(unknown)}; valid are {valid}; further columns go under extra")
    task = record["task"]
    if task not in (*TASKS, CHAT):
        raise BadRecord(f"task must be one of {', '.join((*TASKS, CHAT))}, got {task!r}")
    clip, duration, fps = _clip(record.get("clip")), record.get("duration"), record.get("fps")
    if duration is None and clip is not None:
        duration = clip[1] - clip[0]
    for key, value, unit in (("duration", duration, "seconds"), ("fps", fps, "frames per second")):
        if value is not None and (not _is_number(value) or value <= 0):
            raise BadRecord(f"{key} must be {unit} above 0, got {value!r}")
    for key in ("type", "source", "response"):
        if not isinstance(record.get(key), str | None):
            raise BadRecord(f"{key} must be a text, got {record[key]!r}")
    if task == CHAT and not (record.get("response") or "").strip():
        raise BadRecord("response is missing: a chat record has nothing else to learn from")
    kind = TASKS.get(task)
    options, answer = _options(record) if kind and kind.has_options else (None, None)
    texts = [("question", record["question"]), ("response", record.get("response") or "")]
    for key, text in [*texts, *(("options", option) for option in options or ())]:
        if any(placeholder in text for placeholder in PLACEHOLDERS):
            raise BadRecord(f"{key}: {text[:40]!r} holds a placeholder of the model's vision tokens")
    segments, outside = _segments(record.get("segments"), duration) if kind and kind.has_segments else (None, False)
    sample = Sample(
        id=record["id"],
        task=task,
        video=str(folder / record["video"]),
        question=record["question"].strip(),
        duration=None if duration is None else float(duration),
        options=options,
        answer=answer,
        segments=segments,
        clip=clip,
        fps=None if fps is None else float(fps),
        type=record.get("type") or "",
        source=record.get("source") or "",
        response=record.get("response"),
        extra=_extra(record.get("extra")),
    )
    return sample, outside


def lacks_duration(sample: Sample) -> bool:
    """Whether its task needs a duration and its record has none."""
    return sample.segments is not None and sample.duration is None


def with_duration(sample: Sample, duration: float) -> tuple[Sample, bool]:
    """The sample with its file's duration (seconds), and whether a segment had to be clamped to it.

    Raises BadRecord where a segment lies outside the video.
    """
    segments, outside = _segments([list(segment) for segment in sample.segments], duration)
    return replace(sample, duration=duration, segments=segments), outside


def to_record(sample: Sample) -> dict[str, Any]:
    """The record that `to_sample` reads as this sample, its video an absolute path: to be read from any folder."""
    values = {name: getattr(sample, name) for name in FIELDS} | {"video": os.path.abspath(sample.video)}
    return {name: value for name, value in values.items() if value not in (None, "")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # so not nan either


def _clip(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    if not (isinstance(clip, list) and len(clip) == 2 and all(map(_is_number, clip)) and 0 <= clip[0] < clip[1]):
        raise BadRecord(f"clip must be [start, end] in seconds with start < end, got {clip!r}")
    return float(clip[0]), float(clip[1])


def _extra(extra: Any) -> dict[str, Any] | None:
    if not isinstance(extra, dict | None):
        raise BadRecord(f"extra must be an object, got {extra!r}")
    for key in extra or ():
        if not isinstance(key, str):
            raise BadRecord(f"extra: the key {key!r} is not a text")
        if key in FIELDS or key in CALL_NAMES:
            raise BadRecord(f"extra: the key {key} is taken, by a field of the record or by TRL's reward functions")
    return extra


def _options(record: dict) -> tuple[tuple[str, ...], str]:
    options, answer = record.get("options"), record.get("answer")
    if not isinstance(options, list) or not 2 <= len(options) <= 26 or not all(isinstance(o, str) for o in options):
        raise BadRecord(f"options must be a list of 2 to 26 texts, got {options!r}")
    letters = LETTERS[: len(options)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise BadRecord(f"answer must be one of {', '.join(letters)}, got {answer!r}")
    return tuple(options), answer


def _segments(raw: Any, duration: float | None) -> tuple[tuple[tuple[float, float], ...], bool]:
    duration = math.inf if duration is None else duration
    if not isinstance(raw, list) or not raw:
        raise BadRecord(f"segments must be a list of [start, end], got {raw!r}")
    segments, outside = [], False
    for segment in raw:
        if not (isinstance(segment, list) and len(segment) == 2 and all(map(_is_number, segment))):
            raise BadRecord(f"a segment must be [start, end] in seconds, got {segment!r}")
        start, end = max(0.0, float(segment[0])), min(float(duration), float(segment[1]))
        outside = outside or segment[0] < 0 or segment[1] > duration
        if segment[1] <= segment[0]:
            raise BadRecord(f"a segment must end after it starts, got {segment!r}")
        if end <= start:
            raise BadRecord(f"segment {segment!r} lies outside the video ({duration} s)")
        segments.append((start, end))
    return tuple(segments), outside


def from_temporal_r1(record: dict, name: str, row: int) -> dict:
    """A Temporal-R1 row (`problem`, `solution` normalised to [0, 1], `video_length`) as one of our records."""
    for key in ("video", "solution", "video_length"):
        if key not in record:
            raise BadRecord(f"missing key {key}")
    length, solution = record["video_length"], record["solution"]
    spans = solution if isinstance(solution, list) and solution and isinstance(solution[0], list) else [solution]
    try:
        segments = [[float(a) * length, float(b) * length] for a, b in spans]
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(f"solution must be [start, end] in [0, 1], got {solution!r}") from None
    return {
        "id": str(record.get("id", f"{record.get('dataset', name)}/{row}")),
        "task": "tvg",
        "video": record["video"],
        "duration": length,
        "question": record["problem"],
        "segments": segments,
    }
