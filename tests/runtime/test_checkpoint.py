"""Checkpoints on the disk: every damage is found; rows and folders are written, renamed and cut whole or not at all."""

import errno
import json
import os
import re
import resource
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from runtime.checkpoint import (
    PatientSaver,
    append_whole,
    checkpoints,
    cut_back,
    damage,
    newest_whole,
    put_in_place,
    remove_old,
    write_error,
    write_list,
)


@pytest.fixture
def folder(tmp_path):
    """A folder with files in it and below it, and their list."""
    folder = tmp_path / "step_000001"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes(range(100)))
    (folder / "empty").touch()
    (folder / "shards" / "0.bin").write_bytes(b"abc")
    write_list(folder)
    return folder


@contextmanager
def largest_file(size: int):
    """Files of this process cannot grow past `size` bytes: a write is cut short there, and the next one fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# ---- damage --------------------------------------------------------------------------------------------------------


def test_a_whole_folder_has_no_damage_wherever_it_stands(folder):
    assert damage(folder) == ""
    assert list(json.loads((folder / "files.json").read_text())) == ["empty", "model.bin", "shards/0.bin"]
    moved = folder.rename(folder.with_name("elsewhere"))
    assert damage(moved) == ""


def test_every_flipped_bit_is_found(folder):
    """Wherever in any file; in the list of files, where it makes another list."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for i in range(0, len(whole), 7):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            if not damage(folder):
                assert path.name == "files.json" and json.loads(path.read_bytes()) == json.loads(whole), (path, i)
        path.write_bytes(whole)
    assert damage(folder) == ""


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: os.truncate(f / "model.bin", 99), r"model\.bin: 99 bytes, .*; when it was saved, 100 bytes, "),
        (lambda f: (f / "shards" / "0.bin").unlink(), r"shards/0\.bin: missing; when it was saved, 3 bytes, "),
        (lambda f: (f / "more").touch(), r"more: 0 bytes, .*; when it was saved, not there"),
        (lambda f: (f / "files.json").unlink(), r"files\.json: .*No such file"),
        (lambda f: os.truncate(f / "files.json", 40), r"files\.json: "),
        (lambda f: (f / "files.json").write_text("[]"), r"files\.json: "),
        (lambda f: (f / "files.json").write_text("{}"), r"empty: 0 bytes, .*; when it was saved, not there"),
    ],
    ids=["truncated", "removed", "added", "no list", "torn list", "other list", "empty list"],
)
def test_damage_is_named(folder, spoil, told):
    spoil(folder)
    assert re.match(told, damage(folder)), damage(folder)


# ---- folders -------------------------------------------------------------------------------------------------------


def made(parent, *names: str, whole: bool = True):
    for name in names:
        (parent / name).mkdir(parents=True)
        (parent / name / "a").write_text(name)
        if whole:
            write_list(parent / name)


def test_the_newest_whole_checkpoint_is_found_by_its_number(tmp_path):
    """As text, step_1000000 comes before step_999999; a folder aside is no checkpoint, even if it is whole."""
    assert newest_whole(tmp_path / "absent") == (None, {})
    made(tmp_path, "step_999999", "step_000002", "step_1000000", "tmp_step_1000001")
    made(tmp_path, "step_1000002", whole=False)
    assert [path.name for path in checkpoints(tmp_path)][-3:] == ["step_999999", "step_1000000", "step_1000002"]
    newest, damaged = newest_whole(tmp_path)
    assert newest.name == "step_1000000" and [path.name for path in damaged] == ["step_1000002"]


def test_old_checkpoints_go_and_so_does_what_is_half_removed(tmp_path):
    made(tmp_path, "step_000001", "step_000002", "step_000010", "tmp_step_000007", "damaged_step_000003")
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_000003", "step_000002", "step_000010"]
    remove_old(tmp_path, keep=5)
    assert len(checkpoints(tmp_path)) == 2


def test_a_folder_takes_the_place_of_another(tmp_path):
    made(tmp_path, "best", "tmp_best", "tmp_old_best")
    put_in_place(tmp_path / "tmp_best", tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"] and (
        tmp_path / "best" / "a"
    ).read_text() == "tmp_best"


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_rows_are_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_whole(path, '{"step": 1}\n')
    for _ in range(2):
        with largest_file(15), pytest.raises(OSError, match=r"metrics\.jsonl"):
            append_whole(path, '{"step": 2, "text": "é"}\n')
        assert path.read_text() == '{"step": 1}\n'
    append_whole(path, '{"step": 2, "text": "é"}\n')
    assert path.read_text(encoding="utf-8").count("\n") == 2


def test_what_says_of_itself_that_it_could_not_be_written_is_known(tmp_path):
    """A limit on the size of files stands in for the disk, where torch.save has no better word for either."""
    tensors = {"a": torch.rand(1000)}
    with largest_file(1500):
        assert isinstance(write_error(torch.save, tensors, tmp_path / "a.bin"), RuntimeError)
        assert write_error((tmp_path / "a").write_bytes, bytes(2000)).errno == errno.EFBIG
    assert write_error(torch.save, tensors, tmp_path / "a.bin") is None

    def fail(error: Exception) -> None:
        raise error

    full = "write(): fd 3 failed with No space left on device"  # of torch.save in the old format, which DeepSpeed has
    for error in (RuntimeError(full), SafetensorError("I/O error: No space left on device (os error 28)")):
        assert write_error(fail, error) is error
    for error in (RuntimeError("size of tensor"), SafetensorError("InvalidHeader"), KeyError("No space left")):
        with pytest.raises(type(error)):
            write_error(fail, error)


def test_deepspeed_saves_to_the_end_before_it_fails(tmp_path):
    """Its processes meet after each file; one that left at a full disk would leave the others waiting."""
    saved = []

    def save(state, path):
        saved.append(path)
        if state is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = SimpleNamespace(save=save, makedirs=os.makedirs, name="torch")
    engine = SimpleNamespace(checkpoint_engine=writer)
    saver = PatientSaver.of(engine)
    for state, path in ((None, "weights"), ({}, "optimizer")):
        engine.checkpoint_engine.save(state, path=path)
    assert saved == ["weights", "optimizer"] and [error.errno for error in saver.errors] == [errno.ENOSPC]
    assert PatientSaver.of(engine) is saver and saver.name == "torch"
    saver.makedirs(tmp_path / "a" / "b", exist_ok=True)
    assert (tmp_path / "a" / "b").is_dir() and len(saver.errors) == 1


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ["", "{", '{"step": 2', '{"step": 3, "text": "é', '{"step": 3}'])
def test_rows_after_the_checkpoint_and_a_torn_last_line_are_cut(tmp_path, torn):
    """The last character may be torn too: é is two bytes."""
    kept = '{"step": 1, "a": 1}\n{"step": 2, "a": "é"}\n{"step": 2}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((kept + '{"step": 3}\n').encode() + torn.encode()[: -1 if torn.endswith("é") else None])
    cut_back(path, 2)
    assert path.read_text(encoding="utf-8") == kept
    cut_back(path, 0)
    assert path.read_text() == ""
    cut_back(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_cutting_keeps_rows_with_unicode_line_ends(tmp_path):
    """A completion may hold U+2028 or U+0085, which str.splitlines takes for line ends."""
    path = tmp_path / "samples.jsonl"
    rows = [{"step": s, "completions": [f"a{sign}b"]} for s, sign in enumerate("\u2028\x85\x1c\r", 1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    before = path.read_bytes()
    cut_back(path, 4)
    assert path.read_bytes() == before
    cut_back(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [1, 2]


def test_a_whole_row_without_its_line_end_is_kept_and_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
