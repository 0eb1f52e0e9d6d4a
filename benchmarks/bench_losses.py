"""Loss variants side by side in the tiny world: the same base, data and steps, several seeds.

    python benchmarks/bench_losses.py --dir runs/losses --seeds 0 1 2 --jobs 2

Trains a base for each seed (configs/tiny_base.yaml), from it every variant, and evaluates each final model on the
grounding test; what stands finished in --dir is used again. Prints a markdown table, means and standard deviations over
seeds, and one JSON line last. With --jobs 2, two runs go side by side on one thread each; times are comparable within
one call.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.jobs import Job, report, run_all

VARIANTS = {  # recipe files and overrides after configs/tiny.yaml
    "GRPO (tiny.yaml)": [],
    "DAPO (mu = 2)": ["configs/dapo.yaml"],
    "Dr. GRPO": ["configs/dr_grpo.yaml"],
    "RLOO": ["configs/rloo.yaml"],
    "GSPO (mu = 2)": ["configs/gspo.yaml"],
    "GRPO, mu = 2": ["loss.updates_per_rollout=2"],
}
LAST = 20  # steps at the end that training figures are averaged over
BASE_S, TRAIN_S, EVAL_S = 240.0, 180.0, 10.0  # expected on one thread


def jobs_of(root: Path, seeds: list[int]) -> list[Job]:
    """A base for each seed, every variant of it, and the tests of those."""
    found = []
    for seed in seeds:
        words = ["configs/tiny_base.yaml", f"run.seed={seed}"]
        found.append(job(f"base_{seed}", "train_sft.py", words, seconds=BASE_S))
    for variant, seed in [(variant, seed) for seed in seeds for variant in VARIANTS]:
        name, start = f"{slug(variant)}_{seed}", f"base_{seed}"
        overrides = [f"model.path={root / start / 'final'}", f"run.seed={seed}", "eval.every=0"]
        words = ["configs/tiny.yaml", *VARIANTS[variant], *overrides]
        found.append(job(name, "train_grpo.py", words, start, seconds=TRAIN_S))
        words = ["configs/tiny_eval.yaml", f"model.path={root / name / 'final'}", f"run.seed={seed}"]
        found.append(job(f"eval_{name}", "eval.py run", words, name, seconds=EVAL_S))
    return found


def job(name: str, program: str, words: list[str], *needs: str, seconds: float) -> Job:
    return Job(name, program, lambda: words, needs, seconds)


def slug(variant: str) -> str:
    return "".join(c for c in variant.lower().replace(" ", "_") if c.isalnum() or c == "_")


def miou(root: Path, name: str) -> float:
    return json.loads((root / f"eval_{name}" / "metrics.json").read_text())["tasks"]["tvg"]["miou"]


def figures(root: Path, variant: str, seed: int) -> dict[str, float]:
    """One run's row: reward (without a penalty) and length of its last steps, the others over all steps; test mIoU."""
    name = f"{slug(variant)}_{seed}"
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    mean = {
        key: statistics.mean(row[key] for row in rows[-LAST:]) for key in ("reward/format", "reward/iou", "length/mean")
    }
    reward = (mean["reward/format"] + mean["reward/iou"]) / 2
    return {
        "reward": reward,
        "length": mean["length/mean"],
        "clip_frac": statistics.mean(row["clip_frac"] for row in rows if "clip_frac" in row),
        "seconds": statistics.median(row["time/step"] for row in rows),
        "miou": miou(root, name),
    }


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(root: Path, seeds: list[int]) -> tuple[str, dict]:
    lines = [
        "| | reward | test mIoU | against the first row | length | clipped (%) | seconds per step |",
        "|---|---|---|---|---|---|---|",
    ]
    results = {variant: [figures(root, variant, seed) for seed in seeds] for variant in VARIANTS}
    first = next(iter(results.values()))
    for variant, runs in results.items():
        column = {key: [run[key] for run in runs] for key in runs[0]}
        paired = [run["miou"] - other["miou"] for run, other in zip(runs, first, strict=True)]
        lines.append(
            f"| {variant} | {spread(column['reward'], 3)} | {spread(column['miou'], 1)} | {spread(paired, 1)} "
            f"| {spread(column['length'], 1)} | {100 * statistics.mean(column['clip_frac']):.1f} "
            f"| {statistics.mean(column['seconds']):.2f} |"
        )
    return "\n".join(lines), results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/losses"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its share of the threads")
    args = parser.parse_args()
    root, threads = args.dir.resolve(), max(1, (os.cpu_count() or 1) // args.jobs)
    try:
        failed = run_all(jobs_of(root, args.seeds), root, args.jobs, threads)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        raise SystemExit(report(failed))
    text, results = table(root, args.seeds)
    print(text)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
