"""What a video says about itself, and its frames: a file by decord or PyAV, a folder of numbered images by Pillow.

Frames are numbered from 0 in the order they are shown. Every reader gives the same ones.
"""

import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import av
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # FFmpeg's names of what decord can seek in
IMAGES = (".jpg", ".jpeg", ".png")
ROUNDING_S = 1.001e-3  # containers round presentation times, to 1 ms at the coarsest
BLOCK_BYTES = 2**24  # of frames decoded before they are resized: bounds memory, and malloc can use it again
DEFAULT_FPS = 25.0  # FFmpeg's, of a stream that has neither times nor a rate
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class VideoError(ValueError):
    """A video that cannot be used; `path` and a one-line `reason`."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it crosses a process boundary
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Header:
    """What a video says, decoded up to its first frame; times in seconds from the container's start.

    Where not `seekable`, decord returns other frames than asked for, without an error: it takes a key frame's place in
    the file for its place in time, which B-frames shown before it make wrong (open GOP, as x265 does by default; MPEG-4
    and MPEG-2), its seeks miss where AVI or MPEG-TS holds B-frames, and it counts frames that an edit list hides. It
    rounds colours otherwise where a sample has more than 8 bits. Damaged headers may end its process.
    """

    times: np.ndarray  # (F,) float64, ascending: when each frame is shown
    pts: np.ndarray | None  # (F,) int64, the same in the stream's ticks; None where decoded frames can only be counted
    duration: float  # to the end of the last frame
    listed_fps: float  # average in the container's words, 0 where it has none
    width: int  # as displayed
    height: int
    rotation: int  # degrees clockwise that the file asks for: 0, 90, 180 or 270
    codec: str
    seekable: bool  # decord's random access can be relied on
    num_lost: int = 0  # further frames that the container lists and the file does not hold

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @property
    def first_time(self) -> float:
        return float(self.times[0])

    @cached_property
    def constant_fps(self) -> float | None:
        """Frames per second when they are evenly spaced but for rounding, else None."""
        since = self.times - self.times[0]
        fitted = (self.num_frames - 1) / since[-1] if since[-1] else 1 / self.duration
        for fps in (self.listed_fps, float(fitted)):
            if 0 < fps < math.inf and np.abs(since - np.arange(self.num_frames) / fps).max() < ROUNDING_S:
                return fps
        return None

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return self.constant_fps or self.num_frames / self.duration

    @property
    def is_vfr(self) -> bool:
        return self.constant_fps is None


@contextmanager
def _decoder_errors(path: str | os.PathLike, decoder: str, own: type[Exception]) -> Iterator[None]:
    try:
        yield
    # besides its own, decord raises RuntimeError (opening), UnicodeError (name), AssertionError (no frames), IndexError
    except (own, RuntimeError, AssertionError, IndexError, UnicodeError) as error:
        text = getattr(error, "strerror", None) or str(error)
        text = re.sub(r"\[[\d:]+\] \S+: ", "", text).partition("\n")[0]  # no time, no C++ source line
        raise VideoError(path, f"{decoder}: {text or type(error).__name__}") from error


@contextmanager
def _open(path: str | os.PathLike) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    import av  # here and below, so that frames in memory need no decoder
    from av.stream import Disposition

    av.logging.set_level(av.logging.PANIC)
    full = os.path.abspath(path)  # FFmpeg takes what stands before a colon for a protocol
    with _decoder_errors(path, "PyAV", av.error.FFmpegError), av.open(full, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise VideoError(path, "no video stream")
        if stream.codec_context is None:
            raise VideoError(path, "a video stream that no decoder is for")
        stream.codec_context.thread_count = 1
        yield container, stream


def _decoded(packets: "Iterable[av.Packet]") -> "Iterator[av.VideoFrame]":
    """Frames in the order they are shown, up to the first error; errors before the first frame are passed over."""
    from av.error import FFmpegError

    started, early = False, None
    for packet in packets:
        try:
            frames = packet.decode()
        except FFmpegError as error:
            if started:
                raise
            early, frames = error, []
        yield from frames
        started = started or bool(frames)
    if early is not None and not started:
        raise early


def probe(path: str | os.PathLike, fps: float | None = None) -> Header:
    """Read all packets of a file and decode its first frame; `fps` is that of a folder. Raises VideoError."""
    if os.path.isdir(path):
        return _probe_folder(path, fps)
    packets = []
    with _open(path) as (container, stream):

        def noted() -> "Iterator[av.Packet]":
            for packet in container.demux(stream):
                if packet.size:
                    packets.append((packet.pts, packet.dts, packet.duration, packet.is_keyframe, packet.is_discard))
                yield packet

        source = noted()
        first = next(_decoded(source), None)
        for _ in source:
            pass
        if first is None or all(packet[-1] for packet in packets):
            raise VideoError(path, "no frame can be decoded")
        return _header(container, stream, packets, first)


def read_duration(path: str | os.PathLike, fps: float | None = None) -> float:
    """Seconds that a video lasts by its file's header alone, which takes milliseconds; `fps` is that of a folder.

    `probe` reads on to the end, and may find another one. Raises VideoError, also where a header tells no duration.
    """
    if os.path.isdir(path):
        return _probe_folder(path, fps).duration
    with _open(path) as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6  # FFmpeg's AV_TIME_BASE
    raise VideoError(path, "its header tells no duration")


def _header(container, stream, packets: list[tuple], first: "av.VideoFrame") -> Header:
    import av

    pts, dts, lengths, is_key, _ = zip(*(packet for packet in packets if not packet[-1]))  # -1: an edit list hides it
    # AVI has decoding times only; what stands for the others is wrong where there are B-frames
    has_pts = container.format.name != "avi" and None not in pts and len(set(pts)) == len(pts)
    ticks, tick = pts if has_pts else dts, float(stream.time_base)
    rate = float(stream.average_rate or 0)
    if None in ticks:
        tick, lengths = 1 / (rate or DEFAULT_FPS), [1]
        times = np.arange(len(pts)) * tick
    else:
        times = np.sort(ticks) * tick
        start = times[0] if container.start_time is None else container.start_time / av.time_base
        times -= start if times[0] - start > ROUNDING_S else times[0]
    last = (lengths[int(np.argmax(pts)) if has_pts else -1] or 0) * tick
    if last <= 0:
        last = np.median(np.diff(times)) if len(times) > 1 else 1 / (rate or DEFAULT_FPS)
    seekable = container.format.name in SEEKABLE and has_pts and len(pts) == len(packets)
    seekable = seekable and stream.frames in (0, len(pts))  # decord reserves memory for as many as are listed
    seekable = seekable and all(part.bits <= 8 for part in first.format.components)
    seekable = seekable and bool((np.argsort(pts) == np.arange(len(pts)))[list(is_key)].all())
    rotation = round(-first.rotation / 90) * 90 % 360
    return Header(
        times,
        pts=np.sort(pts) if has_pts else None,
        duration=float(times[-1] + last),
        listed_fps=rate,
        width=first.height if rotation % 180 else first.width,
        height=first.width if rotation % 180 else first.height,
        rotation=rotation,
        codec=stream.codec.canonical_name,
        seekable=seekable,
        num_lost=max(0, len(stream.index_entries) - len(packets)),
    )


def read_decord(path: str | os.PathLike, header: Header, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Blocks of frames (n, H, W, 3) uint8 RGB at ascending indices, by seeking; right where `header.seekable`.

    Raises VideoError, as the other readers do.
    """
    import decord
    from decord._ffi.base import DECORDError

    decord.logging.set_level(decord.logging.QUIET)
    size = max(1, BLOCK_BYTES // (3 * header.width * header.height))
    with _decoder_errors(path, "decord", DECORDError):
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
        for start in range(0, len(indices), size):
            block = reader.get_batch(indices[start : start + size]).asnumpy()
            if block.ndim != 4 or block.shape[3] != 3:
                raise VideoError(path, f"decord: frames of shape {block.shape[1:]}")
            yield block


def _numbered(path: str | os.PathLike, header: Header) -> "Iterator[tuple[int, av.VideoFrame]]":
    """Decoded frames with their numbers, which ascend: a frame out of place is left out."""
    places = {} if header.pts is None else {pts: index for index, pts in enumerate(header.pts.tolist())}
    last = -1
    with _open(path) as (container, stream):
        for frame in _decoded(container.demux(stream)):
            index = last + 1 if header.pts is None else places.get(frame.pts, last)
            if index > last:
                last = index
                yield index, frame


def read_av(path: str | os.PathLike, header: Header, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The same frames through PyAV, one by one, decoding all before them: slower, reads more files."""
    from av.error import FFmpegError

    frames, found = _numbered(path, header), -1
    with _decoder_errors(path, "PyAV", FFmpegError):
        for index in indices:
            while found < index:
                found, frame = next(frames, (math.inf, None))
            if found > index:
                raise VideoError(path, f"PyAV: frame {index} is missing")
            yield np.rot90(frame.to_ndarray(format="rgb24")[None], round(frame.rotation / 90), (1, 2)).copy()


def _image_files(folder: str | os.PathLike) -> list[str]:
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGES) and re.search(r"\d", name)]
    except OSError as error:
        raise VideoError(folder, f"folder of frames: {error.strerror}") from error
    return sorted(names, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))


def _read_image(folder: str | os.PathLike, name: str) -> Image.Image:
    try:
        with Image.open(os.path.join(folder, name)) as image:
            return image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise VideoError(folder, f"{name}: {type(error).__name__}: {error}".partition("\n")[0]) from error


def _probe_folder(folder: str | os.PathLike, fps: float | None) -> Header:
    if not fps or not 0 < fps < math.inf:
        raise VideoError(folder, f"a folder of frames needs its frames per second, not fps={fps}")
    names = _image_files(folder)
    if not names:
        raise VideoError(folder, "a folder without numbered .jpg or .png images")
    width, height = _read_image(folder, names[0]).size
    codec = "png" if names[0].lower().endswith(".png") else "jpeg"
    times, duration = np.arange(len(names)) / fps, len(names) / fps
    return Header(times, None, duration, fps, width, height, rotation=0, codec=codec, seekable=False)


def read_folder(folder: str | os.PathLike, header: Header, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The images of a folder, one by one, ordered by the numbers in their names."""
    names = _image_files(folder)
    for index in indices:
        image = _read_image(folder, names[index])
        if image.size != (header.width, header.height):
            raise VideoError(folder, f"{names[index]} has {image.width}x{image.height} pixels, others do not")
        yield np.array(image)[None].copy()


def decodable(path: str | os.PathLike, header: Header) -> tuple[Header, str | None]:
    """What is left of a header when all is decoded, and the reason when that is less. Raises VideoError for nothing."""
    if os.path.isdir(path):
        for _ in read_folder(path, header, range(header.num_frames)):
            pass
        return header, None
    found, reason = set(), None
    try:
        found.update(index for index, _ in _numbered(path, header))
    except VideoError as error:
        reason = error.reason
    kept = sorted(index for index in found if index < header.num_frames)
    if not kept:
        raise VideoError(path, reason or "no frame can be decoded")
    listed, stop = header.num_frames + header.num_lost, kept[-1] + 1
    if len(kept) < listed:
        reason = f"{len(kept)} of {listed} frames can be decoded" + (f", then {reason}" if reason else "")
    duration = header.duration if stop == header.num_frames else float(header.times[stop])
    pts = None if header.pts is None else header.pts[kept]
    return replace(header, times=header.times[kept], pts=pts, duration=duration, seekable=False), reason
