"""JSON lines: rows are told apart by newlines alone, and every error names its row."""

import pytest

from records import jsonl


def test_rows_come_back_with_their_numbers(tmp_path):
    """U+2028 ends no row, and neither does a blank line; a byte order mark and CRLF are passed over."""
    path, rows = tmp_path / "a.jsonl", [{"text": "\u2028é"}, {"text": "\x85"}]
    jsonl.write(path, rows)
    assert list(jsonl.read(path)) == [(1, rows[0]), (2, rows[1])]
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    assert list(jsonl.read(path)) == [(2, rows[0]), (4, rows[1])]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON: "),
        (b"[1]", "expected an object, got list"),
        (b'{"a": "\xff"}', "not UTF-8: "),
        (b"[" * 100_000, "not valid JSON: "),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(ValueError) as error:
        list(jsonl.read(path))
    assert str(error.value).startswith(f"{path}:3: {reason}") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^row 3: "):
        list(jsonl.read(path, "row "))


@pytest.mark.parametrize("torn", ['{"a"', '{"a": "é'.encode()[:-1], '{"a": 2}'], ids=["object", "character", "end"])
def test_a_torn_last_line_is_passed_over_where_it_may_be(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + (torn if isinstance(torn, bytes) else torn.encode()))
    assert list(jsonl.read(path, torn=True)) == [(1, {"a": 1})]
