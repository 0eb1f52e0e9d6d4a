"""Files of records to samples: JSON lines, Temporal-R1's JSON, and the YAML that lists several of them.

What may stand in one record is in record.py. An error names the file, the row and the key.
"""

import json
import math
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from records import jsonl
from records.manifest import Manifest
from records.record import (
    CHAT,
    BadRecord,
    Sample,
    from_temporal_r1,
    lacks_duration,
    refuse_parquet,
    to_sample,
    with_duration,
)
from video.readers import VideoError, read_duration


def read_samples(
    path: str,
    out_of_clip: str = "clamp",
    seed: int = 0,
    manifest: str = "",
    need_videos: bool = True,
    chat: bool = False,
) -> list[Sample]:
    """Read a `.jsonl` of records, a Temporal-R1 `.json`, or a `.yaml` list of data sets (Temporal-R1's form).

    Relative paths in a YAML count from its folder; videos of a bare file lie in `videos/` beside
    it, where there is such a folder, else beside it.
    `out_of_clip` says what becomes of a segment that ends after its video: clamp, drop or error; `manifest` names the
    file of `python data.py check` whose bad records are dropped; counts are printed. Without `need_videos` it is not
    looked whether the videos are there. Without `chat` a chat record, which nothing can be scored by, is an error.
    Raises ValueError naming file, row and key for anything malformed, FileNotFoundError for what is not there.
    """
    known = Manifest(manifest) if manifest else None
    samples = []
    for file, folder, strategy, where in sources_of(path, need_videos=need_videos):
        samples += _subset(_read_file(file, folder, out_of_clip, known, need_videos), strategy, where, seed)
    if known is not None:
        known.report(path, len(samples))
    if not samples:
        raise ValueError(f"{path}: no samples")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"{path}: two records with the id {sample.id!r}")
        if sample.task == CHAT and not chat:
            no = "no answer can be scored by it (train_sft.py alone)"
            raise ValueError(f"{path}: {sample.id!r} is a chat record: {no}")
        seen.add(sample.id)
    return samples


def read_for_floor(path: str, out_of_clip: str = "clamp", seed: int = 0) -> list[Sample]:
    """Read the records of `path` for the best constant answers (metrics/blind.py), which need no video.

    A record that cannot be used is left out, where `read_samples` raises, and a line for each file counts those. So is
    one without a duration whose video cannot be opened, if its task needs a duration. Ids may be there twice.
    Raises ValueError and FileNotFoundError for a file that cannot be read at all.
    """
    samples = []
    for file, folder, strategy, where in sources_of(path, need_videos=False):
        read = _read_file(file, folder, out_of_clip, known=None, need_videos=False, for_floor=True)
        samples += _subset(read, strategy, where, seed)
    return samples


def check_floor(data: str) -> None:
    """Raises FileNotFoundError, with what to do, where `data.floor` or a file that it lists is not there."""
    listed = sources_of(data, need_videos=False) if Path(data).is_file() else [(Path(data),)]
    for file, *_ in listed:
        if not file.is_file():
            name = os.path.normpath(file)
            todo = "give another path"
            if data.startswith("tiny_world/"):
                todo = "`python tiny.py` writes it"
            elif file.suffix == ".jsonl":
                todo = f"`python convert.py SOURCE --annotations FILES --out {name}` writes it (docs/evaluation.md)"
            raise FileNotFoundError(
                f"data.floor names {name}, and there is no such file: {todo}, or go without a floor by `data.floor=`"
            )


def sources_of(path: str, videos: str | None = None, need_videos: bool = True) -> list[tuple[Path, Path, str, str]]:
    """Of every data set of `path`: file of records, folder of videos, sampling strategy, and a name for messages."""
    source = Path(path)
    if source.is_dir():
        raise FileNotFoundError(f"data file {path} is a folder; give the .yaml, .jsonl or .json that lists its videos")
    if not source.is_file():
        hint = "`python tiny.py` writes the embedded default" if path.startswith("tiny_world/") else "give another path"
        raise FileNotFoundError(f"data file {path} not found; {hint}")
    if source.suffix not in (".yaml", ".yml"):
        beside = source.parent / "videos"
        folder = Path(videos) if videos else beside if beside.is_dir() else source.parent
        return [(source, folder, "all", path)]
    sources = []
    for entry in _data_sets(source):
        folder = Path(videos) if videos else source.parent / entry["data_folder"]
        if need_videos and not folder.is_dir():
            raise FileNotFoundError(f"{path}: video folder {folder} not found")
        name, strategy = entry["json_path"], str(entry.get("sampling_strategy", "all"))
        sources.append((source.parent / name, folder, strategy, f"{path}: {name}"))
    return sources


def _data_sets(path: Path) -> list[dict]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list under the key datasets")
    for i, entry in enumerate(entries):
        where = f"{path}: datasets[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected json_path and data_folder, got {entry!r}")
        for key in ("json_path", "data_folder"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{where}: {key} is missing or not a text")
        if unknown := entry.keys() - {"json_path", "data_folder", "sampling_strategy"}:
            raise ValueError(f"{where}: unknown key {min(map(str, unknown))}")
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


def _read_file(
    path: Path, folder: Path, out_of_clip: str, known: Manifest | None, need_videos: bool, for_floor: bool = False
) -> list[Sample]:
    samples, missing, left_out = [], [], []
    clamped, dropped, num_without = 0, 0, 0
    durations: dict[tuple, float] = {}  # of files, for records without one
    for row, record, outside, is_there in records_in(path, folder):
        if known is not None and known.drops(f"{path.name}:{row}", record):
            continue
        try:
            sample, outside = _usable(record, outside, out_of_clip, known, durations)
        except ValueError as error:
            if not for_floor:
                raise ValueError(f"{path}:{row}: {error}") from None
            left_out.append(f"row {row}: {error}")
            continue
        num_without += lacks_duration(record)
        clamped += bool(outside) and out_of_clip == "clamp"
        if outside and out_of_clip == "drop":
            dropped += 1
        else:
            samples.append(sample)
            if need_videos and not is_there:
                missing.append(f"{sample.video} ({path}:{row})")
    if missing and known is None:  # a file that was there at the check is replaced when its turn comes
        raise FileNotFoundError(
            f"{len(missing)} of {len(samples)} videos not found, the first: {missing[0]}; "
            f"`python data.py check` lists them all, and data.manifest leaves them out"
        )
    if left_out:
        num = len(left_out) + dropped + len(samples)
        print(f"floor: {len(left_out)} of {num} records of {path} left out, the first: {left_out[0]}")
    if num_without:
        print(f"{path}: {num_without} records without a duration take that of their file")
    if clamped or dropped:
        print(f"{path}: {clamped} segments clamped to their video, {dropped} records dropped (data.out_of_clip)")
    return samples


def _usable(
    record: "Sample | BadRecord",
    outside: list | None,
    out_of_clip: str,
    known: Manifest | None,
    durations: dict[tuple, float],
) -> tuple[Sample, list | None]:
    """The sample of a row with its duration, and its segments as they were if they had to be clamped.

    Raises ValueError with the reason alone, which does not name file and row.
    """
    if isinstance(record, BadRecord):
        raise record
    if lacks_duration(record):
        record, outside = _take_duration(record, outside, known, durations)
    if outside and out_of_clip == "error":
        raise ValueError(f"segments {outside} end after the video ({record.duration} s)")
    return record, outside


def _take_duration(
    sample: Sample, outside: list | None, known: Manifest | None, durations: dict[tuple, float]
) -> tuple[Sample, list | None]:
    """The sample with the duration of its file: by the manifest, else by the header, which is read once for each file.

    Also its segments as they were if they had to be clamped. Raises ValueError, also where a segment lies outside.
    """
    line, file = known.file_of(sample.id) if known else None, (sample.video, sample.fps)
    try:
        if line is None and file not in durations:
            durations[file] = read_duration(*file)
        found, clamped = with_duration(sample, line["duration"] if line else durations[file])
    except VideoError as error:
        raise ValueError(f"duration is missing in the record, and its file has none: {error}") from None
    return found, outside or ([list(segment) for segment in sample.segments] if clamped else None)


def records_in(path: Path, folder: Path) -> Iterator[tuple[int, "Sample | BadRecord", list | None, bool]]:
    """Every row of a file: its number from 1, what it is, its segments as they were if they had to be clamped.

    The last value says whether the video is there.
    """
    for row, record in _rows(path):
        if isinstance(record, BadRecord):
            yield row, record, None, False
            continue
        try:
            if "problem" in record:
                record = from_temporal_r1(record, path.stem, row)
            sample, outside = to_sample(record, folder)
            is_there = _check_kind(sample)
            yield row, sample, record["segments"] if outside else None, is_there
        except BadRecord as error:
            error.id = record["id"] if isinstance(record.get("id"), str) else None
            yield row, error, None, False


def _rows(path: Path) -> Iterator[tuple[int, "dict | BadRecord"]]:
    """(row number from 1, record) of a .jsonl or of a .json list."""
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} not found")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    refuse_parquet(path, content)
    if path.suffix == ".json":
        try:
            records = jsonl.parse(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of records")
        numbered = enumerate(records, 1)
    else:
        numbered = ((row, _parse(line)) for row, line in jsonl.lines(content))
    for row, record in numbered:
        if not isinstance(record, dict | BadRecord):
            record = BadRecord(f"expected an object, got {type(record).__name__}")
        elif isinstance(record, dict) and not _is_unicode(record):
            record = BadRecord("not UTF-8: half a surrogate pair")
        yield row, record


def _parse(line: bytes) -> Any:
    try:
        return jsonl.parse(line)
    except ValueError as error:
        return BadRecord(str(error))


def _is_unicode(record: dict) -> bool:
    try:
        return bool(json.dumps(record, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _check_kind(sample: Sample) -> bool:
    """Whether the video is there. Raises BadRecord where it is a file and a folder is described, or the reverse."""
    try:
        mode = os.stat(sample.video).st_mode
    except (OSError, ValueError):
        return False
    if stat.S_ISDIR(mode) and sample.fps is None:
        raise BadRecord("video is a folder of frames: fps is missing")
    if stat.S_ISREG(mode) and sample.fps is not None:
        raise BadRecord("fps is for a folder of frames, but video is a file")
    return True
