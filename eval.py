"""Evaluation: a model's answers (run), their metrics (score), and results side by side (compare).

The metrics are in metrics/tasks.py, the comparison is in metrics/compare.py.

    python eval.py run --config configs/tiny_eval.yaml model.path=runs/grpo/final run.dir=runs/grpo_eval [--resume]
    python eval.py score predictions.jsonl --out metrics.json [--data test.jsonl] [--answer tagged_or_text]
    python eval.py compare runs/base_eval/metrics.json runs/grpo_eval/metrics.json [--allow prompt]
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.arguments import of_eval, user_errors

if __name__ == "__main__":  # here, so that a misspelt key is told before torch is imported, which takes seconds
    of_eval(None, __doc__)

import numpy as np
from tqdm import tqdm

import config
from config import EvalRunConfig
from data import PromptReader, check_readable, make_reader
from metrics.blind import floor_line, floor_of, swap_clips
from metrics.compare import compare, read_predictions, specification
from metrics.predictions import predict
from metrics.rows import truth_hash, truth_of
from metrics.tasks import check_modes, sample_values, score_predictions
from policy import Policy, load_policy
from preflight.selfcheck import check_model, check_ranks
from records import jsonl
from records.files import read_samples
from records.record import Sample
from records.tasks import TASKS
from runtime.checkpoint import write_text
from runtime.environment import code_hash
from runtime.resumable import DoneBatches, cut, remove_lines
from runtime.run import Run
from runtime.signals import interruptible


# ---- run -------------------------------------------------------------------------------------------------------------
def evaluate(cfg: EvalRunConfig, resume: bool = False) -> dict[str, Any]:
    """Answer every test sample; writes predictions.jsonl and metrics.json into `run.dir`, returns the metrics.

    With `eval.blind` every question is also asked of another clip: predictions_blind.jsonl, `blind` of the metrics.
    With `resume`, a run that was stopped goes on, and leaves what it would have left.
    """
    with user_errors():
        run = Run(cfg.run, config.to_yaml(cfg), resume, checkpoints=False)
        if (run.dir / "metrics.json").is_file():
            if run.is_main:
                print(f"{run.dir} is finished:")
            return _finish(run, json.loads((run.dir / "metrics.json").read_text(encoding="utf-8")))
        samples = read_samples(cfg.data.test, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        own = {sample.id: sample for sample in samples}  # whose truth a row of another clip has too
        asked = {"": (samples, truth_of)}  # by the end of the files' names
        if cfg.eval.blind:
            asked["_blind"] = (swap_clips(samples), lambda s: truth_of(own[s.id]) | {"shown": Path(s.video).name})
        floor = _floor(cfg, samples, run)
        policy = load_policy(cfg.model, cfg.eval.temperature or 1.0).to(run.engine.device)
        check_ranks(policy, samples, cfg, run)
        by = {"weights": policy.fingerprint(), "code_hash": code_hash()}
        answered = {
            end: DoneBatches(run, f"answers{end}", cut(shown, cfg.eval.batch_size), head, by)
            for end, (shown, head) in asked.items()
        }
        reader = make_reader(cfg, policy.tokenizer, policy.device)
    with run.engine.phase("answers"):
        for part in answered.values():
            _answer_all(part, policy, reader, cfg, run)
    rows = {end: batches.gather() for end, batches in answered.items()}
    env = json.loads((run.dir / "env.json").read_text(encoding="utf-8"))
    spec = specification(cfg, policy.tokenizer) | by | {"packages": env["packages"], "commit": env["commit"]}
    metrics = {"spec": spec | {"num_samples": len(samples), "data_hash": truth_hash(rows[""])}}
    scored = {
        end: {"predictions": f"predictions{end}.jsonl"} | score_predictions(of, cfg.eval.answer, cfg.eval.unanswered)
        for end, of in rows.items()
    }
    metrics |= scored[""] | {"floor": floor} | ({"blind": scored["_blind"]} if cfg.eval.blind else {})
    if run.is_main:
        for end, of in rows.items():
            jsonl.write(run.dir / f"predictions{end}.jsonl", of)
        write_text(run.dir / "metrics.json", as_json(metrics))
    return _finish(run, metrics)


def _floor(cfg: EvalRunConfig, samples: Sequence[Sample], run: Run) -> dict[str, dict]:
    """The best constant answers of the training set. A line says which tasks have none."""
    data = cfg.data.floor
    floor = floor_of(data, samples, cfg.data.out_of_clip, cfg.run.seed) if data else {}
    missing = sorted({sample.task for sample in samples} - floor.keys())
    if missing and run.is_main:
        reason = f"{data} has no record of it" if data else "data.floor names no training set"
        print(f"no floor of {', '.join(missing)}: {reason}")
    return floor


def _answer_all(answered: DoneBatches, policy: Policy, reader: PromptReader, cfg: EvalRunConfig, run: Run) -> None:
    """What is left to do, shared among the processes; the bar shows the mean so far of this one's answers."""
    mine = answered.mine
    seed = cfg.run.seed if cfg.eval.temperature else None
    scores: dict[str, list[float]] = {}
    bad, samples = [], [sample for batch in answered.batches for sample in batch]
    with reader.workers:
        if answered.todo:
            with user_errors():
                check_model(policy, None, samples, reader, cfg, run)
        batches = [answered.batches[number] for number in mine]
        predicted = predict(policy, batches, reader, cfg.eval, cfg.eval.num_answers, seed)
        bar = tqdm(predicted, total=len(mine), desc=answered.name, unit="batch", disable=not run.is_main)
        for number, rows in zip(mine, bar, strict=True):
            rows = [row | answered.head(sample) for row, sample in zip(rows, answered.batches[number], strict=True)]
            with user_errors():
                answered.add(number, rows)
            bad += [row for row in rows if "error" in row]
            check_readable(bad, len(bad), len(samples), cfg.data.max_bad_share)
            for row in rows:
                name = TASKS[row["task"]].main_metric
                value = sample_values(row, cfg.eval.answer)[name]
                scores.setdefault(f"{row['task']}/{name}", []).append(100 * value)
            bar.set_postfix({name: f"{np.mean(values):.1f}" for name, values in scores.items()})


def _finish(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    for name in ("answers", "answers_blind"):
        remove_lines(run, name)
    if run.is_main:
        print_metrics(metrics)
    run.finish()
    return metrics


# ---- score -----------------------------------------------------------------------------------------------------------
def score(args: argparse.Namespace) -> None:
    """Metrics of stored predictions, with the specification of the run that made them, where it is known."""
    predictions, out = Path(args.predictions), Path(args.out)
    try:
        spec = _spec_beside(predictions)
        spec |= {"answer": args.answer or spec.get("answer", "tagged")}
        spec |= {"unanswered": args.unanswered or spec.get("unanswered", "wrong")}
        rows = read_predictions(predictions, args.data)
        metrics = {"predictions": os.path.relpath(predictions, out.parent)}
        metrics |= {"data": os.path.relpath(args.data, out.parent)} if args.data else {}
        metrics |= score_predictions(rows, spec["answer"], spec["unanswered"])
        spec |= {"num_samples": len(rows), "data_hash": truth_hash(rows)}
        write_text(out, as_json({"spec": spec} | metrics))
    except OSError as error:
        raise SystemExit(f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}") from None
    except ValueError as error:
        raise SystemExit(f"error: {predictions}: {error}") from None
    print_metrics(metrics)


def _spec_beside(predictions: Path) -> dict[str, Any]:
    """The specification that `eval.py run` left beside these predictions; {} where they are not its own.

    The one of blind predictions has the key `blind`, so that nobody compares them with others by mistake.
    """
    path = predictions.parent / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_blind = "blind" in content and content["blind"]["predictions"] == predictions.name
        if (not is_blind and content["predictions"] != predictions.name) or not isinstance(content["spec"], dict):
            return {}
        check_modes(content["spec"]["answer"], content["spec"]["unanswered"])
    except (OSError, ValueError, TypeError, LookupError):
        return {}
    return content["spec"] | ({"blind": True} if is_blind else {})


# ---- all commands ----------------------------------------------------------------------------------------------------
def as_json(content: Any) -> str:
    """Indented JSON; non-finite numbers are a ValueError."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def print_metrics(metrics: dict[str, Any]) -> None:
    for task, values in metrics["tasks"].items():
        shown = " ".join(f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float) and k != "parse_fail")
        notes = {"with an unreadable video": values["num_unreadable"], "with no prediction": values["num_missing"]}
        notes["without a usable answer counted as wrong"] = round(values["n"] * values.get("parse_fail", 0) / 100)
        notes["without any answer left out"] = values["num_skipped"]
        noted = "".join(f"; {num} {what}" for what, num in notes.items() if num)
        print(f"{task}: n {values['n']} {shown}{noted}")
    for task, values in metrics.get("floor", {}).items():
        print(floor_line(task, values))
    if "blind" in metrics:
        print("with the clip of another video:")
        print_metrics(metrics["blind"])


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; bad input ends with one line naming the file, the row and the key."""
    args = of_eval(argv, __doc__)
    if args.command == "run":
        with interruptible():
            evaluate(args.cfg, args.resume)
    elif args.command == "score":
        score(args)
    else:
        with user_errors():
            print("\n".join(compare(args.results, args.allow)))


if __name__ == "__main__":
    main()
