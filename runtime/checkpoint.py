"""Checkpoints of a run folder: written aside, synced, renamed when complete, and known again when they are damaged.

A checkpoint is a folder `checkpoints/step_000012` with a list of its files, their sizes and checksums. Rows of the
run's .jsonl files that were written after it are cut.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

LIST = "files.json"
FULL_DISK = ("No space left", "quota exceeded", "inline_container", "PytorchStreamWriter")  # of torch and safetensors


def write_error(action: Callable, *args, **kwargs) -> Exception | None:
    """Run what writes files; the error where it could not write them, None where it could. Others are raised."""
    try:
        action(*args, **kwargs)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have no class for a full disk
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in FULL_DISK):
            raise
        return error
    return None


class PatientSaver:
    """In the place of DeepSpeed's writer: its processes meet while they save, so errors wait until all are through."""

    def __init__(self, writer):
        self.writer, self.errors = writer, []

    @classmethod
    def of(cls, engine) -> "PatientSaver":
        """That of a DeepSpeed engine, from now on."""
        if not isinstance(engine.checkpoint_engine, cls):
            engine.checkpoint_engine = cls(engine.checkpoint_engine)
            engine._copy_recovery_script = lambda path: None  # a script that final/ makes superfluous
        return engine.checkpoint_engine

    def __getattr__(self, name: str):
        return getattr(self.writer, name)

    def save(self, *args, **kwargs) -> None:
        self._keep(write_error(self.writer.save, *args, **kwargs))

    def makedirs(self, *args, **kwargs) -> None:
        self._keep(write_error(self.writer.makedirs, *args, **kwargs))

    def _keep(self, error: Exception | None) -> None:
        self.errors += [error] if error else []


def sync(path: Path) -> None:
    """Have a file, or a folder and all that is in it, on the disk before going on."""
    for part in [*path.rglob("*"), path]:
        _fsync(part)


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is never seen half-written."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_list(folder: Path) -> None:
    """The files of a folder with their sizes and checksums, as one more file."""
    (folder / LIST).write_text(json.dumps(_files(folder), indent=2) + "\n")


def damage(folder: Path) -> str:
    """How a folder differs from its list of files; "" where it is whole."""
    try:
        listed, found = json.loads((folder / LIST).read_text()), _files(folder)
    except (OSError, ValueError) as error:
        return f"{LIST}: {error}"
    if not isinstance(listed, dict):
        return f"{LIST}: not a list of files"
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            return f"{name}: {found.get(name, 'missing')}; when it was saved, {listed.get(name, 'not there')}"
    return ""


def _files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / LIST)
    with ThreadPoolExecutor() as pool:  # hashing and reading let other threads run
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(identity, files)))


def identity(path: Path) -> str:
    """Size and checksum: equal for equal files."""
    with open(path, "rb") as file:
        return f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """What stands in a folder `checkpoints` under the name of a complete one, oldest first."""
    return sorted(folder.glob("step_*"), key=step_of)


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest of the checkpoints that is whole, None where none is; and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        how = damage(checkpoint)
        if not how:
            return checkpoint, damaged
        damaged[checkpoint] = how
    return None, damaged


def put_in_place(aside: Path, folder: Path) -> None:
    """Give a folder its name, once it is on the disk, in place of the folder that has it."""
    sync(aside)
    old = folder.with_name(f"tmp_old_{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for old in checkpoints(folder)[:-keep]:
        with suppress(OSError):
            old.rename(old.with_name(f"tmp_{old.name}"))  # at once: half of one must not look like a whole one
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill has left half-written or half-removed."""
    for rest in folder.glob("tmp_*"):
        shutil.rmtree(rest, ignore_errors=True)


def append_whole(path: Path, text: str) -> None:
    """Append all of the text to a file, or none of it. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        size, data = file.tell(), text.encode()
        try:
            if file.write(data) < len(data):  # the disk is full; writing the rest would say so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of a .jsonl written after `step` steps (rows count them from 1), and a torn last line."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        end, ended = 0, True
        for line in file:  # split at \n alone: a completion may hold U+2028
            try:
                row = json.loads(line)
            except ValueError:  # torn, maybe within a character
                break
            if row["step"] > step:
                break
            end, ended = end + len(line), line.endswith(b"\n")
        file.truncate(end)  # one call: whenever a kill comes, the rows kept are whole
        if not ended:
            file.seek(end)
            file.write(b"\n")
