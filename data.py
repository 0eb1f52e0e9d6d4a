"""Records to `Sample`s, a data order that is a pure function of (seed, step), and the check of records and their files.

Not a DataLoader: what a step trains on is `samples[i] for i in batch_indices(...)`, so resuming needs no state.

    python data.py check train.jsonl --videos DIR --manifest manifest.jsonl
    python data.py check train.yaml validation.yaml --manifest manifest.jsonl
    python data.py check DIR                                                # every file below a folder, without records
"""

import argparse
import json
import math
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import manifest as manifest_io
from manifest import Manifest
from readers import VideoError, read_duration
from records import (
    CHAT,
    BadRecord,
    Sample,
    from_temporal_r1,
    lacks_duration,
    refuse_parquet,
    to_sample,
    with_duration,
)


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
    for file, folder, strategy, where in _sources(path, need_videos=need_videos):
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
            raise ValueError(
                f"{path}: {sample.id!r} is a chat record: no answer can be scored by it (train_sft.py alone)"
            )
        seen.add(sample.id)
    return samples


def read_for_floor(path: str, out_of_clip: str = "clamp", seed: int = 0) -> list[Sample]:
    """Read the records of `path` for what needs neither videos nor every record: the best constant answers, blind.py.

    A record that cannot be used is left out, where `read_samples` raises, and a line for each file counts those. So is
    one without a duration whose video cannot be opened, if its task needs a duration. Ids may be there twice.
    Raises ValueError and FileNotFoundError for a file that cannot be read at all.
    """
    samples = []
    for file, folder, strategy, where in _sources(path, need_videos=False):
        read = _read_file(file, folder, out_of_clip, known=None, need_videos=False, for_floor=True)
        samples += _subset(read, strategy, where, seed)
    return samples


def files_of(path: str) -> list[Path]:
    """The files of records that `path` stands for: itself, or those that a .yaml lists. Raises as `read_samples`."""
    return [file for file, *_ in _sources(path, need_videos=False)]


def _sources(path: str, videos: str | None = None, need_videos: bool = True) -> list[tuple[Path, Path, str, str]]:
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


def _read_file(
    path: Path, folder: Path, out_of_clip: str, known: Manifest | None, need_videos: bool, for_floor: bool = False
) -> list[Sample]:
    samples, clamped, dropped, missing, left_out = [], 0, 0, [], []
    durations: dict[tuple, float] = {}  # of files, for records without one
    num_without = 0
    for row, record, outside, is_there in _records(path, folder):
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


def _records(path: Path, folder: Path) -> Iterator[tuple[int, "Sample | BadRecord", list | None, bool]]:
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
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of records")
        numbered = enumerate(records, 1)
    else:  # not splitlines: a question may hold U+2028
        numbered = ((i, _parse(line)) for i, line in enumerate(content.split(b"\n"), 1) if line.strip())
    for row, record in numbered:
        if not isinstance(record, dict | BadRecord):
            record = BadRecord(f"expected an object, got {type(record).__name__}")
        elif isinstance(record, dict) and not _is_unicode(record):
            record = BadRecord("not UTF-8: half a surrogate pair")
        yield row, record


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not valid JSON: {error}")


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


def batch_indices(
    num_samples: int,
    batch_size: int,
    step: int,
    seed: int,
    first_epoch: int = 0,
    difficulty: np.ndarray | None = None,
    order_of: Callable[[int], np.ndarray] | None = None,
) -> list[int]:
    """Indices of step `step` (from 0): every epoch has an order of its own, and batches run on across epochs.

    Step 0 begins the epoch `first_epoch`. `order_of(epoch)` gives what `epoch_order` makes of the other arguments, for
    a caller that keeps it: making it takes as long as there are samples.

    >>> sorted(batch_indices(4, 3, 0, seed=7) + batch_indices(4, 3, 1, seed=7)[:1])
    [0, 1, 2, 3]
    >>> batch_indices(3, 4, 0, seed=7, difficulty=np.array([0.5, 0.9, 0.1]))
    [2, 0, 1, 2]
    """
    order_of = order_of or cache(partial(epoch_order, num_samples, seed, difficulty=difficulty))
    places = (divmod(place, num_samples) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(order_of(first_epoch + epoch)[place]) for epoch, place in places]


def epoch_order(num_samples: int, seed: int, epoch: int, difficulty: np.ndarray | None = None) -> np.ndarray:
    """All indices in the order of an epoch: a permutation of its own.

    With the `difficulty` of each sample it goes from easy to hard, the permutation deciding between equals.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    return order if difficulty is None else order[np.argsort(difficulty[order], kind="stable")]


def difficulties(samples: Sequence[Sample]) -> np.ndarray:
    """1 - `extra.reward_mean` of each sample, what `select_data.py` writes. Raises ValueError where there is none."""
    means = [(sample.extra or {}).get("reward_mean") for sample in samples]
    for sample, mean in zip(samples, means):
        if not isinstance(mean, int | float):
            raise ValueError(
                f"data.order=curriculum: record {sample.id!r} has no number extra.reward_mean; `python select_data.py` "
                f"writes it into selected.jsonl"
            )
    return 1.0 - np.array(means, dtype=float)


def refill_indices(num_samples: int, taken: Sequence[int], count: int, step: int, refill: int, seed: int) -> list[int]:
    """Up to `count` further indices for refill round `refill` (from 1) of a step, none of them in `taken`.

    A pure function of its arguments, like `batch_indices`; drawn from the whole data set, whatever the epoch.
    """
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng((seed, step, refill)).permutation(free)[:count].tolist()


def spare_indices(num_samples: int, taken: Sequence[int], step: int, refill: int, seed: int) -> list[int]:
    """What stands in for samples that cannot be read, in this order: everything that the step has not `taken`.

    A pure function of its arguments, like `batch_indices`; `refill` is 0 for a step's first round.
    """
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng((seed, step, refill, 1)).permutation(free).tolist()


def records_of(source: str, videos: str | None = None) -> list[tuple[str, Sample | BadRecord]]:
    """Every record of a data file, good or bad, with its file and row; `videos` is the folder to look in.

    Or of every file below a folder, as a sample without a question, whose id is its path there. Raises ValueError and
    FileNotFoundError for a source that cannot be read at all.
    """
    root = Path(source)
    if root.is_dir():
        paths = sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return [("", Sample(str(path.relative_to(root)), "", str(path), "")) for path in paths]
    files = dict.fromkeys((file, folder) for file, folder, _, _ in _sources(source, videos))
    return [(f"{file.name}:{row}", record) for file, folder in files for row, record, *_ in _records(file, folder)]


def mark_repeated(records: Sequence[tuple[str, Sample | BadRecord]]) -> list[tuple[str, Sample | BadRecord]]:
    """The same, with every record whose id another one before it has turned into a BadRecord."""
    row_of: dict[str, str] = {}
    marked = []
    for row, record in records:
        if isinstance(record, Sample) and record.id in row_of:
            error = BadRecord(f"id: {record.id!r} is that of {row_of[record.id]} too")
            error.id = record.id
            record = error
        elif isinstance(record, Sample):
            row_of[record.id] = row
        marked.append((row, record))
    return marked


def check(args: argparse.Namespace) -> int:
    """Read every record and open every video; prints what is wrong, writes the manifest, returns the exit code."""
    if args.workers < 0 or args.timeout <= 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}, and --timeout above 0, got {args.timeout}")
    if args.videos and not Path(args.videos).is_dir():
        raise FileNotFoundError(f"--videos {args.videos}: no such folder")
    if args.manifest and not Path(args.manifest).absolute().parent.is_dir():
        raise FileNotFoundError(f"--manifest {args.manifest}: no such folder")
    records = mark_repeated([pair for source in args.sources for pair in records_of(source, args.videos)])
    if not records:
        raise ValueError(f"{' '.join(args.sources)}: no records")
    lines = manifest_io.examine(records, args.workers, args.timeout)
    if args.manifest:
        manifest_io.write(lines, args.manifest)
    print("\n".join(manifest_io.summary(lines)))
    num_without = sum(isinstance(record, Sample) and lacks_duration(record) for _, record in records)
    if num_without:
        print(f"{num_without} records without a duration take that of their file")
    return int(not all(line["ok"] for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="read every record, open every video; exit code 1 if anything is bad")
    command.add_argument("sources", nargs="+", metavar="DATA", help=".yaml, .jsonl, .json or a folder of videos")
    command.add_argument("--videos", metavar="DIR", help="folder of the videos, in place of where DATA says they are")
    command.add_argument("--manifest", metavar="OUT", help="JSON lines to write, one per record: data.manifest")
    command.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    command.add_argument("--timeout", type=float, default=120.0, help="seconds that one video may take")
    command.set_defaults(call=check)
    args = parser.parse_args(argv)
    try:
        return args.call(args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
