"""What the number of records costs a training step: the same GRPO steps on a small and on a large data set.

    python benchmarks/bench_data.py [--records 900 200000] [--steps 40]

Each data set is one file of records that share four small clips, whose frames are in the cache once the first steps
have read them. A tiny model trains on it with train_grpo.train on one process, decodes in that process and validates
nothing. A step should cost the same for both data sets, because it asks for as many records. The table has, in ms:

    data      the median of time/data: which records the step asks for, their frames and their prompts
    around    the median of what lies outside the phases of a step: the rest of time/step, rows, logs, the loop
    sum       both together
    reading   seconds that read_samples takes once, before the first step

The first five steps are left out. The last line is JSON: these figures, and by how much the sum grows.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ways import write_clip

import config
import tiny
import train_grpo
from preflight import selfcheck
from runtime.environment import environment
from runtime.run import Run

NUM_CLIPS, NUM_FRAMES, SIDE = 4, 8, 56  # frames and pixels of a clip
WARM_UP = 5  # steps in which frames come into the cache
PHASES = ("data", "vision", "rollout", "reward", "update")


class TimedRun(Run):
    """A run that notes when each of its steps began."""

    def steps(self, name: str):
        self.starts = []
        for step in super().steps(name):
            self.starts.append(time.perf_counter())
            yield step


def write_records(folder: Path, num: int) -> Path:
    """`num` grounding records, one after the other of the clips in `folder`."""
    path = folder / f"{num}.jsonl"
    record = {"task": "tvg", "duration": NUM_FRAMES / 2, "question": "When does it happen?", "segments": [[1.0, 2.0]]}
    rows = (record | {"id": f"bench/{i}", "video": f"{i % NUM_CLIPS}.mp4"} for i in range(num))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(folder: Path, num: int, steps: int) -> dict[str, float]:
    """The figures of one data set, in ms, and the seconds that reading it takes."""
    overrides = [
        f"model.path={folder / 'model'}",
        f"data.train={write_records(folder, num)}",
        f"data.cache_dir={folder / 'cache'}",
        "data.validation=''",
        "data.workers=0",
        "data.batch_size=4",
        f"run.dir={folder / f'run_{num}'}",
        f"run.steps={steps}",
        f"run.save_every={steps}",
        "run.tracker=none",
        "run.self_check=false",
        "run.print_every=1000000",
        "rollout.group_size=2",
        "rollout.max_new_tokens=4",
    ]
    seconds, read = [], train_grpo.read_samples

    def timed_read(*args, **kwargs):
        start = time.perf_counter()
        samples = read(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return samples

    train_grpo.read_samples, selfcheck.Run = timed_read, TimedRun
    try:
        run = train_grpo.train(config.load(config.GrpoConfig, [], overrides))
    finally:
        train_grpo.read_samples, selfcheck.Run = read, Run
    rows = run.rows("metrics.jsonl")
    wholes = [end - start for start, end in zip(run.starts, run.starts[1:])][WARM_UP:]
    rows = rows[WARM_UP : WARM_UP + len(wholes)]
    data = [row["time/data"] for row in rows]
    around = [whole - sum(row[f"time/{phase}"] for phase in PHASES) for whole, row in zip(wholes, rows, strict=True)]
    found = {"data": data, "around": around, "sum": [sum(pair) for pair in zip(data, around)]}
    return {name: 1000 * median(values) for name, values in found.items()} | {"reading": seconds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs=2, default=[900, 200_000], help="of the two data sets")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps must be at least {WARM_UP + 2}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_model(folder / "model", seed=0, family="qwen2_5_vl")
        for i in range(NUM_CLIPS):
            write_clip(folder / f"{i}.mp4", NUM_FRAMES, SIDE)
        found = {num: measure(folder, num, args.steps) for num in args.records}
    print(f"{'records':>10}{'data, ms':>12}{'around, ms':>12}{'sum, ms':>12}{'reading, s':>12}")
    for num, row in found.items():
        print(f"{num:>10,}" + "".join(f"{row[key]:12.2f}" for key in ("data", "around", "sum", "reading")))
    small, large = found.values()
    made_with = environment()
    result = {str(num): row for num, row in found.items()} | {"growth_ms": large["sum"] - small["sum"]}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": made_with["commit"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
