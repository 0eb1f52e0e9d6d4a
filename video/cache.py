"""Decoded frames on disk, least recently used out first, shared by any number of processes.

Not for network file systems without locks: the index is SQLite.
"""

import hashlib
import io
import os
import zlib
from pathlib import Path

import numpy as np

FORMAT = 2  # raise it when the meaning of a stored entry changes: old entries then miss and age out


def file_key(path: str | os.PathLike, *parts: object) -> str:
    """Key of what was made from a file, or a folder of files: hash of their names, sizes, mtimes (ns) and `parts`.

    `parts` must have a `repr` that is equal in every process (numbers, strings, tuples of them). Raises
    FileNotFoundError.
    """
    resolved = Path(path).resolve(strict=True)
    files = sorted(file for file in resolved.iterdir() if file.is_file()) if resolved.is_dir() else [resolved]
    states = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return hashlib.sha256(repr((FORMAT, str(resolved), states, parts)).encode()).hexdigest()


def _bytes_disk() -> type:
    """diskcache's reader of rows, which would unpickle what a row of the index calls a pickle, without that."""
    import diskcache  # here, so that prompts can be made from frames in memory without it
    from diskcache.core import MODE_PICKLE

    class BytesDisk(diskcache.Disk):
        def get(self, key, raw):
            if not raw:
                raise OSError("a pickled key is refused: it could run code")
            return super().get(key, raw)

        def fetch(self, mode, filename, value, read):
            if mode == MODE_PICKLE:  # an OSError is a missing entry
                raise OSError("a pickled value is refused: it could run code")
            return super().fetch(mode, filename, value, read)

    return BytesDisk


class FrameCache:
    """Tuples of numpy arrays under string keys, at most `max_gib` GiB in `directory`.

    An entry is the .npy bytes of its arrays, one after the other, behind their checksum. Nothing is pickled, and a
    pickle that somebody else has put into a shared folder is not loaded. The object itself may be pickled, or kept over
    a fork: each process opens its own connection.
    """

    def __init__(self, directory: str | os.PathLike, max_gib: float):
        import diskcache

        self._args, size = (directory, max_gib), int(max_gib * 2**30)
        policy = "least-recently-used"
        self._disk = diskcache.Cache(str(directory), disk=_bytes_disk(), size_limit=size, eviction_policy=policy)

    def __reduce__(self):
        return FrameCache, self._args

    def get(self, key: str) -> tuple[np.ndarray, ...] | None:
        """The arrays stored under `key`; None when there are none, or when what is there is not what `put` wrote."""
        entry = self._disk.get(key, retry=True)
        if not isinstance(entry, bytes) or not entry or zlib.crc32(entry[4:]) != int.from_bytes(entry[:4], "big"):
            return None
        stream, arrays = io.BytesIO(entry), []
        stream.seek(4)
        while stream.tell() < len(entry):
            arrays.append(np.load(stream, allow_pickle=False))
        return tuple(arrays)

    def put(self, key: str, *arrays: np.ndarray) -> None:
        """Store the arrays under `key`, in place of what was there. Raises ValueError for object arrays."""
        stream = io.BytesIO()
        for array in arrays:
            np.save(stream, array, allow_pickle=False)
        body = stream.getvalue()
        self._disk.set(key, zlib.crc32(body).to_bytes(4, "big") + body, retry=True)
