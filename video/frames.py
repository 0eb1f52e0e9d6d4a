"""A file to Qwen2-VL patches: read its header, plan frames and size (budget.py), decode, resize, patchify.

`decode_video` is the expensive half of the way and `to_video` the other. `check_video` says what is wrong with a file.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from config import VideoConfig
from video.budget import Clip, Geometry, check_size, plan_file, seen_step
from video.cache import FrameCache, file_key
from video.readers import Header, VideoError, decodable, probe, read_av, read_decord, read_folder


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


def _decode(path: str, header: Header, spec: VideoConfig, geometry: Geometry, clip: Clip | None) -> Frames:
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
    spec: VideoConfig,
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
    limits = [spec.fps, spec.min_frames, spec.max_frames, spec.min_pixels, spec.max_pixels, spec.total_pixels]
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


def to_video(frames: Frames, geometry: Geometry, device: torch.device | str = "cpu", time_step: str = "exact") -> Video:
    """Patches and grid of decoded frames, which go to `device` as they are: their patches are four times as large."""
    num_frames, _, h, w = frames.frames.shape
    grid_thw = (num_frames // geometry.temporal_patch_size, h // geometry.patch_size, w // geometry.patch_size)
    patches = patchify(torch.from_numpy(frames.frames).to(device), geometry)
    seconds, num_tokens = seen_step(frames.second_per_grid, time_step), geometry.num_tokens(grid_thw)
    return Video(patches, grid_thw, seconds, frames.times.tolist(), num_tokens, frames.frames_cut)


def check_video(path: str | os.PathLike, fps: float | None = None) -> dict[str, str | bool | int | float | None]:
    """Decode a video to its end, say whether it is usable (`ok`, `reason`), and describe it; never raises.

    What decodes in part is ok with a reason, and described as far as it decodes. `duration` and `first_time` are in
    seconds, `width` and `height` in pixels after a rotation by `rotation` degrees; what is not known is None.
    """
    header = None
    try:
        _check_path(path)
        header = probe(path, fps)
        check_size(header.height, header.width)
        header, reason = decodable(path, header)
        verdict = {"ok": True, "reason": reason}
    except ValueError as error:
        verdict = {"ok": False, "reason": getattr(error, "reason", str(error))}
    names = {"frames": "num_frames", "vfr": "is_vfr"}
    names |= {n: n for n in ("duration", "fps", "width", "height", "rotation", "first_time", "codec")}
    return verdict | {key: getattr(header, name, None) for key, name in names.items()}
