"""A video to Qwen2-VL patches: plan frames and size within a token budget, decode, resize, patchify.

Not a reader of files (readers.py): no audio, no text, no model. Nothing to run; `load_video` is the whole way,
`decode_video` its expensive half, `to_video` the other, and `check_video` says what is wrong with a file.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.utils import cached_file

from cache import FrameCache, file_key
from readers import Header, VideoError, decodable, probe, read_av, read_decord, read_folder

Clip = tuple[float, float]  # start and end in seconds
MIN_SIDE = 8  # pixels; files of 1x1 pixels exist, and show nothing


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
class VideoPlan:
    """Which F frames to decode and the size to give them."""

    frame_indices: tuple[int, ...]  # in the file; ascending, the same one again where it is held
    frame_times: tuple[float, ...]  # seconds from the start of the clip at which they are shown, or held
    second_per_grid: float  # seconds between temporal grid steps
    size: tuple[int, int]  # height and width after resizing, pixels
    grid_thw: tuple[int, int, int]  # patches along time, height, width
    num_tokens: int  # after merging
    frames_cut: int  # frames the token budget took away


@dataclass(frozen=True, eq=False)
class Frames:
    """A video decoded and resized, as a worker process sends it and the cache stores it."""

    frames: np.ndarray  # (F, 3, h, w) uint8 RGB
    times: np.ndarray  # (F,) float64, seconds from the start of the clip
    second_per_grid: float  # seconds between temporal grid steps
    frames_cut: int  # frames the token budget took away


@dataclass(frozen=True)
class Video:
    """A video as the model takes it: N patches of D = 3 * temporal_patch_size * patch_size**2 values."""

    patches: torch.Tensor  # (N, D) float32, normalised, on the device that they were made on
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
        try:
            values = json.loads(Path(file).read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from None
        try:
            sizes = [int(values[key]) for key in ("patch_size", "merge_size", "temporal_patch_size")]
            return Geometry(*sizes, tuple(values["image_mean"]), tuple(values["image_std"]))
        except KeyError as error:
            raise ValueError(f"{file}: no {error}, which a Qwen2-VL preprocessor file has") from error
    raise FileNotFoundError(f"{model_path}: no preprocessor_config.json, nor the video_ one") from missing


def _check_size(height: int, width: int) -> None:
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
    _check_size(height, width)
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
    spec: VideoSpec,
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


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic with antialias, (F, 3, H, W) to (F, 3, height, width); all in uint8, as the processors do."""
    if frames.shape[2:] != (height, width):
        frames = interpolate(frames, size=(height, width), mode="bicubic", antialias=True)
    return frames


def patchify(frames: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Normalised patches in the order of Qwen2-VL: (F, 3, h, w) uint8 to (N, D) float32, on the device of the frames.

    Rows run over time, then squares of merge_size x merge_size patches, then inside the square; a row holds
    channel, frame, y, x. A last temporal patch that is not full repeats the last frame. Raises RuntimeError
    unless `geometry.factor` divides h and w.

    >>> pixels = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4).expand(1, 3, 2, 4)
    >>> patchify(pixels, Geometry(1, 2, 1, (0, 0, 0), (1 / 255,) * 3))[:, 0].int().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    size, merge, step = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    if len(frames) % step:
        frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % step)])
    f, c, h, w = frames.shape
    split = (f // step, step, c, h // geometry.factor, merge, size, w // geometry.factor, merge, size)
    blocks = frames.view(split).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, H, W, merge, merge, c, step, y, x
    mean, std = torch.tensor([geometry.image_mean, geometry.image_std], device=frames.device)[..., None] * 255
    if frames.device.type == "cpu":  # NumPy asks for huge pages: twice as fast
        patches = torch.from_numpy(np.empty(blocks.shape, np.float32))
    else:
        patches = torch.empty(blocks.shape, device=frames.device)
    return patches.copy_(blocks).view(-1, c, step * size * size).sub_(mean).div_(std).flatten(1)


def plan_file(header: Header, spec: VideoSpec, geometry: Geometry, clip: Clip | None = None) -> VideoPlan:
    """`plan` of what a file says about itself."""
    size = header.height, header.width
    if header.is_vfr or header.first_time:
        fps = header.num_frames / header.duration
        return plan(header.num_frames, fps, *size, spec, geometry, clip, header.times)
    return plan(header.num_frames, header.fps, *size, spec, geometry, clip)


def _decode(path: str, header: Header, spec: VideoSpec, geometry: Geometry, clip: Clip | None) -> Frames:
    """By the first reader that can; where none can, from what there is before the first error."""
    try:
        chosen = plan_file(header, spec, geometry, clip)
    except ValueError as error:
        raise VideoError(path, str(error)) from error
    unique, inverse = np.unique(chosen.frame_indices, return_inverse=True)
    frames, reasons = np.empty((len(unique), 3, *chosen.size), np.uint8), []
    readers = (read_decord, read_av) if header.seekable else (read_av,)
    for read in (read_folder,) if os.path.isdir(path) else readers:
        try:
            place = 0
            for block in read(path, header, unique.tolist()):
                resized = resize(torch.from_numpy(block).permute(0, 3, 1, 2), *chosen.size)
                frames[place : place + len(block)] = resized.numpy()
                place += len(block)
            frames = frames if len(unique) == len(inverse) else frames[inverse]
            return Frames(frames, np.array(chosen.frame_times), chosen.second_per_grid, chosen.frames_cut)
        except VideoError as error:
            reasons.append(error.reason)
    rest, _ = decodable(path, header)
    if rest.num_frames == header.num_frames:
        raise VideoError(path, "; ".join(reasons))
    return _decode(path, rest, spec, geometry, clip)


def _check_path(path: str | os.PathLike) -> None:
    """Raises VideoError for what is no file with content and no folder."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        raise VideoError(path, f"{getattr(error, 'strerror', None) or error}") from error
    if not size and not os.path.isdir(path):
        raise VideoError(path, "an empty file")


def decode_video(
    path: str | os.PathLike,
    spec: VideoSpec,
    geometry: Geometry,
    clip: Clip | None = None,
    fps: float | None = None,
    cache: FrameCache | None = None,
) -> Frames:
    """Frames of a video, or of `clip` of it; from `cache` without opening the video.

    `fps` is the frames per second of a folder of images, and nothing to a file. Where a file decodes in part, that part
    is the video. Raises VideoError, naming the video, whatever is wrong with it or with the clip and limits on it.
    """
    _check_path(path)
    if cache is None:
        return _decode(path, probe(path, fps), spec, geometry, clip)
    limits = [getattr(spec, name) for name in VideoSpec.__annotations__]
    grid = (geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size)
    try:
        key = file_key(path, limits, grid, clip, fps)
    except OSError as error:
        raise VideoError(path, error.strerror) from error
    stored = cache.get(key)
    if stored is None:
        decoded = _decode(path, probe(path, fps), spec, geometry, clip)
        stored = decoded.frames, decoded.times, np.array(decoded.second_per_grid), np.array(decoded.frames_cut)
        cache.put(key, *stored)
    return Frames(*stored[:2], float(stored[2]), int(stored[3]))


def to_video(frames: Frames, geometry: Geometry, device: torch.device | str = "cpu") -> Video:
    """Patches and grid of decoded frames, which go to `device` as they are: their patches are four times as large."""
    num_frames, _, h, w = frames.frames.shape
    grid_thw = (num_frames // geometry.temporal_patch_size, h // geometry.patch_size, w // geometry.patch_size)
    patches = patchify(torch.from_numpy(frames.frames).to(device), geometry)
    num_tokens = geometry.num_tokens(grid_thw)
    return Video(patches, grid_thw, frames.second_per_grid, frames.times.tolist(), num_tokens, frames.frames_cut)


def load_video(
    path: str | os.PathLike,
    spec: VideoSpec,
    geometry: Geometry,
    clip: Clip | None = None,
    cache: FrameCache | None = None,
    fps: float | None = None,
    device: torch.device | str = "cpu",
) -> Video:
    """Patches of a video: `decode_video`, then `to_video`."""
    return to_video(decode_video(path, spec, geometry, clip, fps, cache), geometry, device)


def check_video(path: str | os.PathLike, fps: float | None = None) -> dict[str, str | bool | int | float | None]:
    """Decode a video to its end, say whether it is usable (`ok`, `reason`), and describe it; never raises.

    What decodes in part is ok with a reason, and described as far as it decodes. `duration` and `first_time` are in
    seconds, `width` and `height` in pixels after a rotation by `rotation` degrees; what is not known is None.
    """
    header = None
    try:
        _check_path(path)
        header = probe(path, fps)
        _check_size(header.height, header.width)
        header, reason = decodable(path, header)
        verdict = {"ok": True, "reason": reason}
    except ValueError as error:
        verdict = {"ok": False, "reason": getattr(error, "reason", str(error))}
    names = {"frames": "num_frames", "vfr": "is_vfr"}
    names |= {n: n for n in ("duration", "fps", "width", "height", "rotation", "first_time", "codec")}
    return verdict | {key: getattr(header, name, None) for key, name in names.items()}
