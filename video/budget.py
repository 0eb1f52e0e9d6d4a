"""Which frames of a video to take and what size to give them, within a budget of tokens: pure functions of its header.

Frame counts, places and sizes are those of qwen-vl-utils.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import cached_file

from config import VideoConfig
from records import jsonl
from video.readers import Header

Clip = tuple[float, float]  # start and end in seconds
MIN_SIDE = 8  # pixels; files of 1x1 pixels exist, and show nothing


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
class VideoPlan:
    """Which F frames to decode and the size to give them."""

    frame_indices: tuple[int, ...]  # in the file; ascending, the same one again where it is held
    frame_times: tuple[float, ...]  # seconds from the start of the clip at which they are shown, or held
    second_per_grid: float  # seconds between temporal grid steps
    size: tuple[int, int]  # height and width after resizing, pixels
    grid_thw: tuple[int, int, int]  # patches along time, height, width
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
        try:
            values = jsonl.parse(Path(file).read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        try:
            sizes = [int(values[key]) for key in ("patch_size", "merge_size", "temporal_patch_size")]
            return Geometry(*sizes, tuple(values["image_mean"]), tuple(values["image_std"]))
        except KeyError as error:
            raise ValueError(f"{file}: no {error}, which a Qwen2-VL preprocessor file has") from error
    raise FileNotFoundError(f"{model_path}: no preprocessor_config.json, nor the video_ one") from missing


def check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"frames of {width}x{height} pixels: a side must have at least {MIN_SIDE}")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"frames of {width}x{height} pixels: the aspect ratio must be at most 200")


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Height and width near the given ones that `factor` divides, with min_pixels <= area <= max_pixels.

    An elongated frame may miss a limit, as in qwen-vl-utils. Raises ValueError for frames that are too small to show
    anything and past an aspect ratio of 200.

    >>> smart_resize(240, 426, 28, 3136, 50176)
    (168, 280)
    """
    check_size(height, width)
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
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    factor: int = 2,
) -> int:
    """How many frames to sample: `fps` per second within the limits, a multiple of `factor`.

    Raises ValueError when that is not between `factor` and `total_frames`.

    >>> smart_nframes(593, 23.976, fps=4.0)
    98
    """
    fewest, most = math.ceil(min_frames / factor) * factor, max_frames // factor * factor
    count = min(max(total_frames / video_fps * fps, fewest), most, total_frames)
    count = math.floor(count / factor) * factor
    if not factor <= count <= total_frames:
        raise ValueError(f"{count} frames to sample, but the video has {total_frames} (at least {factor})")
    return count


def _clip_range(times: np.ndarray, fps: float, clip: Clip | None, even: bool) -> tuple[int, int, float, float]:
    """First frame of a clip, its number of frames, and its start and end in seconds, cut to the file.

    Frames with start <= time < end; where there is none, the one on screen at `start`, which also comes before the
    others where frames are not `even`ly spaced.

    >>> _clip_range(np.arange(100) / 10, 10.0, (1.0, 2.0), even=True)
    (10, 10, 1.0, 2.0)
    """
    duration, margin = len(times) / fps, 1e-6 / fps  # 0.3 s * 10 is frame 3
    start, end = clip or (0.0, duration)
    if not 0 <= start < end:
        raise ValueError(f"clip [{start}, {end}] is not 0 <= start < end")
    if start >= duration:
        raise ValueError(f"clip starts at {start} s, the video ends at {duration:.3f} s")
    first, stop = np.searchsorted(times, (start - margin, end - margin)).tolist()
    if stop <= first or not even:
        first = max(int(np.searchsorted(times, start + margin)) - 1, 0)
        stop = max(stop, first + 1)
    return first, stop - first, start, min(end, duration)


def plan(
    total_frames: int,
    video_fps: float,
    height: int,
    width: int,
    spec: VideoConfig,
    geometry: Geometry,
    clip: Clip | None = None,
    times: np.ndarray | None = None,
) -> VideoPlan:
    """Choose frames and their size from a file's header alone, never past `spec.total_pixels`.

    `times` (total_frames,), in seconds, say when the frames are shown, if not frame i at i / video_fps. The file lasts
    total_frames / video_fps either way. Frame count, positions and size are those of qwen-vl-utils, with three rules
    more: where the frames would pass the budget even at their smallest, there are fewer; a clip of fewer than
    `min_frames` holds its last; with `times`, frames are the nearest to points uniform in time, and held where there
    are no others. Raises ValueError for a clip outside the file, unusable header values and limits that exclude each
    other.
    """
    if total_frames < 1 or not 0 < video_fps < math.inf:
        raise ValueError(f"{total_frames} frames at {video_fps} frames per second")
    even = times is None
    times = np.arange(total_frames) / video_fps if even else times
    first, count, start, end = _clip_range(times, video_fps, clip, even)
    step = geometry.temporal_patch_size
    fewest = math.ceil(max(spec.min_frames, 2) / step) * step
    if spec.max_frames // step * step < fewest:
        raise ValueError(f"max_frames={spec.max_frames} < min_frames={spec.min_frames}, in steps of {step}")
    limits = {"min_frames": fewest, "max_frames": spec.max_frames, "factor": step}
    clip_fps = video_fps if even else count / (end - start)
    wanted = smart_nframes(count, clip_fps, fps=spec.fps, **limits) if count > fewest else fewest
    for frames in range(wanted, fewest - 1, -step):
        cap = max(min(spec.max_pixels, spec.total_pixels / frames * step), int(spec.min_pixels * 1.05))
        h, w = smart_resize(height, width, geometry.factor, spec.min_pixels, cap)
        if frames // step * h * w <= spec.total_pixels:
            break
    else:
        raise ValueError(
            f"{fewest} frames of {width}x{height} take {fewest // step * h * w} pixels, more than "
            f"total_pixels={spec.total_pixels}: raise it, or lower min_frames or min_pixels={spec.min_pixels}"
        )
    shown = times[first : first + count]
    places, shown_at, seconds = _choose(shown, start, end, frames, video_fps if even else None)
    grid_thw = (frames // step, h // geometry.patch_size, w // geometry.patch_size)
    chosen = tuple((first + places).tolist()), tuple(shown_at.tolist())
    return VideoPlan(*chosen, step * seconds, (h, w), grid_thw, geometry.num_tokens(grid_thw), wanted - frames)


def _choose(
    times: np.ndarray, start: float, end: float, frames: int, even_fps: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of the frames shown at `times`, so many indices, the seconds from `start` at which each is shown, and their step.

    >>> _choose(np.array([0.0, 50.0, 60.0]), 0.0, 100.0, 4, None)
    (array([0, 0, 1, 2]), array([ 0., 25., 50., 60.]), 25.0)
    """
    count = len(times)
    if even_fps is not None:  # in float32, as in qwen-vl-utils
        places = torch.linspace(0, max(count, frames) - 1, frames).round().int().numpy()
        shown_at = max(times[0] - start, 0.0) + places / even_fps
        return np.minimum(places, count - 1), shown_at, float(shown_at[-1] - shown_at[0]) / (frames - 1)
    last = end - (end - start) / max(count, frames)
    targets = np.linspace(start, max(last, times[-1]) if times[-1] < end else last, frames)
    places = np.interp(targets, times, np.arange(count)).round().astype(int)  # of the nearest in time
    held = np.bincount(places)[places] > 1
    shown_at = np.where(held, targets, np.maximum(times[places], start)) - start
    return places, shown_at, float(targets[-1] - targets[0]) / (frames - 1)


def seen_step(second_per_grid: float, rule: str) -> float:
    """Seconds between two time steps of a video as the rotary positions see them.

    `exact` is the truth. `whole_seconds` rounds down, as transformers did from 4.50 until the release with pull request
    48669 by a cast to the index's integer type (QwenLM/Qwen3-VL#1282): a step below 1 s then puts all frames at one
    position. It is only for reproducing results.
    """
    return second_per_grid if rule == "exact" else float(int(second_per_grid))


def plan_file(header: Header, spec: VideoConfig, geometry: Geometry, clip: Clip | None = None) -> VideoPlan:
    """`plan` of what a file says about itself."""
    size = header.height, header.width
    if header.is_vfr or header.first_time:
        fps = header.num_frames / header.duration
        return plan(header.num_frames, fps, *size, spec, geometry, clip, header.times)
    return plan(header.num_frames, header.fps, *size, spec, geometry, clip)
