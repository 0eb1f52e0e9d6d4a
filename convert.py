"""Public annotations to our records: one command for every benchmark and training set, and a report of every row.

It opens no video: `python data.py check` does, later.

    python convert.py charades_sta --annotations charades_sta_test.txt --durations charades.json --out charades.jsonl
    python convert.py mvbench --annotations MVBench/json --out mvbench.jsonl

Every row is kept, repaired and kept, rejected (it is wrong) or excluded (no task of ours can hold it); the counts are
printed and written to <out>.report.json. A repair is `clamped_start` or `clamped_end` (a span that leaves the video),
`swapped` (start after end) or `first_of_equal_options`; up to 1 ms past the video is rounding and no repair. A span
without length, outside the video, or ending past twice its length is rejected. So is a duplicate, the same row again
with the same published id if it has one: it would weigh twice.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import jsonl, sources
from records.record import BadRecord, reason_kind, to_sample
from records.rows import Rows, aspect_rows, csv_rows, json_rows, lines, read_durations, read_object, sentence_rows
from records.sources import NUMBER, Excluded, File
from runtime.checkpoint import write_text

ROUNDING_S = 0.001  # published times are rounded: a span may leave its video by this much
EXPORT = "python -c \"from datasets import load_dataset; load_dataset(REPO, split='test').to_json('test.jsonl')\""
NUM_LISTED = 5  # rows that the printed report names for each reason


@dataclass(frozen=True)
class Source:
    """A published format: how a file lists its rows, and what record one becomes."""

    help: str
    rows: Callable[[Path], Rows]
    record: Callable[[Any, File], dict]
    needs: str = ""  # an option that it cannot do without
    takes: str = ""  # an option that it can use


SOURCES = {
    "charades_sta": Source("Charades-STA, charades_sta_*.txt", lines, sources.charades_sta, needs="durations"),
    "activitynet": Source("ActivityNet Captions, {train,val_1,val_2}.json", sentence_rows, sources.activitynet),
    "anet_rtl": Source("ActivityNet-RTL (LITA), annot_val_1_q229.json", json_rows, sources.anet_rtl),
    "qvhighlights": Source("QVHighlights, highlight_{train,val}_release.jsonl", json_rows, sources.qvhighlights),
    "didemo": Source("DiDeMo, {train,val,test}_data.json", json_rows, sources.didemo, takes="durations"),
    "tacos": Source("TACoS as 2D-TAN has it, {train,val,test}.json", sentence_rows, sources.tacos),
    "time_r1": Source("Time-R1's training set, train_2k5.json", json_rows, sources.time_r1),
    "tvgbench": Source("TVGBench, tvgbench.json", json_rows, sources.tvgbench),
    "temporal_r1": Source("Temporal-R1's rows (problem, solution, video_length)", json_rows, sources.temporal_r1),
    "nextgqa": Source("NExT-GQA, {val,test}.csv with gsub_*.json", csv_rows, sources.nextgqa, needs="spans"),
    "nextqa": Source("NExT-QA, multiple choice, {train,val,test}.csv", csv_rows, sources.nextqa),
    "rextime": Source("ReXTime, rextime_{train,val}.json", json_rows, sources.rextime),
    "mvbench": Source("MVBench, the folder json/ or files of it", json_rows, sources.mvbench),
    "videomme": Source("Video-MME, exported from Parquet", json_rows, sources.videomme),
    "tempcompass": Source("TempCompass, the folder questions/ or files of it", aspect_rows, sources.tempcompass),
    "mmvu": Source("MMVU, validation.json", json_rows, sources.mmvu),
    "mlvu": Source("MLVU, the folder json/, or the test set's file", json_rows, sources.mlvu),
    "video_r1": Source("Video-R1's rows (problem, options, solution, path)", json_rows, sources.video_r1),
    "llamafactory": Source("LLaMA-Factory's chat rows (messages, videos), for SFT", json_rows, sources.llamafactory),
}


# ---- rows ----------------------------------------------------------------------------------------------------------


def repair_span(span: Any, duration: float) -> tuple[Any, list[str]]:
    """A span in seconds within its video, and the rules that were needed; what is no span is left to to_sample.

    Raises BadRecord for a span that no rule covers.

    >>> repair_span([24.3, 31.0], 30.5), repair_span([5.0, -0.1], 30.5), repair_span([1.0, 30.5000001], 30.5)
    (([24.3, 30.5], ['clamped_end']), ([0.0, 5.0], ['swapped', 'clamped_start']), ([1.0, 30.5], []))
    """
    if not isinstance(span, list) or len(span) != 2 or any(type(x) not in NUMBER for x in (*span, duration)):
        return span, []
    (start, end), rules = span, []
    if start == end:
        raise BadRecord(f"a segment must end after it starts, got {span!r}")
    if start > end:
        start, end, rules = end, start, ["swapped"]
    if start < -duration or end > 2 * duration:
        raise BadRecord(f"segment {span!r} leaves the video by more than its length ({duration} s)")
    if start < 0 < end:
        rules += ["clamped_start"] if start < -ROUNDING_S else []
        start = 0.0
    if start < duration < end:
        rules += ["clamped_end"] if end > duration + ROUNDING_S else []
        end = duration
    return [start, end], rules


@dataclass
class Report:
    """What became of every row; rows are named file:row."""

    source: str
    files: list[str]
    read: int = 0
    kept: int = 0
    repaired: list[str] = field(default_factory=list)  # rows
    rules: Counter = field(default_factory=Counter)  # how often each was applied: a row may have several spans
    rejected: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))  # kind: row: reason
    excluded: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason: rows

    def content(self) -> dict:
        content = {"source": self.source, "files": self.files, "read": self.read, "kept": self.kept}
        content["repaired"] = {"rows": len(self.repaired), "rules": dict(self.rules), "where": self.repaired}
        for kind, by in (("rejected", self.rejected), ("excluded", self.excluded)):
            reasons = {reason: {"rows": len(rows), "where": rows} for reason, rows in by.items()}
            content[kind] = {"rows": sum(map(len, by.values())), "reasons": reasons}
        return content

    def lines(self) -> Iterator[str]:
        num_rejected, num_excluded = (sum(map(len, by.values())) for by in (self.rejected, self.excluded))
        kept = f"{self.kept} kept ({len(self.repaired)} of them repaired)"
        yield f"{self.read} rows read, {kept}, {num_rejected} rejected, {num_excluded} excluded"
        for rule, num in self.rules.most_common():
            yield f"{num:7d}  {rule}"
        for kind, by in (("rejected", self.rejected), ("excluded", self.excluded)):
            for reason, rows in by.items():
                more = ", ..." if len(rows) > NUM_LISTED else ""
                yield f"{len(rows):7d}  {kind}: {reason} ({', '.join(list(rows)[:NUM_LISTED])}{more})"


def make_record(name: str, raw: Any, file: File, repair: bool) -> tuple[dict, list[str], str]:
    """The record of one row, which to_sample takes as it is, the rules it took, and what a duplicate would equal."""
    made = SOURCES[name].record(raw, file)
    rules, has_id = made.pop("rules", []), "id" in made
    record = {"id": f"{name}/{file.stem}/{made.pop('id', file.row - 1)}"} | made
    record["question"] = record["question"].strip()
    if isinstance(record.get("segments"), list):
        spans = [repair_span(span, record["duration"]) for span in record["segments"]]
        record["segments"] = [span for span, _ in spans]
        rules = rules + [rule for _, applied in spans for rule in applied]
    if rules and not repair:
        raise BadRecord(f"{rules[0]} would be needed (--no-repair)")
    _, outside = to_sample(record, Path())
    assert not outside
    content = json.dumps(record if has_id else record | {"id": ""}, ensure_ascii=False, sort_keys=True)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8: half a surrogate pair") from None
    return record, rules, content


def convert(
    name: str, paths: Sequence[Path], beside: dict[str, dict] | None = None, repair: bool = True
) -> tuple[list[dict], Report]:
    """The records of annotation files, and the report.

    `beside` has what stands in further files (`durations`, `spans`); without `repair` a row that needs one is rejected.
    Raises ValueError naming the file, and its first bad row and why, when a file is not of the format or no row of it
    is sound.
    """
    report = Report(name, [path.name for path in paths])
    records: dict[str, tuple[str, dict]] = {}  # by id: row and record
    seen: dict[str, str] = {}  # row by content
    for path in paths:
        stem = (path.with_suffix("") if path.suffix == ".gz" else path).stem  # for ids
        stem, first, sound = stem.removeprefix(f"{name}_") or stem, None, 0
        for row, raw in SOURCES[name].rows(path):
            where = f"{path.name}:{row}"
            report.read += 1
            try:
                record, rules, content = make_record(name, raw, File(stem, row, **(beside or {})), repair)
                if content in seen:
                    raise BadRecord(f"duplicate of '{seen[content]}'")
                if record["id"] in records:
                    raise BadRecord(f"id {record['id']!r} is that of {records[record['id']][0]} too")
            except Excluded as reason:
                report.excluded[str(reason)].append(where)
            except BadRecord as reason:
                first = first or f"{path}:{row}: {reason}"
                report.rejected[reason_kind(str(reason))][where] = str(reason)
                continue
            else:
                records[record["id"]], seen[content] = (where, record), where
                report.rules.update(rules)
                report.repaired += [where] if rules else []
            sound += 1
        if not sound:
            raise ValueError(f"{first} (and no other row can be used)" if first else f"{path}: no rows")
    if not records:
        raise ValueError(f"{paths[0]}: every row is excluded: {', '.join(report.excluded)}")
    report.kept = len(records)
    return [record for _, record in records.values()], report


def annotation_files(given: Sequence[str]) -> list[Path]:
    """Files as given, and the .json files of folders in the order of their names."""
    paths = []
    for path in map(Path, given):
        found = sorted([*path.glob("*.json"), *path.glob("*.json.gz")]) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no .json files in this folder")
        paths += found
    return paths


def run(args: argparse.Namespace) -> None:
    source, out, paths = SOURCES[args.source], Path(args.out), annotation_files(args.annotations)
    beside = {}
    for option, read in (("durations", read_durations), ("spans", read_object)):
        value = getattr(args, option)
        if value is None and source.needs == option:
            raise ValueError(f"{args.source} needs --{option}")
        if value is not None and option not in (source.needs, source.takes):
            raise ValueError(f"{args.source} has no use for --{option}")
        if value is not None:
            beside[option] = read(Path(value))
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out}: records are JSON lines, so the name must end in .jsonl")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder")
    if any(out.resolve() == path.resolve() for path in paths):
        raise ValueError(f"--out {out} is one of the annotation files")
    records, report = convert(args.source, paths, beside, repair=not args.no_repair)
    report_path = out.with_suffix(".report.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(report_path, json.dumps(report.content(), indent=1, ensure_ascii=False) + "\n")
    jsonl.write(out, records)
    print("\n".join([f"{args.source}: {out}, {report_path}", *report.lines()]))


def main(argv: Sequence[str] | None = None) -> None:
    listed = "\n".join(f"  {name:13s} {source.help}" for name, source in SOURCES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sources:\n{listed}\n\nParquet is not read; as JSON lines:\n  {EXPORT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help="one of the sources below")
    parser.add_argument("--annotations", nargs="+", required=True, metavar="PATH", help="files (.gz too) or folders")
    parser.add_argument("--durations", metavar="FILE", help="charades_sta, didemo: durations by video, JSON or CSV")
    parser.add_argument("--spans", metavar="FILE", help="nextgqa: gsub_val.json or gsub_test.json")
    parser.add_argument("--out", required=True, metavar="OUT.jsonl", help="records to write; its folder is made")
    parser.add_argument("--no-repair", action="store_true", help="reject rows that would be repaired")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
