"""Published files as rows: text, JSON, JSON lines and CSV, gzipped or not. An error names the file and the row.

What record a row becomes is in sources.py, and the command is convert.py.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import jsonl
from records.record import refuse_parquet
from records.sources import KINDS

Rows = Iterator[tuple[int, Any]]  # (row from 1, raw row)


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a BOM, gzipped or not. Raises ValueError naming it."""
    content = path.read_bytes()
    refuse_parquet(path, content)
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return jsonl.parse(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_object(path: Path) -> dict:
    content = _parse(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {KINDS.get(type(content), type(content).__name__)}")
    return content


def lines(path: Path) -> Rows:
    """The lines of a text file that are not blank."""
    return ((row, line.strip()) for row, line in enumerate(read_text(path).split("\n"), 1) if line.strip())


def json_rows(path: Path) -> Rows:
    """The items of a JSON list, or JSON lines."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return enumerate(_parse(text, str(path)), 1)
    return ((row, _parse(line, f"{path}:{row}")) for row, line in lines(path))


def csv_rows(path: Path) -> Rows:
    """The rows of a CSV file with a header; a row's number is that of its last line."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}") from None


def sentence_rows(path: Path) -> Rows:
    """{video: {"timestamps": [...], "sentences": [...], ...}} as (video, entry, index), one per sentence."""
    row = 0
    for video, entry in read_object(path).items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        for i in range(len(sentences) if isinstance(sentences, list) else 1):  # one row, refused for what it is
            row += 1
            yield row, (video, entry, i)


def aspect_rows(path: Path) -> Rows:
    """{video: {aspect: [question, ...]}} as (video, aspect, index, question)."""
    row = 0
    for video, aspects in read_object(path).items():
        for aspect, questions in (aspects if isinstance(aspects, dict) else {"": aspects}).items():
            for i, question in enumerate(questions if isinstance(questions, list) else [questions]):
                row += 1
                yield row, (video, aspect, i, question)


def read_durations(path: Path) -> dict[str, Any]:
    """Durations by video from JSON ({id: seconds} or {id: {"duration": seconds}}) or CSV (Charades: id, length)."""
    if ".csv" not in path.suffixes:
        return read_object(path)
    try:
        return {row["id"]: float(row["length"]) for _, row in csv_rows(path)}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected the columns id and length (seconds)") from None
