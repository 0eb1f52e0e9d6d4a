"""The whole story in the tiny world: a base model, then SFT and GRPO on grounding from it, evaluated side by side.

    python -m experiments.demo --dir runs/demo --seed 0         # what `make demo` runs: about 8 minutes on 2 cores
    python -m experiments.demo --table runs/demo runs/demo_1    # one table over the seeds that were run

It calls the same mains as the command line, with configs/tiny_*.yaml. Writes results.json, report.html and the run
folders base/, sft_*/, grpo/ and eval_*/ into --dir. Both trainings keep the checkpoint that is best on validation.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml

import report
import tiny
from experiments.seeds import markdown, with_std
from metrics.compare import read_result
from metrics.intervals import in_points, paired_difference
from metrics.rows import read_rows
from runtime.arguments import user_errors

WORLD = "tiny_world"
SFT_LEARNING_RATES = (1e-4, 3e-4, 1e-3)  # the sweep; steps are swept by keeping the best of the validations
TESTS = {"": "mix_test", "_ood": "tvg_ood_test"}  # the end of an evaluation's name, and its data
COLUMNS = {  # test, task, metric
    "tvg/miou": ("", "tvg", "miou"),
    "tvg/r1@0.7": ("", "tvg", "r1@0.7"),
    "tvg_ood/miou": ("_ood", "tvg", "miou"),
    "mcqa/accuracy": ("", "mcqa", "accuracy"),
    "gqa/acc_gqa": ("", "gqa", "acc_gqa"),
}
ROWS = ("floor", "base", "sft", "grpo")
PAIRS = {"grpo - base": ("base", "grpo"), "grpo - sft": ("sft", "grpo"), "sft - base": ("base", "sft")}


# ---- trainings and evaluations ---------------------------------------------------------------------------------------
def run_demo(root: Path, seed: int) -> None:
    if root.exists():
        print(f"replacing {root}")
        shutil.rmtree(root)
    seconds: dict[str, float] = {}
    with timed("world", seconds):
        tiny.main(["--out", WORLD])
    models = train_all(root, seed, seconds)
    with timed("eval", seconds):
        evaluate_all(root, models)
    sft = models["sft"].parent
    results = results_of(root) | {"seconds": seconds, "seed": seed}
    lr = float(sft.name.removeprefix("sft_"))
    results["seen"] = {"sft": seen(sft) | {"learning_rate": lr}, "grpo": seen(root / "grpo")}
    results["models"] = {name: str(path) for name, path in models.items()}
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nresults.json is in {root}\n")
    print_table([root])
    print("\n== report", flush=True)
    tests = [root / f"eval_{name}{test}" for test in TESTS for name in models]
    report.main([*map(str, (root / "grpo", sft, *tests)), "--out", str(root / "report.html")])


@contextmanager
def timed(phase: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {phase}", flush=True)
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 1)


def train_all(root: Path, seed: int, seconds: dict[str, float]) -> dict[str, Path]:
    """Train base, SFT (the sweep) and GRPO; returns the model folder of each."""
    import train_grpo  # here and below, so that --help and --table need no torch, which takes seconds to import
    import train_sft

    with timed("base", seconds):
        train_sft.main(["--config", "configs/tiny_base.yaml", f"run.dir={root}/base", f"run.seed={seed}"])
    base = root / "base" / "final"
    common = [f"model.path={base}", f"run.seed={seed}"]
    with timed("sft", seconds):
        for lr in SFT_LEARNING_RATES:
            overrides = [f"run.dir={root}/sft_{lr:g}", f"optim.lr={lr}", *common]
            train_sft.main(["--config", "configs/tiny_sft.yaml", *overrides])
    sft = max((root / f"sft_{lr:g}" for lr in SFT_LEARNING_RATES), key=best_validation)
    with timed("grpo", seconds):
        train_grpo.main(["--config", "configs/tiny.yaml", f"run.dir={root}/grpo", *common])
    return {"base": base, "sft": sft / "best", "grpo": root / "grpo" / "best"}


def best_validation(run: Path) -> tuple[float, int]:
    """The best validation score of a run, and the first step that it was reached at."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if "validation/score" in row]
    best = max(rows, key=lambda row: row["validation/score"])
    return best["validation/score"], best["step"]


def evaluate_all(root: Path, models: Mapping[str, Path]) -> None:
    import eval as evaluation

    for name, model in models.items():
        for test, data in TESTS.items():
            overrides = [f"run.dir={root}/eval_{name}{test}", f"model.path={model}", f"data.test={WORLD}/{data}.yaml"]
            evaluation.main(["run", "--config", "configs/tiny_eval.yaml", *overrides])


# ---- results ---------------------------------------------------------------------------------------------------------
def results_of(root: Path) -> dict[str, dict]:
    """`rows`: percent by model and column. `paired`: by pair of models and column, the difference and its interval.

    The row `floor` is the best constant answer of the training set, which any model has to pass.
    """
    models = ("base", "sft", "grpo")
    rows: dict[str, dict[str, float]] = {name: {} for name in (*models, "floor")}
    paired: dict[str, dict[str, list[float]]] = {pair: {} for pair in PAIRS}
    for column, (test, task, metric) in COLUMNS.items():
        results = {name: read_result(root / f"eval_{name}{test}") for name in models}
        percent = {name: result.percent(task, metric) for name, result in results.items()}
        for name in models:
            rows[name][column] = round(float(np.mean(list(percent[name].values()))), 4)
        floor = json.loads(Path(results["base"].path).read_text())["floor"]
        rows["floor"][column] = round(floor[task][metric], 4)
        for pair, (a, b) in PAIRS.items():
            difference = paired_difference(percent[a], percent[b], results[a].clusters)
            paired[pair][column] = [round(x, 2) for x in difference]
    return {"rows": rows, "paired": paired}


def seen(run: Path) -> dict[str, float]:
    """What a training looked at, up to the checkpoint that was kept."""
    _, step = best_validation(run)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step]
    batch_size = yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"]
    found = {"kept_step": step, "videos": step * batch_size}
    for name, key in (("target_tokens", "tokens/targets"), ("sampled_tokens", "tokens/completion")):
        found[name] = int(sum(row.get(key, 0) for row in rows))
    return found


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
    """Mean over the runs (and standard deviation, where there are several), then the paired differences of each."""
    results = [read_results(root) for root in roots]
    rows = []
    for name in ROWS:
        numbers = [[result["rows"][name][column] for result in results] for column in COLUMNS]
        rows.append((name, [with_std(np.mean(n), np.std(n, ddof=1) if len(n) > 1 else None) for n in numbers]))
    print("\n".join(markdown(list(COLUMNS), rows)))
    for root, result in zip(roots, results):
        print(f"\n{root}: seed {result['seed']}, {sum(result['seconds'].values()):.0f} s; saw {result['seen']}")
        for pair, columns in result["paired"].items():
            shown = ", ".join(f"{column} {in_points(difference)}" for column, difference in columns.items())
            print(f"  {pair} (points, paired 95% interval): {shown}")


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
