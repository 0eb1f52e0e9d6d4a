"""Records to `Sample`s, samples to prompts, and a data order that is a pure function of (seed, step).

Not a DataLoader: what a step trains on is `samples[i] for i in batch_indices(...)`, so resuming needs no state.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import video as video_io
from cache import FrameCache
from config import PromptConfig, VideoConfig
from video import Geometry, Video

TASKS = ("tvg", "mcqa", "gqa")
FIELDS = {
    "id", "task", "video", "duration", "question", "options", "answer", "segments",
    "clip", "source", "type", "response", "extra",
}  # fmt: skip
CALL_NAMES = {"prompts", "completions", "completion_ids", "trainer_state"}  # what a reward function is called with
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Sample:
    """One record; times in seconds from the start of the clip."""

    id: str
    task: str  # one of TASKS
    video: str  # path of the file
    question: str
    duration: float | None = None
    options: tuple[str, ...] | None = None  # mcqa, gqa
    answer: str | None = None  # upper-case letter of the right option
    segments: tuple[tuple[float, float], ...] | None = None  # tvg, gqa: when it happens, start < end
    clip: tuple[float, float] | None = None  # the part of the file to use; times count from clip[0]
    type: str = ""  # question type, for metrics by type
    response: str | None = None  # a full response to imitate (SFT in thinking mode)
    extra: dict[str, Any] | None = None  # further columns, for reward functions (rewards.functions)


@dataclass(frozen=True)
class Prompt:
    """What one sample's video and question become: token ids with the video placeholders in place."""

    sample: Sample
    ids: list[int]  # (P,) prompt tokens, video.num_tokens of them the video placeholder, in one run
    video_start: int  # index of the first placeholder
    video: Video


class BadRecord(ValueError):
    """A record that cannot be used, with its reason."""


def read_samples(path: str, out_of_clip: str = "clamp", seed: int = 0) -> list[Sample]:
    """Read a `.jsonl` of records, a Temporal-R1 `.json`, or a `.yaml` list of data sets (Temporal-R1's form).

    Relative paths in a YAML count from its folder; videos of a bare file are looked for beside it and in `videos/`.
    `out_of_clip` says what becomes of a segment that ends after its video: clamp, drop or error; counts are printed.
    Raises ValueError naming file, row and key for anything malformed, FileNotFoundError for what is not there.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"data file {path} not found; `python tiny.py` writes the embedded default")
    if source.suffix not in (".yaml", ".yml"):
        beside = source.parent / "videos"
        samples = _read_file(source, beside if beside.is_dir() else source.parent, out_of_clip)
    else:
        samples = []
        for entry in _data_sets(source):
            folder = source.parent / entry["data_folder"]
            if not folder.is_dir():
                raise FileNotFoundError(f"{path}: video folder {folder} not found")
            rows = _read_file(source.parent / entry["json_path"], folder, out_of_clip)
            samples += _subset(rows, str(entry.get("sampling_strategy", "all")), f"{path}: {entry['json_path']}", seed)
    if not samples:
        raise ValueError(f"{path}: no samples")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"{path}: two records with the id {sample.id!r}")
        seen.add(sample.id)
    return samples


def _data_sets(path: Path) -> list[dict]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list under the key datasets")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: datasets[{i}]: expected json_path and data_folder, got {entry!r}")
        for key in ("json_path", "data_folder"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{path}: datasets[{i}]: {key} is missing or not a text")
        unknown = entry.keys() - {"json_path", "data_folder", "sampling_strategy"}
        if unknown:
            raise ValueError(f"{path}: datasets[{i}]: unknown key {min(map(str, unknown))}")
    return entries


def _subset(samples: list[Sample], strategy: str, where: str, seed: int) -> list[Sample]:
    """Temporal-R1's `all`, `first:N`, `end:N`, `random:N`; N may be a percentage."""
    kind, _, amount = strategy.partition(":")
    if kind == "all" and not amount:
        return samples
    try:
        num = math.ceil(len(samples) * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    except (ValueError, OverflowError):
        num = -1
    if kind not in ("first", "end", "random") or num < 0:
        raise ValueError(f"{where}: sampling_strategy {strategy!r} is not all, first:N, end:N or random:N (N or N%)")
    num = min(num, len(samples))
    if kind == "random":
        return [samples[i] for i in sorted(random.Random(f"{seed}:{where}").sample(range(len(samples)), num))]
    return samples[:num] if kind == "first" else samples[len(samples) - num :]


def _read_file(path: Path, folder: Path, out_of_clip: str) -> list[Sample]:
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} not found")
    samples, clamped, dropped, missing = [], 0, 0, []
    for row, record in _rows(path):
        where = f"{path}:{row}"
        if "problem" in record:
            record = _from_temporal_r1(record, path.stem, row, where)
        try:
            sample, outside = to_sample(record, folder)
        except BadRecord as error:
            raise ValueError(f"{where}: {error}") from None
        if outside and out_of_clip == "error":
            raise ValueError(f"{where}: segments {record['segments']} end after the video ({sample.duration} s)")
        clamped, dropped = (
            clamped + (outside and out_of_clip == "clamp"),
            dropped + (outside and out_of_clip == "drop"),
        )
        if not (outside and out_of_clip == "drop"):
            samples.append(sample)
            if not Path(sample.video).exists():
                missing.append(f"{sample.video} ({where})")
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(samples)} videos not found, the first: {missing[0]}")
    if clamped or dropped:
        print(f"{path}: {clamped} segments clamped to their video, {dropped} records dropped (data.out_of_clip)")
    return samples


def _rows(path: Path) -> list[tuple[int, dict]]:
    """(row number from 1, record) of a .jsonl or of a .json list."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of records")
        numbered = list(enumerate(records, 1))
    else:
        numbered = []
        for i, line in enumerate(text.split("\n"), 1):  # not splitlines: a question may hold U+2028
            if not line.strip():
                continue
            try:
                numbered.append((i, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{i}: not valid JSON: {error}") from None
    for row, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{row}: expected an object, got {type(record).__name__}")
    return numbered


def _from_temporal_r1(record: dict, name: str, row: int, where: str) -> dict:
    """A Temporal-R1 row (`problem`, `solution` normalised to [0, 1], `video_length`) as one of our records."""
    for key in ("video", "solution", "video_length"):
        if key not in record:
            raise ValueError(f"{where}: missing key {key}")
    length, solution = record["video_length"], record["solution"]
    spans = solution if isinstance(solution, list) and solution and isinstance(solution[0], list) else [solution]
    try:
        segments = [[float(a) * length, float(b) * length] for a, b in spans]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: solution must be [start, end] in [0, 1], got {solution!r}") from None
    return {
        "id": str(record.get("id", f"{record.get('dataset', name)}/{row}")),
        "task": "tvg",
        "video": record["video"],
        "duration": length,
        "question": record["problem"],
        "segments": segments,
    }


def to_sample(record: dict[str, Any], folder: Path) -> tuple[Sample, bool]:
    """Check one record; returns the sample, its segments clamped to the video, and whether any had to be clamped.

    Raises BadRecord with the key and the reason.
    """
    for key in ("id", "task", "video", "question"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise BadRecord(f"{key} is missing or not a text")
    unknown = set(record) - FIELDS
    if unknown:
        raise BadRecord(
            f"unknown key {sorted(unknown)[0]}; valid are {', '.join(sorted(FIELDS))}; further columns go under extra"
        )
    task = record["task"]
    if task not in TASKS:
        raise BadRecord(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    clip = _clip(record.get("clip"))
    duration = record.get("duration", clip[1] - clip[0] if clip else None)
    if duration is not None and (not _is_number(duration) or duration <= 0):
        raise BadRecord(f"duration must be seconds above 0, got {duration!r}")
    if not isinstance(record.get("response"), str | None):
        raise BadRecord(f"response must be a text, got {record['response']!r}")
    options, answer = _options(record) if task != "tvg" else (None, None)
    segments, outside = _segments(record, duration) if task != "mcqa" else (None, False)
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
        type=str(record.get("type", "")),
        response=record.get("response"),
        extra=_extra(record.get("extra")),
    )
    return sample, outside


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        if key in FIELDS | CALL_NAMES:
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


def _segments(record: dict, duration: Any) -> tuple[tuple[tuple[float, float], ...], bool]:
    raw = record.get("segments")
    if duration is None:
        raise BadRecord("duration is missing")
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


def batch_indices(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of step `step` (from 0): every epoch is a permutation of its own, and batches run on across epochs.

    >>> sorted(batch_indices(4, 3, 0, seed=7) + batch_indices(4, 3, 1, seed=7)[:1])
    [0, 1, 2, 3]
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = {place // num_samples for place in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(num_samples) for epoch in epochs}
    return [int(orders[place // num_samples][place % num_samples]) for place in places]


def refill_indices(num_samples: int, taken: Sequence[int], count: int, step: int, refill: int, seed: int) -> list[int]:
    """Up to `count` further indices for refill round `refill` (from 1) of a step, none of them in `taken`.

    A pure function of its arguments, like `batch_indices`; drawn from the whole data set, whatever the epoch.
    """
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng((seed, step, refill)).permutation(free)[:count].tolist()


def user_text(sample: Sample, cfg: PromptConfig) -> str:
    """The user turn after the video: the task's template, filled in."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options or ()))
    values = {"question": sample.question, "options": options}
    return re.sub(r"\{(question|options)\}", lambda match: values[match[1]], getattr(cfg, sample.task))


def time_step(second_per_grid: float, rule: str) -> float:
    """Seconds between two time steps of a video as the rotary positions see them.

    `exact` is the truth. `whole_seconds` rounds down, as transformers 4.50 to 5.2 did by a cast to the index's integer
    type (QwenLM/Qwen3-VL#1282): a step below 1 s then puts all frames at one position. Only for reproducing results.
    """
    return second_per_grid if rule == "exact" else float(int(second_per_grid))


class PromptBuilder:
    """Samples to prompts, with one video specification and one prompt wording for training and evaluation alike."""

    def __init__(
        self,
        tokenizer,
        geometry: Geometry,
        video: VideoConfig,
        prompt: PromptConfig,
        cache: FrameCache | None,
    ):
        self.tokenizer, self.geometry, self.video, self.prompt, self.cache = (
            tokenizer,
            geometry,
            video,
            prompt,
            cache,
        )

    def __call__(self, sample: Sample) -> Prompt:
        """Decode the video and lay out the prompt. Raises video.VideoError when the file cannot be read."""
        loaded = video_io.load_video(sample.video, self.video, self.geometry, clip=sample.clip, cache=self.cache)
        loaded = replace(loaded, second_per_grid=time_step(loaded.second_per_grid, self.video.time_step))
        ids = self.tokenizer(self._text(sample), add_special_tokens=False).input_ids
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        if ids.count(pad) != 1:
            raise ValueError(
                f"sample {sample.id}: the chat template gives {ids.count(pad)} video placeholders, not one"
            )
        start = ids.index(pad)
        return Prompt(sample, ids[:start] + [pad] * loaded.num_tokens + ids[start + 1 :], start, loaded)

    def _text(self, sample: Sample) -> str:
        system = self.prompt.system_think if self.prompt.think else self.prompt.system_plain
        content = [{"type": "video"}, {"type": "text", "text": user_text(sample, self.prompt)}]
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": content})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def many(self, samples: Sequence[Sample]) -> list[Prompt]:
        return [self(sample) for sample in samples]


def make_builder(cfg, tokenizer) -> PromptBuilder:
    """The prompt builder of a whole config; raises ValueError when the model folder has no preprocessor file."""
    cache = FrameCache(cfg.data.cache_dir, cfg.data.cache_gib) if cfg.data.cache_dir else None
    return PromptBuilder(tokenizer, video_io.read_geometry(cfg.model.path), cfg.video, cfg.prompt, cache)
