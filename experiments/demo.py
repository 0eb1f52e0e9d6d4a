"""The whole story in the tiny world: a base model, then SFT and GRPO on grounding from it, evaluated side by side.

    python -m experiments.demo --dir runs/demo --seed 0                # what `make demo` runs; about 8 minutes on 2 cores
    python -m experiments.demo --table runs/demo runs/demo_1 runs/demo_2   # one table over the seeds that were run

It calls the same mains as the command line, with configs/tiny_*.yaml. Writes results.json, curves.png, report.html and
the run folders base/, sft_*/, grpo/ and eval_*/ into --dir. Both trainings keep the checkpoint that is best on
validation.
"""

import argparse
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml

import report
import tiny
from metrics import intervals, tasks
from metrics import rows as prediction_rows
from runtime.arguments import user_errors

WORLD = "tiny_world"
SFT_LEARNING_RATES = (1e-4, 3e-4, 1e-3)  # the sweep; steps are swept by keeping the best of the validations
COLUMNS = {
    "tvg/miou": ("eval_{}", "tvg", "miou"),
    "tvg/r1@0.7": ("eval_{}", "tvg", "r1@0.7"),
    "tvg_ood/miou": ("eval_{}_ood", "tvg", "miou"),
    "mcqa/accuracy": ("eval_{}", "mcqa", "accuracy"),
    "gqa/acc_gqa": ("eval_{}", "gqa", "acc_gqa"),
}
ROWS = ("floor", "base", "sft", "grpo")
PAIRS = {"grpo - base": ("base", "grpo"), "grpo - sft": ("sft", "grpo"), "sft - base": ("base", "sft")}


class Stopwatch:
    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        print(f"\n== {phase}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 1)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def best_validation(folder: Path) -> tuple[float, int]:
    """The best validation score of a run and the step it was reached at."""
    scores = [(row["validation/score"], row["step"]) for row in read_metrics(folder) if "validation/score" in row]
    return max(scores, key=lambda pair: (pair[0], -pair[1]))


def train_all(root: Path, seed: int, watch: Stopwatch) -> dict[str, Path]:
    """Train base, SFT (the sweep) and GRPO; returns the model folder of each."""
    import train_grpo  # here and below, so that --help and --table need no torch, which takes seconds to import
    import train_sft

    with watch("base"):
        train_sft.main(["--config", "configs/tiny_base.yaml", f"run.dir={root}/base", f"run.seed={seed}"])
    base = root / "base" / "final"
    common = [f"model.path={base}", f"run.seed={seed}"]
    with watch("sft"):
        for lr in SFT_LEARNING_RATES:
            overrides = [f"run.dir={root}/sft_{lr:g}", f"optim.lr={lr}", *common]
            train_sft.main(["--config", "configs/tiny_sft.yaml", *overrides])
    sft = max((root / f"sft_{lr:g}" for lr in SFT_LEARNING_RATES), key=best_validation)
    with watch("grpo"):
        train_grpo.main(["--config", "configs/tiny.yaml", f"run.dir={root}/grpo", *common])
    return {"base": base, "sft": sft / "best", "grpo": root / "grpo" / "best"}


def evaluate_all(root: Path, models: dict[str, Path]) -> None:
    import eval as evaluation

    for name, model in models.items():
        for suffix, test in (("", "mix_test"), ("_ood", "tvg_ood_test")):
            overrides = [
                f"model.path={model}",
                f"run.dir={root}/eval_{name}{suffix}",
                f"data.test={WORLD}/{test}.yaml",
            ]
            evaluation.main(["run", "--config", "configs/tiny_eval.yaml", *overrides])


def rows_of(root: Path, name: str, column: str) -> list[dict]:
    folder, task, _ = COLUMNS[column]
    rows = prediction_rows.read_rows(root / folder.format(name) / "predictions.jsonl")
    return [row for row in rows if row["task"] == task]


def values(root: Path, name: str, column: str) -> dict[str, float]:
    """Per-sample values (percent) of one column of the table."""
    return {row["id"]: 100 * tasks.sample_values(row)[COLUMNS[column][2]] for row in rows_of(root, name, column)}


def floors(root: Path) -> dict[str, float]:
    """What the best constant answer of the training set earns in each column: the floor that any model has to pass."""
    found = {}
    for column, (folder, task, metric) in COLUMNS.items():
        content = json.loads((root / folder.format("base") / "metrics.json").read_text())
        found[column] = round(content["floor"][task][metric], 4)
    return found


def paired(root: Path) -> dict[str, dict[str, list[float]]]:
    """For each pair of rows and column: mean difference in points and its paired 95% interval."""
    result: dict[str, dict[str, list[float]]] = {}
    for pair, (a, b) in PAIRS.items():
        result[pair] = {}
        for column in COLUMNS:
            left, right = values(root, a, column), values(root, b, column)
            clusters = [tasks.cluster_of(row) for row in rows_of(root, a, column)]
            difference = intervals.paired_interval(list(left.values()), [right[i] for i in left], clusters=clusters)
            result[pair][column] = [round(x, 2) for x in difference]
    return result


def seen(root: Path, sft: Path) -> dict[str, dict]:
    """What each training looked at, up to the checkpoint that was kept."""
    (_, sft_step), (_, grpo_step) = best_validation(sft), best_validation(root / "grpo")
    grpo_rows = [row for row in read_metrics(root / "grpo") if row["step"] <= grpo_step]
    sft_rows = [row for row in read_metrics(sft) if row["step"] <= sft_step]
    batch_sizes = {
        run: yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"] for run in (sft, root / "grpo")
    }
    return {
        "sft": {
            "kept_step": sft_step,
            "learning_rate": float(sft.name.removeprefix("sft_")),
            "videos": sft_step * batch_sizes[sft],
            "target_tokens": int(sum(row["tokens/targets"] for row in sft_rows)),
            "sampled_tokens": 0,
        },
        "grpo": {
            "kept_step": grpo_step,
            "videos": grpo_step * batch_sizes[root / "grpo"],
            "sampled_tokens": int(sum(row["tokens/completion"] for row in grpo_rows)),
        },
    }


def plot_curves(root: Path) -> None:
    """Reward, validation mIoU and completion length of the GRPO run."""
    from matplotlib.figure import Figure

    rows = read_metrics(root / "grpo")
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for key in ("reward/total", "reward/format", "reward/iou"):
        axes[0].plot(steps, smooth([row[key] for row in rows]), label=key)
    axes[0].set(title="Training reward (running mean of 20 steps)", xlabel="step", ylim=(0, 1.02))
    axes[0].legend()
    checked = [row for row in rows if "validation/tvg/miou" in row]
    axes[1].plot([row["step"] for row in checked], [row["validation/tvg/miou"] for row in checked], marker="o")
    axes[1].set(title="Validation mIoU (%)", xlabel="step")
    axes[2].plot(steps, smooth([row["length/mean"] for row in rows]), label="length/mean")
    axes[2].plot(steps, [row["length/max"] for row in rows], alpha=0.3, label="length/max")
    axes[2].set(title="Completion length (tokens)", xlabel="step", ylim=(0, None))
    axes[2].legend()
    figure.savefig(root / "curves.png", dpi=120)


def smooth(series: list[float], window: int = 20) -> np.ndarray:
    """Running mean over the last `window` values."""
    sums = np.cumsum([0.0, *series])
    ends = np.arange(1, len(series) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def read_results(root: Path) -> dict:
    """The results.json of a demo. Raises ValueError for one of an older version, which lacks what the table shows."""
    path = root / "results.json"
    result = json.loads(path.read_text())
    rows = result.get("rows", {})
    missing = [key for key in ("rows", "seed", "seconds", "seen", "paired") if key not in result]
    missing += [f"{name} {column}" for name in ROWS for column in COLUMNS if column not in rows.get(name, {})]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]}, because an older version wrote it: run the demo again "
            f"(python -m experiments.demo --dir {root} --seed {result.get('seed', 0)})"
        )
    return result


def print_table(roots: list[Path]) -> None:
    """Mean over the runs (and standard deviation, where there are several), then the paired differences of each.

    The row `floor` is the best constant answer of the training set.
    """
    results = [read_results(root) for root in roots]
    print("| |" + "|".join(COLUMNS) + "|\n|---|" + "---|" * len(COLUMNS))
    for name in ROWS:
        cells = []
        for column in COLUMNS:
            numbers = [result["rows"][name][column] for result in results]
            spread = f" ± {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else ""
            cells.append(f"{np.mean(numbers):.1f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    for root, result in zip(roots, results):
        print(f"\n{root}: seed {result['seed']}, {sum(result['seconds'].values()):.0f} s; saw {result['seen']}")
        for pair, columns in result["paired"].items():
            shown = ", ".join(f"{column} {m:+.1f} [{lo:+.1f}, {hi:+.1f}]" for column, (m, lo, hi) in columns.items())
            print(f"  {pair} (points, paired 95% interval): {shown}")


def run_demo(root: Path, seed: int) -> None:
    if root.exists():
        print(f"replacing {root}")
        shutil.rmtree(root)
    watch = Stopwatch()
    with watch("world"):
        tiny.main(["--out", WORLD])
    models = train_all(root, seed, watch)
    with watch("eval"):
        evaluate_all(root, models)
    rows = {n: {c: round(float(np.mean(list(values(root, n, c).values()))), 4) for c in COLUMNS} for n in models}
    rows["floor"] = floors(root)
    result = {"rows": rows, "seconds": watch.seconds, "seed": seed, "paired": paired(root)}
    result |= {
        "seen": seen(root, models["sft"].parent),
        "models": {n: str(path) for n, path in models.items()},
    }
    (root / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    plot_curves(root)
    print(f"\nresults.json and curves.png are in {root}\n")
    print_table([root])
    print("\n== report", flush=True)
    tests = [root / f"eval_{name}{suffix}" for suffix in ("", "_ood") for name in models]
    report.main([*map(str, (root / "grpo", models["sft"].parent, *tests)), "--out", str(root / "report.html")])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/demo", help="folder of the demo; replaced when it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", nargs="+", type=Path, metavar="DIR", help="only print the table over these demos")
    args = parser.parse_args(argv)
    if args.table:
        with user_errors():
            print_table(args.table)
    else:
        run_demo(Path(args.dir), args.seed)


if __name__ == "__main__":
    main()
