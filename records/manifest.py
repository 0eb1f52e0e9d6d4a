"""What is known about each record and its video: found out by `python data.py check`, used through `data.manifest`.

A manifest is JSON lines, one per record: `row` (file:row), `id`, `path`, `ok`, `reason` (why not ok), `warning`, what
the file says (`frames`, `duration` in seconds, `fps` on average, `vfr`: frames are not evenly spaced, `width`,
`height`, `rotation` in degrees, `first_time` in seconds, `codec`), and its `size` and `mtime` (ns).
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from records import jsonl
from records.record import BadRecord, Sample, reason_kind
from video.workers import CallFailed, Workers

FILE_FIELDS = ("frames", "duration", "fps", "vfr", "width", "height", "rotation", "first_time", "codec")
TOLERANCE_S, TOLERANCE = 1.0, 0.05  # a duration may be off by 1 s or 5%, whichever is more
NUM_LISTED = 50  # lines printed of each kind


class Manifest:
    """The lines of a manifest, and what came of asking for records in it."""

    def __init__(self, path: str):
        """Raises FileNotFoundError, or ValueError naming file and row."""
        self.path = path
        self._videos: dict[str, dict] = {}  # by id: lines of records that could be read
        self._others: dict[tuple, str] = {}  # by row and id: why a record could not, or that its id was taken
        self.dropped, self.unknown, self.num_changed = Counter(), [], 0
        if not Path(path).is_file():
            raise FileNotFoundError(f"data.manifest {path} not found; `python data.py check` writes it")
        for number, line in jsonl.read(path):
            absent = {"row", "id", "path", "ok", "reason", "size", "mtime", *FILE_FIELDS} - line.keys()
            if absent:
                raise ValueError(f"{path}:{number}: not a line of a manifest: no {min(absent)}")
            if line["path"] is None:
                self._others[line["row"], line["id"]] = line["reason"]
            else:
                self._videos[line["id"]] = line

    def drops(self, row: str, record: Sample | BadRecord) -> bool:
        """Whether the manifest calls a record bad; counts that, or what else there is to say of it.

        `record` is what stands in `row` (file:row). A BadRecord is the reader's error, unless the manifest has it too.
        """
        other, line = self._others.get((row, record.id)), self._videos.get(record.id)
        if isinstance(record, BadRecord):
            reason = other if other == str(record) else None
        elif line is None:
            self.unknown.append(f"{record.id} ({row})")
            return False
        else:
            reason = other or (None if line["ok"] else line["reason"])  # other: a record before it has the same id
            self.num_changed += reason is None and (line["size"], line["mtime"]) != file_state(record.video)
        if reason is not None:
            self.dropped[reason_kind(reason)] += 1
        return reason is not None

    def file_of(self, sample_id: str) -> dict | None:
        """The line of a record whose video is usable: `FILE_FIELDS` and more; None where there is none."""
        line = self._videos.get(sample_id)
        return line if line and line["ok"] else None

    def report(self, source: str, num_kept: int) -> None:
        """Print what was dropped from `source`, and why. Raises ValueError when records were unknown."""
        if self.unknown:
            raise ValueError(
                f"{self.path} does not know {len(self.unknown)} records of {source}, the first: {self.unknown[0]}; "
                f"`python data.py check {source} --manifest {self.path}` writes it anew"
            )
        if self.dropped:
            reasons = ", ".join(f"{num} x {reason}" for reason, num in self.dropped.most_common())
            print(f"{source}: {self.dropped.total()} records dropped, {num_kept} kept (data.manifest): {reasons}")
        if self.num_changed:
            print(
                f"WARNING: {self.num_changed} files of {source} are gone or not the ones that were checked "
                f"(size or time of change differ from {self.path})",
                file=sys.stderr,
            )


def examine(records: Sequence[tuple[str, Sample | BadRecord]], num_workers: int, timeout_s: float) -> list[dict]:
    """The manifest's lines of records, given with their rows (file:row). Every video is opened once."""
    from video.frames import check_video  # here, so that arguments are read without torch

    files = list(dict.fromkeys((r.video, r.fps) for _, r in records if not isinstance(r, BadRecord)))
    states, found = {file: file_state(file[0]) for file in files}, {}
    with Workers(check_video, num_workers, timeout_s) as workers:
        calls = workers.ahead(files, 4 * num_workers)
        for file, call in zip(files, tqdm(calls, "check", len(files), unit="video", disable=None)):
            try:
                found[file] = workers.result(call)
            except CallFailed as error:
                found[file] = {"ok": False, "reason": str(error)}
    return [_line(row, record, found, states) for row, record in records]


def _line(row: str, record: Sample | BadRecord, found: dict, states: dict) -> dict:
    line = {"row": row, "id": record.id, "path": None, "ok": False, "reason": "", "warning": ""}
    line |= dict.fromkeys((*FILE_FIELDS, "size", "mtime"))
    if isinstance(record, BadRecord):
        return line | {"reason": str(record)}
    file = record.video, record.fps
    line |= {"path": record.video, **found[file]}
    line["size"], line["mtime"] = states[file]
    if line["ok"]:
        line["warning"], line["reason"] = line["reason"] or "", ""  # readable, but not to its end
        reason, warning = _disagreement(record, line["duration"])
        line["ok"], line["reason"] = not reason, reason
        line["warning"] = "; ".join(text for text in (line["warning"], warning) if text)
    return line


def _disagreement(sample: Sample, duration: float) -> tuple[str, str]:
    """Reason and warning, "" for none, when a record's times (seconds) do not fit a file of this duration."""
    start, end = sample.clip or (0.0, duration)
    length = min(end, duration) - start
    if length <= 0:
        return f"clip [{start:g}, {end:g}] starts after the video's end ({duration:.2f} s)", ""
    tolerance = max(TOLERANCE_S, TOLERANCE * length)
    for first, last in sample.segments or ():
        if first >= length or last > length + tolerance:
            return f"segment [{first:g}, {last:g}] lies outside the video ({length:.2f} s)", ""
    if sample.duration is not None and abs(sample.duration - length) > tolerance:
        return "", f"duration is {sample.duration:g} s in the record, {length:.2f} s in the file"
    return "", ""


def file_state(path: str) -> tuple[int, int] | tuple[None, None]:
    """Size and time of change (ns) of a file or folder; None where it is not there."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None, None
    return stat.st_size, stat.st_mtime_ns


def write(lines: Sequence[dict], path: str) -> None:
    """All lines, or nothing: the file appears when it is complete."""
    jsonl.write(path, lines, ensure_ascii=True)  # a path may be no UTF-8


def summary(lines: Sequence[dict]) -> Iterator[str]:
    """What a user reads: every bad record and warning (up to `NUM_LISTED` each), then the counts by reason."""
    bad, warned = [line for line in lines if not line["ok"]], [line for line in lines if line["warning"]]
    for kind, some in (("bad", bad), ("warning", warned)):
        for line in some[:NUM_LISTED]:
            name = " ".join(text for text in (line["row"], line["id"], line["row"] and line["path"]) if text)
            yield f"{kind}: {name}: {line['reason'] or line['warning']}"
        if len(some) > NUM_LISTED:
            yield f"... and {len(some) - NUM_LISTED} more"
    yield f"{len(lines)} records: {len(lines) - len(bad)} good, {len(bad)} bad, {len(warned)} with a warning"
    for reason, num in Counter(reason_kind(line["reason"]) for line in bad).most_common():
        yield f"{num:6d}  {reason}"
