"""How often the 95% intervals hold the truth: of a metric, and of a paired difference of two results.

The questions that two evaluations answered are the population, and its means the truth; `--draws` times `--n` of them
are drawn with replacement, and the intervals of metrics/intervals.py computed as for a result of that size. The last
line is one JSON object. It tests the intervals, not the models.

    python benchmarks/bench_intervals.py runs/demo/eval_base runs/demo/eval_grpo
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from metrics.intervals import bootstrap_interval, paired_interval
from metrics.rows import read_rows
from metrics.tasks import score_each

METRICS = {"tvg": ("miou", "r1@0.5"), "mcqa": ("accuracy",), "gqa": ("miou", "acc_gqa")}


def populations(folders: list[Path]) -> dict[str, tuple[list[float], list[float]]]:
    """`task/metric`: the values of both results, in percent and in the same order of samples."""
    by_id: list[dict[tuple, dict[str, float]]] = []
    for folder in folders:
        rows = read_rows(folder / "predictions.jsonl")
        by_id.append({(row["task"], row["id"]): value for row, value in score_each(rows)})
    found = {}
    for task, names in METRICS.items():
        ids = [key for key in by_id[0] if key[0] == task and key in by_id[1]]
        for name in names if ids else ():
            found[f"{task}/{name}"] = tuple([100 * values[i][name] for i in ids] for values in by_id)
    return found


def coverage(a: list[float], b: list[float], n: int, draws: int, seed: int = 0) -> tuple[float, float]:
    """Share of `draws` whose interval holds the population's mean of `b`, and its mean of `b - a`."""
    a_N, b_N, rng = np.array(a), np.array(b), np.random.default_rng(seed)
    hits = np.zeros(2)
    for draw in range(draws):
        drawn = rng.integers(len(a_N), size=n)
        low, high = bootstrap_interval(b_N[drawn, None], seed + draw)
        _, low_d, high_d = paired_interval(a_N[drawn], b_N[drawn], seed + draw)
        hits += low[0] <= b_N.mean() <= high[0], low_d <= (b_N - a_N).mean() <= high_d
    return tuple(hits / draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, help="run folders of `eval.py run` on the same questions")
    parser.add_argument("--n", type=int, default=200, help="questions in a simulated result")
    parser.add_argument("--draws", type=int, default=1000, help="simulated results")
    args = parser.parse_args()
    result = {}
    print(f"{'':16}{'population':>11}{'difference':>12}{'covered':>9}{'covered, paired difference':>28}")
    for name, (a, b) in tqdm(populations(args.folders).items(), desc="metrics"):
        one, paired = coverage(a, b, args.n, args.draws)
        tqdm.write(f"{name:16}{np.mean(b):11.2f}{np.mean(b) - np.mean(a):+12.2f}{one:9.3f}{paired:28.3f}")
        result[name] = {"covered": round(one, 4), "covered_paired": round(paired, 4)}
    print(json.dumps(result | {"n": args.n, "draws": args.draws}))


if __name__ == "__main__":
    main()
