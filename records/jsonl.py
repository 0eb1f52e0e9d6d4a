"""JSON lines: one object a row, read with the row's number in every error, and written whole.

A row ends at \\n alone: a question may hold U+2028, at which `str.splitlines` would cut it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime.checkpoint import write_text


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError with a reason in one line."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and text of every line that is not blank."""
    return ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())


def read(path: str | Path, where: str = "", torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and content of every row of a file; with or without a byte order mark.

    With `torn` a last line without its end, which a killed process was writing, is passed over. Raises ValueError for
    a row that is no object. The error begins with `where`, by default the path and a colon, and the row's number.
    """
    content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in lines(content[: content.rfind(b"\n") + 1] if torn else content):
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except ValueError as error:
            raise ValueError(f"{where or f'{path}:'}{number}: {error}") from None
        yield number, row


def text_of(rows: Iterable[Any], ensure_ascii: bool = False) -> str:
    """The text of a file of these rows."""
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)


def write(path: str | Path, rows: Iterable[Any], ensure_ascii: bool = False) -> None:
    """Write a file that is never seen half-written."""
    write_text(Path(path), text_of(rows, ensure_ascii))
