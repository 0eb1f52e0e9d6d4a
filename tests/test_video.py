"""Video preprocessing against released implementations, real clips and files that break readers."""

import json
import math
import multiprocessing
import pickle
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import av
import decord
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import video
from cache import FrameCache
from video import AvReader, DecordReader, Geometry, VideoError, load_video, patchify, plan, resize

SHARED = Path(__file__).resolve().parents[2] / "shared"
VIDEOS = SHARED / "data" / "videos"
GOLDEN = Path(__file__).parent / "golden"
SAMPLING = json.loads((GOLDEN / "qwen_sampling.json").read_text())
PIXEL_CASES = json.loads((GOLDEN / "pixels.json").read_text())["cases"]
QWEN2 = Geometry(14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMAL = [  # one per container and codec; 10-bit files are left out: decord converts their colours otherwise
    "dmlc_decord/flipping_a_pancake.mkv",
    "dmlc_decord/unordered.mov",
    "llamafactory/4.mp4",
    "moviepy/transparent.webm",
    "mmcv/test.mp4",
    "pytorch_torchcodec/av1_video.mkv",
    "pytorch_torchcodec/nasa_13013.mp4",
]
real_clips = pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the clips in ../shared/data/videos")


@dataclass(frozen=True)
class Spec:
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 3136
    max_pixels: int = 602112
    total_pixels: int = 1605632


def write_clip(path, num_frames, *, fps=8, size=56, codec="libx264", options=None) -> Path:
    """A clip whose frame i has brightness 5 * i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for i in range(num_frames):
            image = np.full((size, size, 3), 5 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sequential_decode(path: Path) -> torch.Tensor:
    """Every frame of a file, (F, 3, H, W), by the plainest loop there is."""
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(container.streams.best("video"))]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def brightness(loaded: video.Video) -> list[int]:
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
    wrong = [row for row in rows if result_or_error(video.smart_resize, *row[:5]) != row[5]]
    assert len(rows) == 300 and not wrong


def test_smart_nframes_equals_the_reference():
    rows = SAMPLING["smart_nframes [spec,total_frames,video_fps,result]"]
    wrong = [row for row in rows if result_or_error(video.smart_nframes, *row[1:3], **row[0]) != row[3]]
    assert len(rows) == 300 and not wrong


def test_smart_functions_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="aspect ratio"):
        video.smart_resize(10, 2001, 28, 3136, 50176)
    with pytest.raises(ValueError, match="max_pixels=100 is below"):
        video.smart_resize(100, 100, 28, 3136, 100)
    with pytest.raises(ValueError, match="8 frames to sample, but the video has 7"):
        video.smart_nframes(7, 30.0, nframes=8)


@real_clips
@pytest.mark.parametrize("case", PIXEL_CASES, ids=lambda case: case["key"])
@pytest.mark.parametrize("reader", [DecordReader, AvReader])
def test_patches_equal_the_processors(case, reader):
    """Within 0.07/255, the rounding of the float16 file: every pixel is the same integer."""
    stored = np.load(SHARED / "golden" / "pixels.npz")[case["key"].replace("/", "|")]
    expected = torch.from_numpy(stored).float()
    sizes = (case["patch_size"], case["merge_size"], case["temporal_patch_size"])
    geometry = Geometry(*sizes, tuple(case["image_mean"]), tuple(case["image_std"]))
    _, grid_h, grid_w = case["video_grid_thw"]
    frames = reader(VIDEOS / case["video"]).read(case["frame_indices"])
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


def test_geometry_comes_from_the_model_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        video.read_geometry(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asdict(QWEN2)))
    assert video.read_geometry(tmp_path) == QWEN2
    other = replace(QWEN2, patch_size=16)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(asdict(other)))
    assert video.read_geometry(tmp_path) == other, "the video's own file comes first"
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ValueError, match="merge_size"):
        video.read_geometry(tmp_path)


@real_clips
@pytest.mark.parametrize("name", NORMAL)
def test_readers_give_the_frames_of_a_sequential_decode(name):
    """Scattered reads, the second one backwards, through both readers."""
    truth = sequential_decode(VIDEOS / name)
    wanted = np.unique(np.linspace(0, len(truth) - 1, 6).astype(int)).tolist()
    header = video.probe(VIDEOS / name)
    raw = decord.VideoReader(str(VIDEOS / name), num_threads=1)
    assert header.seekable and header.num_frames == len(raw) == len(truth)
    assert header.fps == pytest.approx(raw.get_avg_fps())
    for reader in (DecordReader(VIDEOS / name), AvReader(VIDEOS / name)):
        assert torch.equal(reader.read(wanted), truth[wanted])
        assert torch.equal(reader.read(wanted[1:3]), truth[wanted[1:3]])


@real_clips
@pytest.mark.parametrize("name", ["llamafactory/2.avi", "pytorch_torchcodec/h265_video.mp4"])
def test_the_right_frames_where_decord_seeks_to_wrong_ones(name):
    """decord returned frame 0 for 224 of the AVI, and frame 8 for 7 of the HEVC file, without an error."""
    truth = sequential_decode(VIDEOS / name)
    assert not video.probe(VIDEOS / name).seekable
    spec = Spec(fps=100.0, max_frames=6, max_pixels=50176)
    loaded = load_video(VIDEOS / name, spec, QWEN2)
    chosen = plan(len(truth), video.probe(VIDEOS / name).fps, *truth.shape[2:], spec, QWEN2)
    expected = truth[list(chosen.frame_indices)]
    assert torch.equal(loaded.patches, patchify(resize(expected, *chosen.size), QWEN2))
    wrong = DecordReader(VIDEOS / name).read(chosen.frame_indices)
    assert not torch.equal(wrong, expected), "decord is mended: drop Header.seekable"


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "seekable"),
    [
        ("mp4", "libx264", {"g": "10", "bf": "3"}, True),
        ("mkv", "libx264", {"g": "10", "bf": "3"}, True),
        ("mkv", "libvpx-vp9", {"g": "10"}, True),
        ("mp4", "mpeg4", {"g": "10"}, True),
        ("mp4", "mpeg4", {"g": "10", "bf": "2"}, False),
        ("mp4", "libx265", {"x265-params": "keyint=10:bframes=3:b-adapt=0:log-level=none"}, False),
        ("avi", "libx264", {"g": "10", "bf": "3"}, False),
        ("ts", "libx264", {"g": "10", "bf": "3"}, False),
    ],
)
def test_seekable_files_are_read_right_from_any_frame(tmp_path, suffix, codec, options, seekable):
    path = write_clip(tmp_path / f"a.{suffix}", 40, size=64, codec=codec, options=options)
    truth = sequential_decode(path)
    assert video.probe(path) == video.Header(40, 8.0, seekable)
    for reader in (DecordReader, AvReader) if seekable else (AvReader,):
        assert all(torch.equal(reader(path).read([3, i]), truth[[3, i]]) for i in range(4, 40, 5))


@real_clips
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_both_readers_apply_rotation_tags(degrees):
    path = VIDEOS / f"dmlc_decord/video_{degrees}.mov"
    frames = AvReader(path).read([0, 1, 2])
    assert torch.equal(frames, DecordReader(path).read([0, 1, 2]))
    assert (frames.shape[2] > frames.shape[3]) == (degrees in (90, 270))


@real_clips
@pytest.mark.parametrize(
    ("name", "frames"),
    [("moviepy/no_duration.webm", 8), ("moviepy/bitmap.mp4", 4), ("moviepy/-video-with-dash-.mp4", 4)],
)
def test_pyav_reads_what_decord_refuses(name, frames):
    """No duration, and 1x1 pixels, which decord returns as rows of 192 channels."""
    with pytest.raises(VideoError, match="decord"):
        DecordReader(VIDEOS / name).read([0])
    loaded = load_video(VIDEOS / name, Spec(max_frames=8, max_pixels=50176), QWEN2)
    assert len(loaded.frame_times) == frames and loaded.patches.isfinite().all()


@real_clips
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("moviepy/result.webm", "empty"),
        ("pytorch_torchcodec/nasa_13013.mp4.audio.mp3", "no video stream"),
        ("moviepy/SOURCE.md", "Invalid data"),
        ("moviepy/nothing.mp4", "no such file"),
        ("dmlc_decord/corrupted.mp4", "PyAV"),
    ],
)
def test_unreadable_files_are_named_in_one_line(name, reason):
    with pytest.raises(VideoError, match=reason) as caught:
        load_video(VIDEOS / name, Spec(max_pixels=3136), QWEN2)
    assert str(VIDEOS / name) in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)


@real_clips
def test_the_good_part_of_a_corrupt_file_is_read():
    loaded = load_video(VIDEOS / "dmlc_decord/corrupted.mp4", Spec(max_pixels=3136), QWEN2, clip=(0, 2))
    assert len(loaded.frame_times) == 4


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


def test_a_cached_load_is_equal_and_opens_no_video(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 40)
    cache, spec = FrameCache(tmp_path / "cache", 0.1), Spec(total_pixels=9 * 784)
    first = load_video(path, spec, QWEN2, (0, 4.5), cache)
    assert first.frames_cut == 4 and len(first.frame_times) == 4

    def refuse(*_):
        raise AssertionError("opened a video")

    monkeypatch.setattr(video, "_decode", refuse)
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
