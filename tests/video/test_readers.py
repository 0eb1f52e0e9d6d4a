"""Readers of video: the same frames from each of them, at their true times, on real and on misleading clips."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import av
import decord
import numpy as np
import pytest
from clips import (
    UNREADABLE,
    VIDEOS,
    nasa_times,
    real_clips,
    real_files,
    remux,
    scrolling,
    sequential_decode,
    write_clip,
)
from conftest import REPO
from PIL import Image

from video.readers import VideoError, decodable, probe, read_av, read_decord, read_folder

READABLE = [name for name in real_files() if name not in UNREADABLE]
UNEVEN = np.cumsum([0, *np.random.default_rng(0).integers(20, 300, 59)]) / 1000  # seconds, of 60 frames


def frames_of(read, path, header, indices) -> np.ndarray:
    """All blocks of a reader in one, (F, H, W, 3)."""
    return np.concatenate(list(read(path, header, indices)))


def assert_equal_frames(path, header, indices):
    assert np.array_equal(frames_of(read_av, path, header, indices), frames_of(read_decord, path, header, indices))


@real_clips
@pytest.mark.parametrize("name", READABLE)
def test_both_readers_give_the_frames_of_a_sequential_decode(name):
    """Of every real clip that decord is trusted with and opens; PyAV reads the others alone."""
    header = probe(VIDEOS / name)
    corrupt, refused = name == "dmlc_decord/corrupted.mp4", name == "moviepy/no_duration.webm"
    wanted = np.unique(np.linspace(0, 27 if corrupt else header.num_frames - 1, 7).astype(int)).tolist()
    frames = frames_of(read_av, VIDEOS / name, header, wanted)
    assert frames[0].shape == (header.height, header.width, 3)
    assert header.rotation or corrupt or np.array_equal(sequential_decode(VIDEOS / name, wanted), frames)
    if header.seekable and not corrupt and not refused:
        assert np.array_equal(frames_of(read_decord, VIDEOS / name, header, wanted), frames)
        raw = decord.VideoReader(str(VIDEOS / name), num_threads=1)
        assert header.num_frames == len(raw) and header.fps == pytest.approx(raw.get_avg_fps(), abs=1e-3)


@real_clips
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("llamafactory/2.avi", 224),
        ("pytorch_torchcodec/h265_video.mp4", 7),
        ("pytorch_torchcodec/h264_10bits.mp4", 7),
    ],
)
def test_decord_is_not_trusted_where_it_returns_other_frames(name, index):
    """Without an error: frame 0 of the AVI, frame 8 of the HEVC file, other colours of 10 bits."""
    header = probe(VIDEOS / name)
    assert not header.seekable
    frames = [frames_of(read, VIDEOS / name, header, [index])[0] for read in (read_decord, read_av)]
    assert not np.array_equal(*frames), "decord is mended: drop this part of Header.seekable"


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "seekable"),
    [
        ("mp4", "libx264", {"g": "10", "bf": "3"}, True),
        ("mkv", "libx264", {"g": "10", "bf": "3"}, True),
        ("mkv", "libvpx-vp9", {"g": "10"}, True),
        ("webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "16"}, True),
        ("mp4", "mpeg4", {"g": "10"}, True),
        ("mp4", "mpeg4", {"g": "10", "bf": "2"}, False),
        ("mp4", "libx265", {"x265-params": "keyint=10:bframes=3:b-adapt=0:log-level=none"}, False),
        ("avi", "libx264", {"g": "10", "bf": "3"}, False),
        ("ts", "libx264", {"g": "10", "bf": "3"}, False),
        ("mpg", "mpeg2video", {"g": "10", "bf": "2"}, False),
    ],
)
def test_made_clips_are_read_right_from_any_frame(tmp_path, suffix, codec, options, seekable):
    fps = 25 if suffix == "mpg" else 8
    path = write_clip(tmp_path / f"a.{suffix}", scrolling(40, 64, 64), fps=fps, codec=codec, options=options)
    truth, header = sequential_decode(path), probe(path)
    assert (header.num_frames, header.fps, header.seekable, header.first_time) == (40, fps, seekable, 0)
    assert suffix == "mpg" or header.duration == pytest.approx(5, abs=2e-3)
    for read in (read_decord, read_av) if seekable else (read_av,):
        for i in range(4, 40, 5):
            assert np.array_equal(frames_of(read, path, header, [3, i]), truth[[3, i]])


@pytest.mark.parametrize(
    ("suffix", "codec", "seekable"),
    [("mp4", "libx264", True), ("mkv", "libx264", True), ("webm", "libvpx-vp9", True), ("ts", "libx264", False)],
)
def test_variable_frame_rate(tmp_path, suffix, codec, seekable):
    """True times to 1 ms, the duration with the last frame, and the same frames from both readers, in any order."""
    path = write_clip(tmp_path / f"a.{suffix}", scrolling(60, 64, 64), times=UNEVEN, codec=codec, options={"g": "12"})
    header, truth = probe(path), sequential_decode(path)
    assert header.is_vfr and header.num_frames == 60 and header.seekable == seekable
    assert np.abs(header.times - UNEVEN).max() <= 1e-3
    assert UNEVEN[-1] < header.duration < UNEVEN[-1] + 0.3
    assert header.fps == pytest.approx(60 / header.duration)
    wanted = [1, 7, 11, 12, 13, 35, 36, 59]
    assert np.array_equal(frames_of(read_av, path, header, wanted), truth[wanted])
    if seekable:
        assert all(np.array_equal(frames_of(read_decord, path, header, [i])[0], truth[i]) for i in reversed(wanted))


@real_clips
def test_times_are_those_of_the_table():
    header = probe(VIDEOS / "pytorch_torchcodec/nasa_13013.mp4")
    assert not header.is_vfr and header.num_frames == 390
    assert np.abs(header.times - nasa_times()).max() < 1e-3
    assert header.duration == pytest.approx(13.013, abs=1e-3)
    assert (header.width, header.height, header.rotation, header.codec) == (480, 270, 0, "h264")


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_the_timeline_starts_with_the_container(tmp_path, suffix, codec):
    """Sound from 0 s, pictures from 1.5 s."""
    late = [1.5 + i / 8 for i in range(24)]
    path = write_clip(tmp_path / f"a.{suffix}", scrolling(24, 64, 64), times=late, codec=codec, audio_s=4)
    header = probe(path)
    assert not header.is_vfr and header.fps == pytest.approx(8, abs=1e-2)
    assert np.abs(header.times - late).max() <= 1e-3 and header.first_time == pytest.approx(1.5, abs=1e-3)
    assert_equal_frames(path, header, [0, 5, 23])


def test_pictures_alone_start_at_0_whatever_their_timestamps(tmp_path):
    header = probe(write_clip(tmp_path / "a.mkv", 16, times=[3 + i / 8 for i in range(16)]))
    assert header.first_time == 0 and header.duration == pytest.approx(2, abs=0.05)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    """As `ffmpeg -ss 1.5 -c copy` cuts: decord showed the 12 hidden frames too, so that all others came late."""
    source = write_clip(tmp_path / "a.mp4", scrolling(40, 64, 64), options={"g": "20", "bf": "2"})
    path = remux(source, tmp_path / "b.mp4", shift_s=-1.5, options={"avoid_negative_ts": "disabled"})
    header = probe(path)
    assert (header.num_frames, header.first_time, header.seekable, header.num_lost) == (28, 0, False, 0)
    assert np.array_equal(frames_of(read_av, path, header, [0, 20]), sequential_decode(source)[[12, 32]])


@real_clips
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_tags(degrees):
    header = probe(VIDEOS / f"dmlc_decord/video_{degrees}.mov")
    assert header.rotation == degrees
    assert (header.width, header.height) == ((320, 568) if degrees in (90, 270) else (568, 320))
    assert_equal_frames(VIDEOS / f"dmlc_decord/video_{degrees}.mov", header, [0, 1, 2])


@real_clips
def test_the_part_before_the_first_error():
    path = VIDEOS / "dmlc_decord/corrupted.mp4"
    header = probe(path)
    rest, reason = decodable(path, header)
    assert (header.num_frames, rest.num_frames, rest.duration) == (50, 28, pytest.approx(2.8))
    assert reason.startswith("28 of 50 frames can be decoded, then PyAV: Invalid data")
    with pytest.raises(VideoError, match="PyAV: Invalid data"):
        frames_of(read_av, path, header, [0, 30])
    with pytest.raises(VideoError, match="decord: Check failed"):
        frames_of(read_decord, path, header, [0, 30])
    assert_equal_frames(path, header, [0, 8])  # decord reads on in a thread, and may meet the error early


def test_a_file_cut_short(tmp_path):
    """Its index, at the start, lists 40 frames; decord would reserve memory for as many as it says."""
    source = write_clip(tmp_path / "a.mp4", scrolling(40, 64, 64), options={"bf": "0", "g": "10"})
    path = remux(source, tmp_path / "b.mp4", options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    header = probe(path)
    rest, reason = decodable(path, header)
    assert header.num_frames + header.num_lost == 40 and not header.seekable
    assert 10 < rest.num_frames < 40 and reason.startswith(f"{rest.num_frames} of 40 frames can be decoded")
    assert np.array_equal(frames_of(read_av, path, rest, [9]), sequential_decode(source)[[9]])


def test_a_stream_that_starts_between_key_frames(tmp_path):
    """Broadcast cut anywhere: its first frames cannot be decoded, the others keep their times."""
    path = write_clip(tmp_path / "a.ts", scrolling(40, 64, 64), options={"g": "10", "bf": "0"})
    whole = sequential_decode(path)
    path.write_bytes(path.read_bytes()[188 * 20 :])
    header = probe(path)
    rest, reason = decodable(path, header)
    assert rest.num_frames % 10 == 0 and rest.num_frames < header.num_frames
    assert reason == f"{rest.num_frames} of {header.num_frames} frames can be decoded"
    assert rest.first_time == pytest.approx((header.num_frames - rest.num_frames) / 8)
    assert np.array_equal(frames_of(read_av, path, rest, [0])[0], whole[-rest.num_frames])


def write_images(folder, images, suffix=".png"):
    folder.mkdir()
    for i, image in enumerate(images, 1):
        Image.fromarray(image).save(folder / f"frame_{i}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path, suffix):
    """frame_10 comes after frame_9; what has no number or is no image is no frame."""
    images = scrolling(12, 64, 72)
    folder = write_images(tmp_path / "a", images, suffix)
    (folder / "cover.png").write_bytes(b"")
    (folder / "note_1.txt").write_text("")
    header = probe(folder, fps=4)
    assert (header.num_frames, header.duration, header.fps, header.is_vfr) == (12, 3, 4, False)
    assert (header.width, header.height, header.codec) == (72, 64, "png" if suffix == ".png" else "jpeg")
    error = np.abs(
        np.subtract(frames_of(read_folder, folder, header, [0, 9, 11]), [images[i] for i in (0, 9, 11)], dtype=int)
    )
    assert error.mean() < (1e-9 if suffix == ".png" else 15)


@pytest.mark.parametrize(
    ("make", "fps", "reason"),
    [
        (lambda folder: None, None, "needs its frames per second"),
        (lambda folder: None, 0.0, "needs its frames per second"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], 2.0, "without numbered"),
        (
            lambda folder: (folder / "frame_3.png").write_bytes(b"\x89PNG\r\n"),
            2.0,
            "frame_3.png: UnidentifiedImageError",
        ),
        (lambda folder: os.truncate(folder / "frame_3.png", 90), 2.0, "frame_3.png: "),
        (lambda folder: Image.new("RGB", (8, 9)).save(folder / "frame_3.png"), 2.0, "frame_3.png has 8x9 pixels"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, make, fps, reason):
    folder = write_images(tmp_path / "a", scrolling(4, 32, 32))
    make(folder)
    with pytest.raises(VideoError, match=reason) as caught:
        frames_of(read_folder, folder, probe(folder, fps), range(4))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@real_clips
@pytest.mark.parametrize(
    "name", [name for name in UNREADABLE if "1x1" not in UNREADABLE[name]] + ["moviepy/nothing.mp4"]
)
def test_what_is_no_video_is_named_in_one_line(name):
    with pytest.raises(VideoError) as caught:
        probe(VIDEOS / name)
    assert str(VIDEOS / name) in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        sound, cover = container.add_stream("mp3", rate=44100), container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt, cover.disposition = (
            64,
            64,
            "yuvj420p",
            av.stream.Disposition.attached_pic,
        )
        container.mux(cover.encode(av.VideoFrame.from_ndarray(scrolling(1, 64, 64)[0], format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        silence.rate = 44100
        container.mux([*cover.encode(None), *sound.encode(silence), *sound.encode(None)])
    with pytest.raises(VideoError, match="no video stream"):
        probe(tmp_path / "a.mp3")


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    """FFmpeg takes `data:` for a protocol; decord cannot have a name that is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "data:a%03d.mp4", 8)
    odd = os.fsdecode(b"\xff.mp4")
    os.link("data:a%03d.mp4", odd)
    header = probe("data:a%03d.mp4")
    assert_equal_frames("data:a%03d.mp4", header, [0, 5])
    assert len(frames_of(read_av, odd, probe(odd), [0])) == 1
    with pytest.raises(VideoError, match="decord"):
        frames_of(read_decord, odd, header, [0])


@real_clips
def test_decoders_print_nothing():
    """Their C libraries write to the file descriptors."""
    script = f"""
import pathlib
from clips import QWEN2, Spec
from video.frames import check_video, decode_video
from video.readers import VideoError
for path in sorted(pathlib.Path({str(VIDEOS)!r}).glob("*/*")):
    check_video(path)
    try:
        decode_video(path, Spec(max_pixels=50176), QWEN2)
    except VideoError:
        pass
"""
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_one_frame(tmp_path):
    header = probe(write_clip(tmp_path / "a.mp4", 1))
    assert (header.num_frames, header.fps, header.duration, header.is_vfr) == (1, 8, 0.125, False)
    assert replace(header, listed_fps=0.0).fps == 8
