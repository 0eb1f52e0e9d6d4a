"""Clips that tests make, and where the real ones are."""

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from video.budget import Geometry
from video.frames import Video, decode_video, to_video

SHARED = Path(__file__).resolve().parents[2] / "shared"
VIDEOS = SHARED / "data" / "videos"
real_clips = pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the clips in ../shared/data/videos")
QWEN2 = Geometry(14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MEDIA = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mp3")
UNREADABLE = {  # and what check_video says of them
    "moviepy/result.webm": "an empty file",
    "moviepy/bitmap.mp4": "frames of 1x1 pixels",
    "moviepy/-video-with-dash-.mp4": "frames of 1x1 pixels",
    "pytorch_torchcodec/nasa_13013.mp4.audio.mp3": "no video stream",
}


@dataclass(frozen=True)
class Spec:
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 3136
    max_pixels: int = 602112
    total_pixels: int = 1605632


def real_files() -> list[str]:
    """Every media file of ../shared/data/videos, the unreadable ones too, relative to it."""
    return sorted(str(path.relative_to(VIDEOS)) for path in VIDEOS.glob("*/*") if path.suffix in MEDIA)


def nasa_times() -> np.ndarray:
    """Presentation times of the frames of nasa_13013.mp4, (390,) seconds, from its table."""
    table = VIDEOS / "pytorch_torchcodec" / "nasa_13013.mp4.stream3.all_frames_info.json"
    return np.array([float(row["pts_time"]) for row in json.loads(table.read_text())])


def grey(values, size: int = 56) -> list[np.ndarray]:
    """Plain images of the given brightnesses."""
    return [np.full((size, size, 3), value, dtype=np.uint8) for value in values]


def scrolling(num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """A pattern that moves on by a pixel per image: up to `width` images, no two alike, each predicted from others."""
    squares = np.random.default_rng(0).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pattern = squares.repeat(8, 0).repeat(8, 1)[:height, :width]
    return [np.roll(pattern, i, axis=1) for i in range(num_frames)]


def write_clip(
    path: Path, images, *, fps=8, times=None, codec="libx264", options=None, pix_fmt="yuv420p", audio_s=0
) -> Path:
    """A clip of `images` (a number: so many, of brightness 5 * i), at `times` (s) if given, beside silence."""
    images = grey(5 * i for i in range(images)) if isinstance(images, int) else images
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"qp": "0"})
        stream.height, stream.width, _ = images[0].shape
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio_s:
            sound = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000 * audio_s), np.float32), "fltp", "mono")
            silence.rate, silence.pts = 48000, 0
            container.mux([*sound.encode(silence), *sound.encode(None)])
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, path: Path, shift_s: float = 0.0, options=None) -> Path:
    """The packets of a clip in another file, `shift_s` seconds later."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options or {}) as new:
        stream = old.streams.video[0]
        copy, shift = new.add_stream_from_template(stream), round(shift_s / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                new.mux(packet)
    return path


def sequential_decode(path: Path, wanted=None) -> np.ndarray:
    """All or the wanted frames of a file, (F, H, W, 3), by the plainest loop there is."""
    with av.open(str(path)) as container:
        frames = enumerate(container.decode(container.streams.best("video")))
        return np.stack([f.to_ndarray(format="rgb24") for i, f in frames if wanted is None or i in wanted])


def load_video(path, spec, geometry, clip=None, cache=None, fps=None) -> Video:
    """The whole way: patches of a video."""
    return to_video(decode_video(path, spec, geometry, clip, fps, cache), geometry)
