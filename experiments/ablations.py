"""Five questions asked of the tiny world: what one knob changes, over seeds, with intervals.

    python -m experiments.ablations              # what `make ablations` runs; it prints its estimate first
    python -m experiments.ablations --questions data group --seeds 0 1 2 3 4 --dir runs/ablations
    python -m experiments.ablations --quick      # all of it, in a few steps of a smaller world: no results

An arm is a file of configs/ablations on top of its parents (first line), trained from the base of its seed and tested
with its final weights. An arm that two questions share runs once, and what stands finished in --dir is not run again.
<arm>/seed_<n>/ has the training run/, the tests test/ and ood/, and a log of each. Writes results.json, differences.png
and a figure of every question, and prints the tables. `load_results`, `plot`, `draw` and `draw_differences` are for
notebooks.

Intervals are bootstrap 95% intervals over seeds and questions (metrics/intervals.py). With three seeds an interval is a
rough guide, so tables and figures show the seeds beside it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import config
import tiny
from config import flat
from experiments import seeds
from experiments.arms import ARMS, folder, selection_tokens
from experiments.jobs import PROGRAMS, REPO, Job, report, run_all, unfinished
from metrics.compare import read_result
from metrics.intervals import Values
from metrics.rows import read_rows

CONFIGS = REPO / "configs/ablations"
STARTS = {  # the program of a chain of configurations, by the file that it begins with
    "tiny.yaml": "train_grpo.py",
    "tiny_base.yaml": "train_sft.py",
    "tiny_sft.yaml": "train_sft.py",
    "tiny_select.yaml": "select_data.py",
    "tiny_eval.yaml": "eval.py run",
}
TESTS = {"test": "mix_test", "ood": "tvg_ood_test"}  # runs of eval.py, and their data
ANSWERS = {"plain": "../tiny_eval.yaml", "think": "answer_think.yaml"}  # how a model is asked
COLUMNS = {  # test, task, metric, name
    "tvg/miou": ("test", "tvg", "miou", "grounding: mIoU"),
    "tvg_ood/miou": ("ood", "tvg", "miou", "grounding out of domain: mIoU"),
    "mcqa/accuracy": ("test", "mcqa", "accuracy", "multiple choice: accuracy"),
    "gqa/accuracy": ("test", "gqa", "accuracy", "grounded QA: accuracy"),
    "gqa/miou": ("test", "gqa", "miou", "grounded QA: mIoU"),
    "gqa/acc_gqa": ("test", "gqa", "acc_gqa", "grounded QA: Acc@GQA"),
    "tvg/parse_fail": ("test", "tvg", "parse_fail", "grounding: no usable answer"),
}
LAST = 20  # the reward and the length of a training are means over so many steps at its end
QUICK = {  # overrides of --quick by arm; the other arms take two steps
    "base": ["run.steps=60"],
    "both": ["run.steps=20", "optim.warmup_steps=10"],
    "select": ["select.rule=top_variance", "select.budget=6"],
    "select_random": [],
}
QUICK_S, TEST_S = 7.0, 15.0  # expected of anything with --quick, and of a test without, on one thread


@dataclass(frozen=True)
class Row:
    arm: str
    against: tuple[str, ...] = ()  # labels of the rows that are subtracted from it
    answer: str = "plain"
    column: str = ""  # the column that it is about, where that is not the question's first one


@dataclass(frozen=True)
class Question:
    title: str
    columns: tuple[str, ...]  # keys of COLUMNS, the one that the question is about first
    rows: dict[str, Row]


GROUNDING, QA = ("tvg/miou", "tvg_ood/miou"), ("mcqa/accuracy", "gqa/accuracy", "gqa/miou", "gqa/acc_gqa")
QUESTIONS = {
    "data": Question(
        "Which of the grounding data to train on",
        (*GROUNDING, *QA[::3]),
        {
            "all": Row("grpo"),
            "selected": Row("selected", ("all", "random, as many")),
            "selected, equal tokens": Row("selected_tokens", ("all", "random, as many")),
            "random, as many": Row("random", ("all",)),
            "rejected": Row("rejected", ("all", "random, as many")),
        },
    ),
    "reward": Question(
        "What the reward pays for, trained on grounded QA, and on grounding",
        ("gqa/acc_gqa", "gqa/accuracy", "gqa/miou", "tvg/miou", "tvg_ood/miou"),
        {
            "base": Row("base"),
            "format": Row("gqa_format", ("base",)),
            "format, option": Row("gqa_answer", ("format",)),
            "format, IoU": Row("gqa_iou", ("format",)),
            "format, option, IoU": Row("gqa", ("format, option", "format, IoU")),
            "grounding: IoU": Row("grpo"),
            "grounding: IoU >= 0.5": Row("threshold", ("grounding: IoU",), column="tvg/miou"),
        },
    ),
    "sft": Question(
        "SFT against GRPO, both on grounding alone",
        (*GROUNDING, *QA),
        {
            "base": Row("base"),
            "SFT, 1e-4": Row("sft_1e-4", ("base",)),
            "SFT, 3e-4": Row("sft_3e-4", ("base",)),
            "SFT, 1e-3": Row("sft", ("base",)),
            "GRPO": Row("grpo", ("base", "SFT, 1e-4", "SFT, 3e-4", "SFT, 1e-3")),
        },
    ),
    "thinking": Question(
        "Thinking in training and in answering",
        (*GROUNDING, "gqa/acc_gqa", "tvg/parse_fail"),
        {
            "base, plain answers": Row("both"),
            "base, thinking answers": Row("both", ("base, plain answers",), "think"),
            "trained plain, plain answers": Row("plain", ("base, plain answers",)),
            "trained plain, thinking answers": Row("plain", ("trained plain, plain answers",), "think"),
            "trained thinking, plain answers": Row("think", ("trained plain, plain answers",)),
            "trained thinking, thinking answers": Row(
                "think", ("trained plain, plain answers", "trained thinking, plain answers"), "think"
            ),
        },
    ),
    "group": Question(
        "Group size at equal completions a step, and the weight of the KL",
        (*GROUNDING, *QA[::3]),
        {
            "G = 8, no KL": Row("grpo"),
            "G = 2": Row("group_2", ("G = 8, no KL",)),
            "G = 4": Row("group_4", ("G = 8, no KL",)),
            "G = 16": Row("group_16", ("G = 8, no KL",)),
            "KL 0.01": Row("beta_0.01", ("G = 8, no KL",)),
            "KL 0.04": Row("beta_0.04", ("G = 8, no KL",)),
        },
    ),
}


# ---- what is run -----------------------------------------------------------------------------------------------------
def chain(path: Path) -> list[str]:
    """A configuration after its parents, which first lines name, as paths from the repository's root."""
    path = path.resolve()
    head, _, parent = path.read_text().partition("\n")[0].partition("# parent: ")
    return [*(chain(path.parent / parent) if parent and not head else []), str(path.relative_to(REPO))]


def words_of(files: Sequence[str], overrides: Sequence[str], world: Path | None) -> list[str]:
    """A chain of configurations with overrides after it. With a `world`, it is read in place of tiny_world."""
    if world:
        kind = PROGRAMS[STARTS[Path(files[0]).name]]
        values = flat(dataclasses.asdict(config.load(kind, [str(REPO / file) for file in files], overrides)))
        of_world = {k: v for k, v in values.items() if isinstance(v, str) and v.startswith("tiny_world/")}
        overrides = [*overrides, *(f"{k}={world / Path(v).relative_to('tiny_world')}" for k, v in of_world.items())]
    return [*files, *overrides]


def words_of_run(root: Path, name: str, seed: int, world: Path | None) -> list[str]:
    arm = ARMS[name]
    overrides = [f"run.seed={seed}", "run.tracker=none"]
    if arm.start:
        overrides += [f"model.path={folder(root, arm.start, seed) / 'final'}"]
    if world:
        overrides += QUICK.get(name, ["run.steps=2"])
    if arm.extra:
        overrides += arm.extra(root, seed)
    return words_of(chain(CONFIGS / arm.config), overrides, world)


def words_of_test(root: Path, name: str, seed: int, test: str, answer: str, world: Path | None) -> list[str]:
    overrides = [f"run.seed={seed}", f"data.test=tiny_world/{TESTS[test]}.yaml"]
    overrides += [f"model.path={folder(root, name, seed) / 'final'}"]
    return words_of(chain(CONFIGS / ANSWERS[answer]), overrides, world)


def run_of_test(test: str, answer: str) -> str:
    """The name of a test's run folder, which is test_think or ood_think for thinking answers."""
    return test if answer == "plain" else f"{test}_{answer}"


def arms_of(questions: Sequence[str]) -> list[str]:
    """The arms of these questions and those they are made from, each once, in the order of ARMS."""
    found = {row.arm for question in questions for row in QUESTIONS[question].rows.values()}
    for name in reversed(ARMS):  # after those that are made from it
        if name in found:
            found |= {ARMS[name].start, *ARMS[name].needs}
    return [name for name in ARMS if name in found]


def jobs_of(questions: Sequence[str], of_seeds: Sequence[int], root: Path, world: Path | None = None) -> list[Job]:
    """The runs and tests of all arms, those that others need first."""
    found = []
    for name, seed in product(arms_of(questions), of_seeds):
        arm, own = ARMS[name], f"{name}/seed_{seed}"
        needs = tuple(f"{other}/seed_{seed}/run" for other in (arm.start, *arm.needs) if other)
        program = STARTS[Path(chain(CONFIGS / arm.config)[0]).name]
        words = partial(words_of_run, root, name, seed, world)
        found.append(Job(f"{own}/run", program, words, needs, QUICK_S if world else arm.seconds))
        for test, answer in product(TESTS, arm.answers):
            words = partial(words_of_test, root, name, seed, test, answer, world)
            seconds = QUICK_S if world else TEST_S
            found.append(Job(f"{own}/{run_of_test(test, answer)}", "eval.py run", words, (f"{own}/run",), seconds))
    return found


# ---- results ---------------------------------------------------------------------------------------------------------
def percent_of(root: Path, row: Row, seed: int) -> dict[str, Values] | None:
    """Percent by column and question; None where a test is not finished."""
    folders = {test: folder(root, row.arm, seed, run_of_test(test, row.answer)) for test in TESTS}
    if not all((path / "metrics.json").is_file() for path in folders.values()):
        return None
    results = {test: read_result(path) for test, path in folders.items()}
    return {column: results[test].percent(task, metric) for column, (test, task, metric, _) in COLUMNS.items()}


def training(root: Path, arm: str, seed: int) -> dict[str, float]:
    """What a GRPO run earned at its end and what it cost; {} for a run of another program."""
    rows = read_rows(folder(root, arm, seed) / "metrics.jsonl")
    if "reward/total" not in rows[0]:
        return {}
    chosen = arm in ("selected", "selected_tokens", "rejected")
    return {
        "steps": len(rows),
        "sampled_tokens": sum(row["tokens/completion"] for row in rows),
        "selection_tokens": selection_tokens(root, seed) if chosen else 0,
        "reward": fmean(row["reward/total"] for row in rows[-LAST:]),
        "length": fmean(row["length/mean"] for row in rows[-LAST:]),
    }


def summarise(question: Question, root: Path, of_seeds: Sequence[int]) -> dict[str, Any]:
    """The question's entry in results.json: its rows, as far as they are there."""
    found = {}
    for label, row in question.rows.items():
        by_seed = {seed: percent_of(root, row, seed) for seed in of_seeds}
        found[label] = {seed: values for seed, values in by_seed.items() if values}
    rows = {}
    for label, by_seed in found.items():
        if by_seed:
            row = question.rows[label]
            rows[label] = {"arm": row.arm, "answer": row.answer, "column": row.column}
            rows[label]["values"] = seeds.statistics(by_seed)
            against = [other for other in row.against if by_seed.keys() & found[other].keys()]
            rows[label]["minus"] = {other: seeds.differences(by_seed, found[other]) for other in against}
            rows[label]["training"] = {str(seed): training(root, row.arm, seed) for seed in by_seed}
    return {"title": question.title, "columns": list(question.columns), "rows": rows}


def load_results(path: str | Path) -> dict[str, Any]:
    """results.json of a folder: "seeds", "quick", "commits", and of every question "title", "columns" and "rows"."""
    return json.loads((Path(path) / "results.json").read_text())


def plot(question: str, results: dict[str, Any], ax: Axes, column: str = "") -> None:
    """A question's rows in one column (its first unless named): every seed, the mean and its 95% interval."""
    found = results["questions"][question]
    column = column or found["columns"][0]
    seeds.dots(found["rows"], column, ax)
    ax.set(xlabel=f"{COLUMNS[column][3]} (%)")


def draw(question: str, results: dict[str, Any]) -> Figure:
    """A question's rows in all its columns, side by side."""
    found = results["questions"][question]
    size = (2.5 + 2.6 * len(found["columns"]), 1.6 + 0.42 * len(found["rows"]))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(found["columns"]), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, found["columns"]):
        plot(question, results, ax, column)
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))
    figure.legend(handles.values(), handles, loc="outside lower right", ncols=3, fontsize="small")
    return titled(figure, found["title"], results)


def draw_differences(results: dict[str, Any]) -> Figure:
    """All questions' paired differences on one scale, in the first column of each or the one that a row is about."""
    nums = {name: sum(len(r["minus"]) for r in q["rows"].values()) for name, q in results["questions"].items()}
    nums = {name: num for name, num in nums.items() if num}
    figure = Figure(figsize=(10, 1 + 0.4 * len(nums) + 0.22 * sum(nums.values())), layout="constrained")
    ratios = list(nums.values())
    axes = figure.subplots(len(nums), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0] if nums else ()
    for ax, name in zip(axes, nums):
        found = results["questions"][name]
        seeds.forest(found["rows"], found["columns"][0], ax)
        title = f"{found['title']} (points of {found['columns'][0]})"
        ax.set_title(title, loc="right", fontsize="small", fontweight="bold")
    title = "Paired differences, 95% intervals (coloured: without 0; dot: a seed)"
    return titled(figure, title, results)


def titled(figure: Figure, title: str, results: dict[str, Any]) -> Figure:
    note = "  (--quick: these numbers say nothing)" if results["quick"] else ""
    figure.suptitle(f"{title}: seeds {', '.join(map(str, results['seeds']))}{note}", fontsize="medium")
    return figure


def lines_of(question: dict[str, Any]) -> list[str]:
    """What is printed of a question: its table, and what its trainings cost."""
    lines = [f"\n## {question['title']}\n", *seeds.table(question["rows"], question["columns"]), ""]
    for label, row in question["rows"].items():
        runs = [run for run in row["training"].values() if run]
        if runs and row["answer"] == "plain":
            mean = {key: fmean(run[key] for run in runs) for key in runs[0]}
            extra = f" and {mean['selection_tokens'] / 1000:.0f}k for the selection" if mean["selection_tokens"] else ""
            lines.append(
                f"* {label}: {mean['steps']:.0f} steps, {mean['sampled_tokens'] / 1000:.0f}k tokens sampled{extra}, "
                f"reward {mean['reward']:.3f} and {mean['length']:.1f} tokens an answer at the end"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2 unless given, 0 with --quick")
    parser.add_argument("--dir", type=Path, help="runs/ablations unless given, runs/ablations_quick with --quick")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, on one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in a smaller world")
    args = parser.parse_args(argv)
    of_seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    root = (args.dir or Path("runs/ablations_quick" if args.quick else "runs/ablations")).resolve()
    world = root / "world" if args.quick else None
    tiny.main(["--out", str(world or REPO / "tiny_world"), "--size", "small" if args.quick else "full"])
    jobs = jobs_of(args.questions, of_seeds, root, world)
    try:
        todo = unfinished(jobs, root)
        minutes = sum(job.seconds for job in todo) / args.jobs / 60
        print(f"{len(todo)} of {len(jobs)} runs to do in {root}: about {minutes:.0f} minutes on {args.jobs} cores")
        failed = run_all(jobs, root, args.jobs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with what is not finished") from None
    commits = {str(json.loads(path.read_text())["commit"]) for path in root.glob("*/seed_*/run/env.json")}
    results = {"seeds": of_seeds, "quick": args.quick, "commits": sorted(commits)}
    results["questions"] = {name: summarise(QUESTIONS[name], root, of_seeds) for name in args.questions}
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name in args.questions:
        if results["questions"][name]["rows"]:
            draw(name, results).savefig(root / f"{name}.png", dpi=120)
            print("\n".join(lines_of(results["questions"][name])))
    draw_differences(results).savefig(root / "differences.png", dpi=120)
    print(f"\nresults.json and the figures are in {root}")
    if args.quick:
        print("--quick: every step was taken, and the numbers say nothing")
    if failed:
        raise SystemExit(f"\n{report(failed)}\n\n{len(unfinished(jobs, root))} of {len(jobs)} runs are not finished")


if __name__ == "__main__":
    main()
