"""A video file to Qwen2-VL patches: plan frames and size within a token budget, decode, resize, patchify.

Not a video library: no audio, no text, no model. Nothing to run; `load_video` has the steps in order.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import av
import decord
import numpy as np
import torch
from decord._ffi.base import DECORDError
from torch.nn.functional import interpolate
from transformers.utils import cached_file

from cache import FrameCache, file_key

decord.logging.set_level(decord.logging.QUIET)
av.logging.set_level(av.logging.PANIC)

Clip = tuple[float, float]  # start and end in seconds
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # FFmpeg's names of what decord can seek in
CHUNK_FRAMES = 16  # frames decoded before they are resized: bounds memory on long high-resolution files


class VideoError(ValueError):
    """A video that cannot be used; `path` and a one-line `reason`."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it crosses a process boundary
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class VideoSpec(Protocol):
    """How a video is sampled and what it may cost; any object with these fields will do."""

    fps: float  # frames sampled per second of video
    min_frames: int
    max_frames: int
    min_pixels: int  # per frame
    max_pixels: int  # per frame
    total_pixels: int  # budget of a video: pixels of one frame times temporal grid steps


@dataclass(frozen=True)
class Geometry:
    """How a checkpoint cuts frames into patches and normalises them."""

    patch_size: int  # pixels
    merge_size: int  # patches a side that become one token
    temporal_patch_size: int  # frames
    image_mean: tuple[float, ...]  # RGB, on the scale 0 to 1
    image_std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Side of a token in pixels."""
        return self.patch_size * self.merge_size

    def num_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Tokens of a video of so many patches along time, height and width."""
        return math.prod(grid_thw) // self.merge_size**2


@dataclass(frozen=True)
class Header:
    """What a file says before anything is decoded.

    Where not `seekable`, decord returns other frames than asked for, without an error: it takes a key frame's
    place in the file for its place in time, which B-frames shown before it make wrong (open GOP, as x265 does
    by default; MPEG-4 and MPEG-2), and its seeks miss where AVI or MPEG-TS holds B-frames.
    """

    num_frames: int
    fps: float  # average
    seekable: bool  # decord's random access can be relied on


@dataclass(frozen=True)
class VideoPlan:
    """Which F frames to decode and the size to give them."""

    frame_indices: tuple[int, ...]  # in the file; ascending, the last one repeated when the clip is too short
    frame_times: tuple[float, ...]  # seconds from the start of the clip; repeats go on at the frame rate
    size: tuple[int, int]  # height and width after resizing, pixels
    grid_thw: tuple[int, int, int]  # patches along time, height, width
    num_tokens: int  # after merging
    frames_cut: int  # frames the token budget took away


@dataclass(frozen=True)
class Video:
    """A video as the model takes it: N patches of D = 3 * temporal_patch_size * patch_size**2 values."""

    patches: torch.Tensor  # (N, D) float32, normalised
    grid_thw: tuple[int, int, int]  # patches along time, height, width
    second_per_grid: float  # seconds between temporal grid steps
    frame_times: list[float]  # seconds from the start of the clip, (F,)
    num_tokens: int  # after merging
    frames_cut: int  # frames the token budget took away


def read_geometry(model_path: str | os.PathLike) -> Geometry:
    """Geometry from a model folder's, or hub id's, own preprocessor file.

    Raises FileNotFoundError where there is no such file, ValueError where it lacks a field.
    """
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        try:
            file = cached_file(model_path, name)
        except OSError as error:
            missing = error
            continue
        values = json.loads(Path(file).read_text())
        try:
            sizes = [int(values[key]) for key in ("patch_size", "merge_size", "temporal_patch_size")]
            return Geometry(*sizes, tuple(values["image_mean"]), tuple(values["image_std"]))
        except KeyError as error:
            raise ValueError(f"{file}: no {error}, which a Qwen2-VL preprocessor file has") from error
    raise FileNotFoundError(f"{model_path}: no preprocessor_config.json, nor the video_ one") from missing


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Height and width near the given ones that `factor` divides, with min_pixels <= area <= max_pixels.

    An elongated frame may miss a limit, as in qwen-vl-utils. Raises ValueError past an aspect ratio of 200.

    >>> smart_resize(240, 426, 28, 3136, 50176)
    (168, 280)
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"frames of {height}x{width}: the aspect ratio must be at most 200")
    if max_pixels < min_pixels:
        raise ValueError(f"max_pixels={max_pixels} is below min_pixels={min_pixels}")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def smart_nframes(
    total_frames: int,
    video_fps: float,
    *,
    nframes: int | None = None,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    factor: int = 2,
) -> int:
    """How many frames to sample: `nframes`, or `fps` per second within the limits; a multiple of `factor`.

    Raises ValueError when that is not between `factor` and `total_frames`.

    >>> smart_nframes(593, 23.976, fps=4.0)
    98
    """
    if nframes is not None:
        count = round(nframes / factor) * factor
    else:
        fewest, most = math.ceil(min_frames / factor) * factor, max_frames // factor * factor
        count = min(max(total_frames / video_fps * fps, fewest), most, total_frames)
        count = math.floor(count / factor) * factor
    if not factor <= count <= total_frames:
        raise ValueError(f"{count} frames to sample, but the video has {total_frames} (at least {factor})")
    return count


def _clip_range(total_frames: int, video_fps: float, clip: Clip | None) -> tuple[int, int, float]:
    """First frame, number of frames, and seconds from the clip's start to its first frame.

    Frames with start <= time < end; where there is none, the one on screen at `start`.

    >>> _clip_range(100, 10.0, (1.0, 2.0))
    (10, 10, 0.0)
    """
    if clip is None:
        return 0, total_frames, 0.0
    start, end = clip
    if not 0 <= start < end:
        raise ValueError(f"clip [{start}, {end}] is not 0 <= start < end")
    if start * video_fps >= total_frames:
        raise ValueError(f"clip starts at {start} s, the video ends at {total_frames / video_fps:.3f} s")
    first, stop = (math.ceil(min(t * video_fps, total_frames) - 1e-6) for t in clip)  # 0.3 s * 10 is frame 3
    if stop <= first:
        first = math.floor(start * video_fps)
        stop = first + 1
    return first, stop - first, max(first / video_fps - start, 0.0)


def plan(
    total_frames: int,
    video_fps: float,
    height: int,
    width: int,
    spec: VideoSpec,
    geometry: Geometry,
    clip: Clip | None = None,
) -> VideoPlan:
    """Choose frames and their size from a file's header alone, never past `spec.total_pixels`.

    Frame count, positions and size are those of qwen-vl-utils, with two rules more: where the frames would
    pass the budget even at their smallest, there are fewer; a clip of fewer than `min_frames` holds its last.
    Raises ValueError for a clip outside the file, unusable header values and limits that exclude each other.
    """
    if total_frames < 1 or not 0 < video_fps < math.inf:
        raise ValueError(f"{total_frames} frames at {video_fps} frames per second")
    first, count, offset = _clip_range(total_frames, video_fps, clip)
    step = geometry.temporal_patch_size
    fewest = math.ceil(max(spec.min_frames, 2) / step) * step
    if spec.max_frames // step * step < fewest:
        raise ValueError(f"max_frames={spec.max_frames} < min_frames={spec.min_frames}, in steps of {step}")
    limits = {"min_frames": fewest, "max_frames": spec.max_frames, "factor": step}
    wanted = smart_nframes(count, video_fps, fps=spec.fps, **limits) if count > fewest else fewest
    for frames in range(wanted, fewest - 1, -step):
        cap = max(min(spec.max_pixels, spec.total_pixels / frames * step), int(spec.min_pixels * 1.05))
        h, w = smart_resize(height, width, geometry.factor, spec.min_pixels, cap)
        if frames // step * h * w <= spec.total_pixels:
            break
    else:
        raise ValueError(
            f"{fewest} frames of {height}x{width} take {fewest // step * h * w} pixels, more than "
            f"total_pixels={spec.total_pixels}: raise it, or lower min_frames or min_pixels={spec.min_pixels}"
        )
    steps = torch.linspace(0, count - 1, frames).round().int().tolist() if count >= frames else range(frames)
    grid_thw = (frames // step, h // geometry.patch_size, w // geometry.patch_size)
    indices = tuple(first + min(i, count - 1) for i in steps)
    times = tuple(offset + i / video_fps for i in steps)
    return VideoPlan(indices, times, (h, w), grid_thw, geometry.num_tokens(grid_thw), wanted - frames)


@contextmanager
def _decoder_errors(path: str, decoder: str) -> Iterator[None]:
    try:
        yield
    # besides its own, decord raises RuntimeError (opening), AssertionError (no frames) and IndexError
    except (DECORDError, RuntimeError, AssertionError, IndexError, av.error.FFmpegError) as error:
        text = re.sub(r"\[[\d:]+\] \S+: ", "", str(error)).partition("\n")[0]  # no time, no C++ source line
        raise VideoError(path, f"{decoder}: {text or type(error).__name__}") from error


def probe(path: str | os.PathLike) -> Header:
    """Read a file's packets without decoding them. Raises VideoError."""
    path = str(path)
    with _decoder_errors(path, "PyAV"), av.open(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError(path, "no video stream")
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        fps, container_name = float(stream.average_rate or 0), container.format.name
    seekable = container_name in SEEKABLE and all(pts is not None for pts, _ in packets)
    if seekable:
        ranks = np.argsort([pts for pts, _ in packets], kind="stable")
        seekable = all(ranks[i] == i for i, (_, is_key) in enumerate(packets) if is_key)
    return Header(len(packets), fps, seekable)


class DecordReader:
    """Random access to a file's frames, turned by its rotation tag; right where `Header.seekable`."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        with _decoder_errors(self.path, "decord"):
            self._reader = decord.VideoReader(self.path, num_threads=1)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at strictly ascending indices, (F, 3, H, W) uint8 RGB. Raises VideoError."""
        with _decoder_errors(self.path, "decord"):
            frames = self._reader.get_batch(list(indices)).asnumpy()
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise VideoError(self.path, f"decord: frames of shape {frames.shape[1:]}")
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


class AvReader:
    """The same frames through PyAV, decoding all before them: slower, reads more files."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self._next = math.inf  # index of the next frame to decode: nothing open yet

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at strictly ascending indices, (F, 3, H, W) uint8 RGB. Raises VideoError."""
        frames = []
        with _decoder_errors(self.path, "PyAV"):
            if indices[0] < self._next:
                container = av.open(self.path)
                self._frames, self._next = container.decode(container.streams.best("video")), 0
            for index in indices:
                frame = next(islice(self._frames, index - self._next, None), None)
                if frame is None:
                    raise VideoError(self.path, f"PyAV: no frame {index}")
                self._next = index + 1
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic with antialias, (F, 3, H, W) to (F, 3, height, width); all in uint8, as the processors do."""
    if frames.shape[2:] != (height, width):
        frames = interpolate(frames, size=(height, width), mode="bicubic", antialias=True)
    return frames.contiguous()


def patchify(frames: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Normalised patches in the order of Qwen2-VL: (F, 3, h, w) uint8 to (N, D) float32.

    Rows run over time, then squares of merge_size x merge_size patches, then inside the square; a row holds
    channel, frame, y, x. A last temporal patch that is not full repeats the last frame. Raises RuntimeError
    unless `geometry.factor` divides h and w.

    >>> pixels = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4).expand(1, 3, 2, 4)
    >>> patchify(pixels, Geometry(1, 2, 1, (0, 0, 0), (1 / 255,) * 3))[:, 0].int().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    size, merge, step = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % step)])
    f, c, h, w = frames.shape
    split = (f // step, step, c, h // geometry.factor, merge, size, w // geometry.factor, merge, size)
    blocks = frames.view(split).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, H, W, merge, merge, c, step, y, x
    patches = blocks.reshape(-1, c, step * size * size).float()
    mean, std = torch.tensor([geometry.image_mean, geometry.image_std])[..., None] * 255
    return patches.sub_(mean).div_(std).flatten(1)


def _decode(path: str, spec: VideoSpec, geometry: Geometry, clip: Clip | None) -> tuple[np.ndarray, ...]:
    """Resized frames (F, 3, h, w) uint8, their times (F,) and frames_cut, by the first reader that can."""
    header, reasons = probe(path), []
    for reader_class in (DecordReader, AvReader) if header.seekable else (AvReader,):
        try:
            reader = reader_class(path)
            height, width = reader.read([0]).shape[2:]
            chosen = plan(header.num_frames, header.fps, height, width, spec, geometry, clip)
            unique, repeats = np.unique(chosen.frame_indices, return_counts=True)
            chunks = [unique[i : i + CHUNK_FRAMES].tolist() for i in range(0, len(unique), CHUNK_FRAMES)]
            frames = torch.cat([resize(reader.read(chunk), *chosen.size) for chunk in chunks]).numpy()
            return frames.repeat(repeats, 0), np.array(chosen.frame_times), np.array(chosen.frames_cut)
        except VideoError as error:
            reasons.append(error.reason)
        except ValueError as error:
            raise VideoError(path, str(error)) from error
    raise VideoError(path, "; ".join(reasons))


def load_video(
    path: str | os.PathLike,
    spec: VideoSpec,
    geometry: Geometry,
    clip: Clip | None = None,
    cache: FrameCache | None = None,
) -> Video:
    """Patches of a video file, or of `clip` of it; from `cache` without opening the file.

    Raises VideoError, naming the file, whatever is wrong with the file or with the clip and limits on it.
    """
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise VideoError(path, "no such file, or an empty one")
    grid = (geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size)
    limits = [getattr(spec, name) for name in VideoSpec.__annotations__]
    key = file_key(path, *limits, *grid, *(clip or ()))
    stored = cache.get(key) if cache is not None else None
    if stored is None:
        stored = _decode(str(path), spec, geometry, clip)
        if cache is not None:
            cache.put(key, *stored)
    frames, times, frames_cut = stored
    num_frames, _, h, w = frames.shape
    grid_thw = (num_frames // grid[2], h // grid[0], w // grid[0])
    patches = patchify(torch.from_numpy(frames), geometry)
    second_per_grid = float(grid[2] * (times[-1] - times[0]) / (num_frames - 1))
    num_tokens = geometry.num_tokens(grid_thw)
    return Video(patches, grid_thw, second_per_grid, times.tolist(), num_tokens, int(frames_cut))
