"""What it costs to turn real clips into patches, against decord alone; from a cache; with one and two processes.

    python benchmarks/bench_video.py                    # needs the clips in ../shared/data/videos

- ours: `decode_video` and `to_video` with the default video section of config.py: read the packets, choose frames and
  size, open the reader, decode, resize, patchify. cold and cached: the same with a frame cache, empty and then full.
- bare: open a `decord.VideoReader` with one thread, as ours does (worker processes share the cores), and `get_batch` of
  the same frames. threads: the same with decord's default number of threads.
- workers: 1 or 2 processes decode, this one makes patches, as in training.

In every round the variants take turns on each clip; the first round is a warm-up. A ratio is the median over rounds of
the ratio of sums over clips. CPU seconds, which a busy machine disturbs less, stand beside the wall clock.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import decord
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import VideoConfig
from runtime.environment import environment
from video.budget import Geometry, plan
from video.cache import FrameCache
from video.frames import check_video, decode_video, to_video
from video.readers import probe
from video.workers import Workers

VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "videos"
GEOMETRY = Geometry(14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MIN_SECONDS = 1.0  # shorter clips are test patterns

VARIANTS = ("bare", "threads", "ours", "cold", "cached")

Round = dict[tuple[str, Path], tuple[float, float]]  # seconds of wall clock and of CPU, by variant and clip


def timed(call: Callable) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(path: Path, indices: tuple[int, ...], threads: int) -> None:
    decord.VideoReader(str(path), num_threads=threads).get_batch(indices).asnumpy()


def preprocess(path: Path, cache: FrameCache | None = None) -> None:
    to_video(decode_video(path, VideoConfig(), GEOMETRY, cache=cache), GEOMETRY)


def real_clips() -> dict[Path, tuple[int, ...]]:
    """Clips that decord reads and that are no test patterns of a few frames, and the frames to read of them."""
    clips = {}
    for path in sorted(path for path in VIDEOS.glob("*/*") if check_video(path)["ok"]):
        header = probe(path)
        chosen = plan(header.num_frames, header.fps, header.height, header.width, VideoConfig(), GEOMETRY)
        if header.seekable and header.duration >= MIN_SECONDS and not header.is_vfr and path.name != "corrupted.mp4":
            clips[path] = chosen.frame_indices
    return clips


def one_round(clips: dict[Path, tuple[int, ...]], folder: str) -> Round:
    cache, found = FrameCache(folder, 4.0), {}
    for path, indices in clips.items():
        found["bare", path] = timed(partial(bare, path, indices, 1))
        found["threads", path] = timed(partial(bare, path, indices, 0))
        found["ours", path] = timed(partial(preprocess, path))
        found["cold", path] = timed(partial(preprocess, path, cache))
        found["cached", path] = timed(partial(preprocess, path, cache))
    return found


def through(workers: Workers, paths: list[Path]) -> None:
    for call in workers.ahead(((path,) for path in paths), 2 * workers.num):
        to_video(workers.result(call), GEOMETRY)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    clips = real_clips()
    if not clips:
        sys.exit(f"no clips in {VIDEOS}")
    env, num_frames = environment(), sum(map(len, clips.values()))
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    load = f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    print(f"{env['devices'][0]}; {load}; decord {decord.__version__}; commit {commit}")
    print(f"{len(clips)} clips, {num_frames} frames of them; medians of {args.repeats} rounds\n")
    decode = partial(decode_video, spec=VideoConfig(), geometry=GEOMETRY)
    rounds, by_workers = [], {1: [], 2: []}
    with Workers(decode, 1, 600.0) as one, Workers(decode, 2, 600.0) as two:
        for _ in range(args.repeats + 1):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(one_round(clips, folder))
            for workers in (one, two):
                by_workers[workers.num].append(timed(partial(through, workers, 2 * [*clips]))[0] / 2)
    print_clips(clips, rounds[1:])
    print_rates(num_frames, rounds[1:], {num: seconds[1:] for num, seconds in by_workers.items()})


def total(found: Round, variant: str, clock: int = 0) -> float:
    return sum(times[clock] for (name, _), times in found.items() if name == variant)


def ratio(rounds: list[Round], variant: str, baseline: str, clock: int = 0) -> float:
    return median(total(found, variant, clock) / total(found, baseline, clock) for found in rounds)


def print_clips(clips: dict[Path, tuple[int, ...]], rounds: list[Round]) -> None:
    print(f"{'milliseconds':37s}frames" + "".join(f"{name:>9s}" for name in VARIANTS) + "   ours / bare, and of CPU")
    for path, indices in clips.items():
        wall, cpu = ([median(found[name, path][clock] for found in rounds) for name in VARIANTS] for clock in (0, 1))
        cells = "".join(f"{1e3 * seconds:9.1f}" for seconds in wall)
        ratios = f"{wall[2] / wall[0]:14.2f} {cpu[2] / cpu[0]:8.2f}"
        print(f"{path.relative_to(VIDEOS)!s:37.37s}{len(indices):6d}{cells}{ratios}")


def print_rates(num_frames: int, rounds: list[Round], by_workers: dict[int, list[float]]) -> None:
    print("\nframes per second, wall clock and CPU")
    for name in VARIANTS:
        wall, cpu = (num_frames / median(total(found, name, clock) for found in rounds) for clock in (0, 1))
        print(f"  {name:10s} {wall:8.0f} {cpu:8.0f}")
    for num, seconds in by_workers.items():
        print(f"  {num} worker{'s' * (num > 1):2s}  {num_frames / median(seconds):8.0f}")
    result = {
        "preprocess_over_decode": ratio(rounds, "ours", "bare"),
        "cached_speedup": ratio(rounds, "cold", "cached"),
        "worker_scaling": median(one / two for one, two in zip(by_workers[1], by_workers[2])),
        "cpu_preprocess_over_decode": ratio(rounds, "ours", "bare", clock=1),
        "cpu_cached_speedup": ratio(rounds, "cold", "cached", clock=1),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
