"""Every record of a data set read and every video opened once: what `python data.py check` does."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from records import manifest as manifest_io
from records.files import records_in, sources_of
from records.record import BadRecord, Sample, lacks_duration


def records_of(source: str, videos: str | None = None) -> list[tuple[str, Sample | BadRecord]]:
    """Every record of a data file, good or bad, with its file and row; `videos` is the folder to look in.

    Or of every file below a folder, as a sample without a question, whose id is its path there. Raises ValueError and
    FileNotFoundError for a source that cannot be read at all.
    """
    root = Path(source)
    if root.is_dir():
        paths = sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return [("", Sample(str(path.relative_to(root)), "", str(path), "")) for path in paths]
    files = dict.fromkeys((file, folder) for file, folder, _, _ in sources_of(source, videos))
    return [(f"{file.name}:{row}", record) for file, folder in files for row, record, *_ in records_in(file, folder)]


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


def main(argv: Sequence[str] | None = None, doc: str | None = __doc__) -> int:
    """The command `python data.py check`; `doc` is what its --help says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
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
