"""Frame cache: exact round trips, damage as a miss, eviction by last use, several processes."""

import multiprocessing
import os
import pickle
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from video.cache import FrameCache, file_key

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 3, 56, 56), dtype=np.uint8)
TIMES = np.linspace(0, 3.5, 8)


def value_files(directory: Path) -> list[Path]:
    return list(directory.rglob("*.val"))


def write_and_read(cache: FrameCache, index: int) -> bool:
    """Run in another process: see the parent's entry, add one."""
    cache.put(f"child{index}", FRAMES + np.uint8(index))
    return np.array_equal(cache.get("parent")[0], FRAMES)


def test_round_trip_keeps_values_dtypes_and_order(tmp_path):
    cache = FrameCache(tmp_path, 0.1)
    cache.put("a", FRAMES, TIMES, np.array(3))
    frames, times, count = cache.get("a")
    assert (frames.dtype, times.dtype, count.shape) == (np.uint8, np.float64, ())
    assert np.array_equal(frames, FRAMES) and np.array_equal(times, TIMES) and count == 3
    assert cache.get("b") is None


def test_put_replaces(tmp_path):
    cache = FrameCache(tmp_path, 0.1)
    cache.put("a", FRAMES)
    cache.put("a", TIMES)
    (array,) = cache.get("a")
    assert np.array_equal(array, TIMES)


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        FrameCache(tmp_path, 0.1).put("a", np.array([{}], dtype=object))


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "missing"])
def test_damaged_entry_is_a_miss_and_can_be_rebuilt(tmp_path, damage):
    cache = FrameCache(tmp_path, 0.1)
    cache.put("a", FRAMES, TIMES)
    (file,) = value_files(tmp_path)
    content = file.read_bytes()
    changed = {"cut": content[:-64], "empty": b"", "flip": content[:-1] + bytes([content[-1] ^ 1])}
    file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
    assert cache.get("a") is None
    cache.put("a", FRAMES, TIMES)
    assert np.array_equal(cache.get("a")[0], FRAMES)


class Malicious:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["index", "file"])
def test_a_pickle_in_a_shared_folder_is_not_loaded(tmp_path, where):
    """diskcache unpickled whatever a row of its index calls a pickle, so who could write the folder could run code."""
    cache = FrameCache(tmp_path, 0.1)
    cache.put("a", FRAMES)
    planted, (file,) = pickle.dumps(Malicious(tmp_path / "it_ran")), value_files(tmp_path)
    file.write_bytes(planted)
    with sqlite3.connect(tmp_path / "cache.db") as index:
        index.execute("UPDATE Cache SET mode = 4")  # diskcache.core.MODE_PICKLE
        if where == "index":
            index.execute("UPDATE Cache SET filename = NULL, value = ?", (planted,))
        index.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 4, ?)", (planted, planted))
    assert cache.get("a") is None and FrameCache(tmp_path, 0.1).get("a") is None
    with pytest.raises(OSError, match="a pickled key is refused"):
        list(cache._disk)
    assert not (tmp_path / "it_ran").exists()
    cache.put("a", TIMES)
    assert np.array_equal(cache.get("a")[0], TIMES)


@pytest.mark.parametrize("value", ["a text", 5, None, b"123"])
def test_what_put_did_not_write_is_a_miss(tmp_path, value):
    cache = FrameCache(tmp_path, 0.1)
    cache._disk.set("a", value)
    assert cache.get("a") is None


def test_the_least_recently_used_leave_at_the_cap(tmp_path):
    cache = FrameCache(tmp_path, 40 * FRAMES.nbytes / 2**30)
    cache.put("used", FRAMES)
    for index in range(100):
        cache.put(str(index), FRAMES)
        assert cache.get("used") is not None
    assert cache.get("0") is None and cache.get("99") is not None
    assert sum(file.stat().st_size for file in value_files(tmp_path)) <= 41 * FRAMES.nbytes


def test_shared_by_spawned_processes(tmp_path):
    cache = FrameCache(tmp_path, 0.1)
    cache.put("parent", FRAMES)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert all(pool.starmap(write_and_read, [(cache, index) for index in range(8)]))
    assert all(np.array_equal(cache.get(f"child{i}")[0], FRAMES + np.uint8(i)) for i in range(8))


def fork_and_share(directory: Path) -> bool:
    """Run in a fresh process, which has no threads whose locks a fork could copy."""
    cache = FrameCache(directory, 0.1)
    cache.put("parent", FRAMES)
    child = os.fork()
    if child == 0:
        os._exit(0 if write_and_read(cache, 0) else 1)
    return os.waitpid(child, 0)[1] == 0 and np.array_equal(cache.get("child0")[0], FRAMES)


def test_survives_a_fork(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(fork_and_share, (tmp_path,))


def test_key_follows_file_and_parts(tmp_path, monkeypatch):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"12")
    monkeypatch.chdir(tmp_path)
    key = file_key(file, 2.0, (1, 2))
    assert key == file_key("a.mp4", 2.0, (1, 2)), "the same file by another path"
    others = [file_key(file), file_key(file, 2.0, (1, 3)), file_key(file, 3.0, (1, 2))]
    os.utime(file, ns=(0, 1))
    others.append(file_key(file, 2.0, (1, 2)))
    file.write_bytes(b"123")
    os.utime(file, ns=(0, 1))
    others.append(file_key(file, 2.0, (1, 2)))
    assert len({key, *others}) == 6
    with pytest.raises(FileNotFoundError):
        file_key(tmp_path / "b.mp4")


def test_key_of_a_folder_follows_its_files(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"12")
    keys = {key := file_key(tmp_path, 2.0), file_key(tmp_path, 4.0)}
    assert file_key(tmp_path / "..", tmp_path.name) != key == file_key(tmp_path, 2.0)
    os.utime(tmp_path / "2.png", ns=(0, 1))
    keys.add(file_key(tmp_path, 2.0))
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    keys.add(file_key(tmp_path, 2.0))
    (tmp_path / "3.png").write_bytes(b"123")
    os.utime(tmp_path / "3.png", ns=(0, 1))
    keys.add(file_key(tmp_path, 2.0))
    (tmp_path / "1.png").unlink()
    keys.add(file_key(tmp_path, 2.0))
    assert len(keys) == 6
