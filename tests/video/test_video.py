"""From a video to patches against released implementations; files, clips and folders that mislead or cannot be read."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import (
    QWEN2,
    SHARED,
    UNREADABLE,
    VIDEOS,
    Spec,
    grey,
    load_video,
    nasa_times,
    real_clips,
    real_files,
    scrolling,
    sequential_decode,
    write_clip,
)
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from video import budget, frames, readers
from video.budget import Geometry, plan
from video.cache import FrameCache
from video.frames import check_video, decode_video, patchify, resize
from video.readers import VideoError, probe

GOLDEN = REPO / "tests" / "golden"
SAMPLING = json.loads((GOLDEN / "qwen_sampling.json").read_text())
PIXEL_CASES = json.loads((GOLDEN / "pixels.json").read_text())["cases"]
READERS = {"decord": readers.read_decord, "PyAV": readers.read_av}


def brightness(loaded: frames.Video) -> list[int]:
    """Mean pixel value of each temporal grid step, on the scale 0 to 255, green channel."""
    area = QWEN2.patch_size**2 * QWEN2.temporal_patch_size
    green = loaded.patches.view(loaded.grid_thw[0], -1, 3, area)[:, :, 1].mean((1, 2))
    return ((green * QWEN2.image_std[1] + QWEN2.image_mean[1]) * 255).round().int().tolist()


def result_or_error(function, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
    except ValueError as error:
        return type(error).__name__
    return list(result) if isinstance(result, tuple) else result


def test_smart_resize_equals_the_reference():
    rows = SAMPLING["smart_resize [h,w,factor,min_pixels,max_pixels,result]"]
    wrong = [row for row in rows if result_or_error(budget.smart_resize, *row[:5]) != row[5]]
    assert len(rows) == 300 and not wrong


def test_smart_nframes_equals_the_reference():
    rows = SAMPLING["smart_nframes [spec,total_frames,video_fps,result]"]
    rows = [row for row in rows if "nframes" not in row[0]]  # a number of frames, which we never ask for
    wrong = [row for row in rows if result_or_error(budget.smart_nframes, *row[1:3], **row[0]) != row[3]]
    assert len(rows) > 100 and not wrong


def test_smart_functions_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="aspect ratio"):
        budget.smart_resize(10, 2001, 28, 3136, 50176)
    with pytest.raises(ValueError, match="frames of 9x7 pixels"):
        budget.smart_resize(7, 9, 28, 3136, 50176)
    with pytest.raises(ValueError, match="max_pixels=100 is below"):
        budget.smart_resize(100, 100, 28, 3136, 100)
    with pytest.raises(ValueError, match="0 frames to sample, but the video has 1"):
        budget.smart_nframes(1, 30.0)


@real_clips
@pytest.mark.parametrize("case", PIXEL_CASES, ids=lambda case: case["key"])
@pytest.mark.parametrize("reader", READERS)
def test_patches_equal_the_processors(case, reader):
    """Within 0.07/255, the rounding of the float16 file: every pixel is the same integer."""
    stored = np.load(SHARED / "golden" / "pixels.npz")[case["key"].replace("/", "|")]
    expected = torch.from_numpy(stored).float()
    sizes = (case["patch_size"], case["merge_size"], case["temporal_patch_size"])
    geometry = Geometry(*sizes, tuple(case["image_mean"]), tuple(case["image_std"]))
    _, grid_h, grid_w = case["video_grid_thw"]
    path, indices = VIDEOS / case["video"], case["frame_indices"]
    frames = torch.from_numpy(np.concatenate(list(READERS[reader](path, probe(path), indices)))).permute(0, 3, 1, 2)
    assert list(frames.shape[2:]) == case["source_hw"]
    patches = patchify(resize(frames, grid_h * sizes[0], grid_w * sizes[0]), geometry)
    assert patches.shape == expected.shape and patches.dtype == torch.float32
    error = (patches - expected).view(len(patches), 3, -1) * torch.tensor(geometry.image_std)[:, None]
    assert error.abs().max() * 255 < 0.07


def test_patchify_places_every_pixel():
    """Against the definition, pixel by pixel; three frames, so the last one repeats."""
    frames = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=torch.manual_seed(0))
    patches = patchify(frames, Geometry(2, 2, 2, (0.0,) * 3, (1 / 255,) * 3)).round().to(torch.uint8)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 2 * 2)
    rows = product(range(2), range(2), range(3), range(2), range(2))  # time, square, patch in the square
    for patch, (t, square_i, square_j, k, m) in zip(patches, rows, strict=True):
        i, j = 2 * square_i + k, 2 * square_j + m
        cut = frames[[min(2 * t, 2), min(2 * t + 1, 2)], :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert torch.equal(patch, cut.transpose(0, 1).flatten())


def test_frames_of_the_right_size_are_not_touched():
    frames = torch.randint(0, 256, (2, 3, 28, 56), dtype=torch.uint8)
    assert torch.equal(resize(frames, 28, 56), frames)


@pytest.mark.parametrize(
    ("total", "fps", "height", "width", "indices", "size", "tokens"),
    [
        (48, 8.0, 56, 56, [0, 4, 9, 13, 17, 21, 26, 30, 34, 38, 43, 47], (56, 56), 24),
        (30, 30.0, 240, 426, [0, 10, 19, 29], (252, 420), 270),
        (10, 10.0, 1080, 1920, [0, 3, 6, 9], (560, 1008), 1440),
    ],
)
def test_plan_by_hand(total, fps, height, width, indices, size, tokens):
    chosen = plan(total, fps, height, width, Spec(), QWEN2)
    assert list(chosen.frame_indices) == indices
    assert chosen.frame_times == tuple(i / fps for i in indices)
    assert (chosen.size, chosen.num_tokens, chosen.frames_cut) == (size, tokens, 0)
    assert chosen.grid_thw == (len(indices) // 2, size[0] // 14, size[1] // 14)


@pytest.mark.parametrize(
    ("total", "clip", "indices", "times"),
    [
        (1, None, [0, 0, 0, 0], [0, 0.1, 0.2, 0.3]),
        (3, None, [0, 1, 2, 2], [0, 0.1, 0.2, 0.3]),
        (5, None, [0, 1, 3, 4], [0, 0.1, 0.3, 0.4]),
        (100, (0.3, 0.7), [3, 4, 5, 6], [0, 0.1, 0.2, 0.3]),
        (100, (0.25, 0.5), [3, 4, 4, 4], [0.05, 0.15, 0.25, 0.35]),
        (100, (0.32, 0.34), [3, 3, 3, 3], [0, 0.1, 0.2, 0.3]),
        (100, (9.95, math.inf), [99, 99, 99, 99], [0, 0.1, 0.2, 0.3]),
        (100, (9, 99), [90, 93, 96, 99], [0, 0.3, 0.6, 0.9]),
    ],
)
def test_short_videos_and_clips(total, clip, indices, times):
    """At 10 a second: frames with start <= time < end, the last one held, times from the clip's start."""
    chosen = plan(total, 10.0, 56, 56, Spec(), QWEN2, clip)
    assert list(chosen.frame_indices) == indices
    assert chosen.frame_times == pytest.approx(times)


def test_frames_give_way_when_the_budget_is_full():
    """At 4 tokens per pair of frames, 100 tokens hold 50 frames."""
    chosen = plan(1000, 10.0, 56, 56, Spec(total_pixels=100 * 784), QWEN2)
    assert (len(chosen.frame_indices), chosen.num_tokens, chosen.frames_cut) == (50, 100, 150)
    assert (chosen.frame_indices[0], chosen.frame_indices[-1]) == (0, 999)


@pytest.mark.parametrize(
    ("spec", "total", "fps", "clip", "message"),
    [
        (Spec(total_pixels=5 * 784), 100, 10.0, None, "total_pixels=3920: raise it, or lower min_frames"),
        (Spec(max_frames=3), 100, 10.0, None, "max_frames=3 < min_frames=4"),
        (Spec(), 0, 10.0, None, "0 frames at 10.0"),
        (Spec(), 10, 0.0, None, "10 frames at 0.0"),
        (Spec(), 10, math.nan, None, "10 frames at nan"),
        (Spec(), 100, 10.0, (10, 12), "clip starts at 10 s, the video ends at 10.000 s"),
        (Spec(), 100, 10.0, (2, 2), r"clip \[2, 2\]"),
        (Spec(), 100, 10.0, (-1, 2), r"clip \[-1, 2\]"),
        (Spec(), 100, 10.0, (math.nan, 2), r"clip \[nan, 2\]"),
    ],
)
def test_plan_says_what_is_wrong(spec, total, fps, clip, message):
    with pytest.raises(ValueError, match=message):
        plan(total, fps, 56, 56, spec, QWEN2, clip)


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(1, 20000),
    fps=st.sampled_from([1.0, 8.0, 23.976, 60.0]),
    height=st.integers(16, 2000),
    width=st.integers(16, 2000),
    tokens=st.integers(16, 4096),
)
def test_plan_keeps_its_limits(total, fps, height, width, tokens):
    spec = Spec(total_pixels=tokens * 784)
    try:
        chosen = plan(total, fps, height, width, spec, QWEN2)
    except ValueError as error:
        assert "total_pixels" in str(error), "only the budget can be short"
        return
    count = len(chosen.frame_indices)
    assert spec.min_frames <= count <= spec.max_frames and count % 2 == 0
    assert chosen.num_tokens <= tokens
    assert chosen.size[0] % 28 == chosen.size[1] % 28 == 0
    assert all(0 <= i < total for i in chosen.frame_indices)
    assert all(a < b for a, b in pairwise(chosen.frame_times))


@settings(deadline=None, max_examples=200)
@given(total=st.integers(4, 40000), fps=st.sampled_from([1.0, 8.0, 23.976, 60.0]), wanted=st.sampled_from([0.5, 2, 4]))
def test_even_frames_are_those_of_qwen_vl_utils(total, fps, wanted):
    """Their float32 rounding included; the same times given as times choose the same frames, but for that rounding."""
    chosen = plan(total, fps, 56, 56, Spec(fps=wanted), QWEN2)
    frames = budget.smart_nframes(total, fps, fps=wanted) if total > 4 else 4
    assert list(chosen.frame_indices) == torch.linspace(0, total - 1, frames).round().int().tolist()
    timed = plan(total, fps, 56, 56, Spec(fps=wanted), QWEN2, times=np.arange(total) / fps)
    assert np.abs(np.subtract(chosen.frame_indices, timed.frame_indices)).max() <= (total > 4000)
    assert timed.second_per_grid == pytest.approx(chosen.second_per_grid)


@settings(deadline=None, max_examples=200)
@given(
    gaps=st.lists(st.floats(0.001, 3), min_size=1, max_size=60),
    late=st.sampled_from([0, 0.7]),
    last=st.floats(0.01, 5),
    cut=st.none() | st.floats(0, 0.9),
)
def test_uneven_frames_are_the_nearest_in_time(gaps, late, last, cut):
    """Against the definition: uniform targets from the clip's start, each shown by the frame nearest to it."""
    times = late + np.cumsum([0, *gaps])
    duration = times[-1] + last
    start, end = (0, duration) if cut is None else (cut * duration, (cut + 0.1) * duration)
    clip = None if cut is None else (start, end)
    chosen = plan(len(times), len(times) / duration, 56, 56, Spec(), QWEN2, clip, times)
    targets = start + np.arange(len(chosen.frame_times)) * chosen.second_per_grid / 2
    inside = np.flatnonzero((times < end - 1e-6) & (np.append(times[1:], np.inf) > start + 1e-6))
    inside = inside if len(inside) else [0]
    for place, (index, target) in enumerate(zip(chosen.frame_indices, targets)):
        assert abs(times[index] - target) <= np.abs(times[inside] - target).min() + 1e-6
        held = chosen.frame_indices.count(index) > 1
        shown = target if held else max(times[index], start)
        assert chosen.frame_times[place] == pytest.approx(shown - start, abs=1e-6)
    assert all(a <= b + 1e-9 for a, b in pairwise(chosen.frame_times))
    assert targets[-1] < end and (times[inside[-1]] >= end or times[inside[-1]] <= targets[-1] + 1e-6)


def test_uneven_frames_by_hand():
    """Slides at 0, 50 and 60 s of 100 s, sampled four times; then 40 s of the clip between the first two."""
    slides = np.array([0.0, 50.0, 60.0])
    chosen = plan(3, 0.03, 56, 56, Spec(), QWEN2, times=slides)
    assert chosen.frame_indices == (0, 0, 1, 2) and chosen.frame_times == (0, 25, 50, 60)
    assert chosen.second_per_grid == 50
    chosen = plan(3, 0.03, 56, 56, Spec(), QWEN2, (5.0, 45.0), slides)
    assert chosen.frame_indices == (0, 0, 0, 0) and chosen.frame_times == (0, 10, 20, 30)


def test_geometry_comes_from_the_model_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        budget.read_geometry(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asdict(QWEN2)))
    assert budget.read_geometry(tmp_path) == QWEN2
    other = replace(QWEN2, patch_size=16)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(asdict(other)))
    assert budget.read_geometry(tmp_path) == other, "the video's own file comes first"
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ValueError, match="merge_size"):
        budget.read_geometry(tmp_path)


def test_load_a_clip_of_known_frames(tmp_path):
    """16 frames at 8 a second, sampled at 4: one pair per half second; frame i has brightness 5 * i."""
    path = write_clip(tmp_path / "a.mp4", 16)
    loaded = load_video(path, Spec(fps=4.0, max_pixels=3136), QWEN2)
    assert loaded.grid_thw == (4, 4, 4) and loaded.num_tokens == 16 and loaded.patches.shape == (64, 1176)
    assert loaded.frame_times == [i / 8 for i in (0, 2, 4, 6, 9, 11, 13, 15)]
    assert loaded.second_per_grid == pytest.approx(2 * 15 / 8 / 7)
    assert np.abs(np.subtract(brightness(loaded), [5, 25, 50, 70])).max() <= 2


def test_a_clip_of_a_file_is_that_part(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 32)
    loaded = load_video(path, Spec(fps=8.0, max_pixels=3136), QWEN2, clip=(1.0, 2.0))
    assert loaded.frame_times == [i / 8 for i in range(8)]
    assert loaded.second_per_grid == 0.25
    assert np.abs(np.subtract(brightness(loaded), [42, 52, 62, 72])).max() <= 2


def test_one_frame_is_held(tmp_path):
    loaded = load_video(write_clip(tmp_path / "a.mp4", 1), Spec(max_pixels=3136), QWEN2)
    assert loaded.grid_thw == (2, 4, 4) and loaded.second_per_grid == 0.25
    assert torch.equal(loaded.patches[:16], loaded.patches[16:])


def test_bad_limits_name_the_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 8)
    with pytest.raises(VideoError, match=r"a\.mp4: .*total_pixels=784"):
        load_video(path, Spec(total_pixels=784), QWEN2)


@pytest.fixture(params=READERS)
def reader(request, monkeypatch) -> str:
    """Either reader first."""
    monkeypatch.setattr(frames, "read_decord", READERS[request.param])
    return request.param


def red_times(frames: frames.Frames) -> np.ndarray:
    means = frames.frames.mean((2, 3))
    return frames.times[means[:, 0] > means[:, 1] + 100]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_a_flash_in_uneven_frames_is_where_it_was(tmp_path, reader, suffix, codec):
    """80 frames in 3.2 s, 20 in the next 10; a red one at 8.2 s, which the average rate puts at 11.8 s."""
    times = [*np.arange(80) * 0.04, *(3.2 + np.arange(20) * 0.5)]
    images = grey(100 for _ in times)
    images[90] = np.full_like(images[0], (255, 0, 0))
    path = write_clip(tmp_path / f"a.{suffix}", images, times=times, codec=codec)
    header = probe(path)
    assert header.seekable and 90 / header.fps > 11
    for fps in (2.0, 4.0):
        frames = decode_video(path, Spec(fps=fps), QWEN2)
        assert len(frames.times) == pytest.approx(13 * fps, abs=2.5)
        assert np.abs(red_times(frames) - 8.2).max() <= 0.25, "half of its 0.5 s"
        assert frames.second_per_grid == pytest.approx(2 * 12.7 / (len(frames.times) - 1), abs=1e-2)
    within = decode_video(path, Spec(fps=4.0), QWEN2, clip=(7.0, 10.0))
    assert np.abs(red_times(within) - 1.2).max() <= 0.25 and within.times[-1] < 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_first_frame_is_held_until_its_time(tmp_path, reader, suffix):
    """Sound from 0 s, 24 pictures from 1.5 to 4.5 s at 8 a second; picture i has brightness 5 * i."""
    path = write_clip(tmp_path / f"a.{suffix}", 24, times=[1.5 + i / 8 for i in range(24)], audio_s=4)
    loaded = load_video(path, Spec(fps=4.0, max_pixels=3136), QWEN2)
    assert len(loaded.frame_times) == 18 and loaded.second_per_grid == pytest.approx(2 * 4.375 / 17, abs=1e-3)
    shown = np.clip(np.round((np.array(loaded.frame_times) - 1.5) * 8), 0, 23) * 5
    assert loaded.frame_times[0] == 0 and loaded.frame_times[-1] == pytest.approx(4.375, abs=2e-3)
    assert np.abs(np.subtract(brightness(loaded), shown.reshape(-1, 2).mean(1))).max() <= 2
    assert brightness(loaded)[:2] == brightness(loaded)[:1] * 2
    part = load_video(path, Spec(fps=4.0, max_pixels=3136), QWEN2, clip=(1.0, 2.0))
    assert part.frame_times[0] == 0 and max(part.frame_times) < 1


@real_clips
def test_frame_times_of_a_real_clip_match_its_table(reader):
    path, table = VIDEOS / "pytorch_torchcodec/nasa_13013.mp4", nasa_times()
    for clip, first in ((None, 0.0), ((3.0, 9.5), 3.0)):
        frames = decode_video(path, Spec(max_pixels=3136), QWEN2, clip)
        nearest = np.abs(frames.times[:, None] + first - table).min(1)
        assert len(frames.times) == (26 if clip is None else 12) and nearest.max() < 1e-3
    truth = torch.from_numpy(sequential_decode(path, [90])).permute(0, 3, 1, 2)
    assert table[90] == pytest.approx(3.003, abs=1e-3)
    assert np.array_equal(frames.frames[:1], resize(truth, *frames.frames.shape[2:]))


@real_clips
@pytest.mark.parametrize("name", [name for name in real_files() if name not in UNREADABLE])
def test_either_reader_gives_the_same_video(name, monkeypatch):
    """Whatever decord is not trusted with is PyAV's both times."""
    spec = Spec(max_frames=8, max_pixels=50176)
    first = decode_video(VIDEOS / name, spec, QWEN2)
    monkeypatch.setattr(frames, "read_decord", readers.read_av)
    second = decode_video(VIDEOS / name, spec, QWEN2)
    assert np.array_equal(first.frames, second.frames) and np.array_equal(first.times, second.times)


@real_clips
def test_every_real_file_is_judged():
    verdicts = {name: check_video(VIDEOS / name) for name in real_files()}
    json.dumps(verdicts)
    for name, reason in UNREADABLE.items():
        assert not verdicts[name]["ok"] and verdicts[name]["reason"].startswith(reason)
    partly = verdicts.pop("dmlc_decord/corrupted.mp4")
    assert partly["ok"] and partly["reason"].startswith("28 of 50 frames can be decoded")
    assert (partly["frames"], partly["duration"], partly["fps"]) == (28, pytest.approx(2.8), 10)
    good = [name for name, verdict in verdicts.items() if verdict["ok"] and verdict["reason"] is None]
    assert sorted(good) == sorted(verdicts.keys() - UNREADABLE.keys()), "and nothing else is flagged"
    assert verdicts["moviepy/no_duration.webm"]["frames"] == 74
    assert verdicts["pytorch_torchcodec/av1_video.mkv"] | {"reason": ""} == {
        "ok": True, "reason": "", "frames": 125, "duration": 5.0, "fps": 25.0, "vfr": False, "width": 640,
        "height": 360, "rotation": 0, "first_time": 0.0, "codec": "av1",
    }  # fmt: skip


@real_clips
def test_of_a_corrupt_file_the_part_that_decodes_is_the_video():
    path = VIDEOS / "dmlc_decord/corrupted.mp4"
    frames = decode_video(path, Spec(max_pixels=3136), QWEN2)
    assert frames.times.tolist() == pytest.approx([0, 0.9, 1.8, 2.7]) and frames.second_per_grid == pytest.approx(1.8)
    early = decode_video(path, Spec(max_pixels=3136), QWEN2, clip=(0, 2))
    assert early.times.tolist() == pytest.approx([0, 0.6, 1.3, 1.9])
    with pytest.raises(VideoError, match=r"clip starts at 3 s, the video ends at 2\.800 s"):
        decode_video(path, Spec(max_pixels=3136), QWEN2, clip=(3, 4))


def test_a_folder_of_frames_is_the_video_they_were_taken_from(tmp_path):
    """Patches, times and all; with its own fps, and none of the file's header."""
    path, folder = write_clip(tmp_path / "a.mp4", scrolling(20, 64, 96)), tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(sequential_decode(path), 1):
        Image.fromarray(frame).save(folder / f"frame_{i:06d}.png")
    for clip in (None, (0.5, 2.0)):
        expected, loaded = load_video(path, Spec(), QWEN2, clip), load_video(folder, Spec(), QWEN2, clip, fps=8)
        assert torch.equal(expected.patches, loaded.patches)
        assert replace(expected, patches=None) == replace(loaded, patches=None)
    slow = load_video(folder, Spec(), QWEN2, fps=2.0)
    assert len(slow.frame_times) == 20 and slow.second_per_grid == 1
    assert check_video(folder, 8)["ok"] and check_video(folder, 8)["duration"] == 2.5
    (folder / "frame_000007.png").write_bytes(b"not a picture")
    assert check_video(folder, 8)["reason"].startswith("frame_000007.png: UnidentifiedImageError")


def odd_file(kind: str, folder: Path) -> Path:
    path = folder / "a.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("This is no video.\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(folder / "nothing.mp4")
    elif kind == "secret":
        write_clip(path, 4).chmod(0)
    elif kind == "wide":
        write_clip(path, scrolling(4, 16, 10000))
    elif kind == "tiny":
        write_clip(path, grey([0, 255], size=1), pix_fmt="yuv444p")
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=48000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
            silence.rate = 48000
            container.mux([*stream.encode(silence), *stream.encode(None)])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file or directory"),
        ("link", "No such file or directory"),
        ("empty", "an empty file"),
        ("text", "PyAV: Invalid data found when processing input"),
        ("folder", "a folder of frames needs its frames per second, not fps=None"),
        ("secret", "PyAV: Permission denied"),
        ("wide", "frames of 10000x16 pixels: the aspect ratio must be at most 200"),
        ("tiny", "frames of 1x1 pixels: a side must have at least 8"),
        ("sound", "no video stream"),
    ],
)
def test_what_cannot_be_used_is_rejected_with_a_reason(tmp_path, kind, reason):
    path = odd_file(kind, tmp_path)
    if kind == "secret" and os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(VideoError) as caught:
        decode_video(path, Spec(), QWEN2, cache=FrameCache(tmp_path / "cache", 0.01))
    assert (caught.value.path, caught.value.reason) == (str(path), reason)
    verdict = check_video(path)
    assert (verdict["ok"], verdict["reason"]) == (False, reason)


def test_a_file_that_changes_after_its_check(tmp_path):
    """Replaced by a longer one, cut, then gone: each time what there is, or why not."""
    path, cache = write_clip(tmp_path / "a.mp4", scrolling(16, 64, 64)), FrameCache(tmp_path / "cache", 0.1)
    assert check_video(path)["duration"] == 2
    assert decode_video(path, Spec(), QWEN2, cache=cache).times[-1] == 15 / 8
    write_clip(path, scrolling(32, 64, 64))
    assert decode_video(path, Spec(), QWEN2, cache=cache).times[-1] == 31 / 8
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(VideoError, match="Invalid data"):
        decode_video(path, Spec(), QWEN2, cache=cache)
    path.unlink()
    with pytest.raises(VideoError, match="No such file"):
        decode_video(path, Spec(), QWEN2, cache=cache)


def test_a_cached_load_is_equal_and_opens_no_video(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 40)
    cache, spec = FrameCache(tmp_path / "cache", 0.1), Spec(total_pixels=9 * 784)
    first = load_video(path, spec, QWEN2, (0, 4.5), cache)
    assert first.frames_cut == 4 and len(first.frame_times) == 4

    def refuse(*_):
        raise AssertionError("opened a video")

    monkeypatch.setattr(frames, "probe", refuse)
    second = load_video(path, spec, QWEN2, (0, 4.5), cache)
    assert torch.equal(first.patches, second.patches)
    assert replace(first, patches=None) == replace(second, patches=None)
    others = [(replace(spec, fps=1.0), QWEN2, (0, 4.5)), (spec, replace(QWEN2, patch_size=7), (0, 4.5))]
    for arguments in [*others, (spec, QWEN2, (0, 4)), (spec, QWEN2, None)]:
        with pytest.raises(AssertionError, match="opened a video"):
            load_video(path, *arguments, cache)
    assert len(load_video(path, spec, replace(QWEN2, image_mean=(0, 0, 0)), (0, 4.5), cache).patches) == 32


def test_loads_in_another_process(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 16)
    cache = FrameCache(tmp_path / "cache", 0.1)
    expected = load_video(path, Spec(), QWEN2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        loaded = pool.apply(load_video, (path, Spec(), QWEN2, None, cache))
    assert torch.equal(loaded.patches, expected.patches)
    assert torch.equal(load_video(path, Spec(), QWEN2, None, cache).patches, expected.patches)


def test_a_folder_is_cached_by_its_images_and_its_rate(tmp_path):
    folder, cache = tmp_path / "frames", FrameCache(tmp_path / "cache", 0.1)
    folder.mkdir()
    for i, image in enumerate(scrolling(8, 56, 56)):
        Image.fromarray(image).save(folder / f"{i}.png")
    slow, fast = (decode_video(folder, Spec(), QWEN2, fps=fps, cache=cache) for fps in (2.0, 4.0))
    again = decode_video(folder, Spec(), QWEN2, fps=2.0, cache=cache)
    assert np.array_equal(slow.frames, again.frames) and slow.times.tolist() == again.times.tolist()
    assert (slow.second_per_grid, fast.second_per_grid) == (1, pytest.approx(7 / 6))
    Image.fromarray(255 - scrolling(1, 56, 56)[0]).save(folder / "0.png")
    assert not np.array_equal(decode_video(folder, Spec(), QWEN2, fps=2.0, cache=cache).frames, slow.frames)


def test_a_damaged_cache_entry_is_decoded_again(tmp_path):
    path, cache = write_clip(tmp_path / "a.mp4", 16), FrameCache(tmp_path / "cache", 0.1)
    first = decode_video(path, Spec(fps=8.0, min_pixels=50176), QWEN2, cache=cache)
    (file,) = (tmp_path / "cache").rglob("*.val")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = decode_video(path, Spec(fps=8.0, min_pixels=50176), QWEN2, cache=cache)
    assert np.array_equal(again.frames, first.frames) and np.array_equal(again.times, first.times)
    (file,) = (tmp_path / "cache").rglob("*.val")
    assert file.read_bytes() == content


PEAK = """
import re, sys
from video import frames
from clips import QWEN2, Spec

if sys.argv[2] == "PyAV":
    frames.read_decord = frames.read_av
decoded = frames.decode_video(sys.argv[1], Spec(max_frames=64), QWEN2)
assert len(decoded.times) == 64 and decoded.times[-1] > 595
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_decoding_a_long_high_resolution_clip(tmp_path):
    """10 minutes of 1080p to 64 frames: peak resident memory of the process below 1.5 GiB, with either reader."""
    images = [*scrolling(50, 1080, 1920)] * 60
    path = write_clip(tmp_path / "a.mp4", images, fps=5, options={"preset": "ultrafast", "crf": "40"})
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    for reader in READERS:
        command = [sys.executable, "-c", PEAK, str(path), reader]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        print(f"{reader}: {int(done.stdout) / 2**20:.2f} GiB")
        assert int(done.stdout) < 1.5 * 2**20
