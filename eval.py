"""Evaluation: a model's greedy answers, and metrics with bootstrap intervals from stored ones.

It trains nothing and computes no reward.

    python eval.py run --config configs/tiny_eval.yaml model.path=runs/grpo/final
    python eval.py score predictions.jsonl --out metrics.json [--answer tagged_or_text]
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

import config
from config import EvalConfig, EvalRunConfig
from data import read_samples
from loader import make_workers, read_ahead
from policy import Policy, load_policy, save_model
from prompts import Prompt, PromptBuilder, make_builder
from records import Sample
from rewards import Segment, choice_from, final_text, parse_answer, segments_from, temporal_iop, temporal_iou
from rollout import generate
from run import Run, environment, user_errors
from video import VideoError
from workers import Workers

ANSWER_MODES = ("tagged", "tagged_or_text")
MAIN_METRIC = {"tvg": "miou", "mcqa": "accuracy", "gqa": "acc_gqa"}
NUM_RESAMPLES = 1000
_CHUNK = 100  # resamples drawn at once: bounds the memory to 100 x n counts


def predict(
    policy: Policy,
    samples: Sequence[Sample],
    builder: PromptBuilder,
    workers: Workers,
    cfg: EvalConfig,
    progress=iter,
) -> list[dict]:
    """Greedy answers of the (unwrapped) policy as prediction rows, in the order of the samples.

    A row has `video_tokens` and `frames_cut`; or, where the video cannot be read, no answer and an `error`.
    """
    rows: list[dict] = []
    loaded = read_ahead(samples, builder, workers, cfg.batch_size + 2 * workers.num)
    for start in progress(range(0, len(samples), cfg.batch_size)):
        some = samples[start : start + cfg.batch_size]
        results = list(islice(loaded, len(some)))
        prompts = [result for result in results if isinstance(result, Prompt)]
        texts = iter(answers(policy, prompts, cfg) if prompts else ())
        for sample, result in zip(some, results, strict=True):
            if isinstance(result, VideoError):
                rows.append(prediction(sample, "", cfg.answer) | {"error": str(result)})
            else:
                used = {"video_tokens": result.video.num_tokens, "frames_cut": result.video.frames_cut}
                rows.append(prediction(sample, next(texts), cfg.answer) | used)
    return rows


def answers(policy: Policy, prompts: list[Prompt], cfg: EvalConfig) -> list[str]:
    """One greedy response to each prompt."""
    embeds = policy.embed_each(prompts)
    return generate(policy, prompts, embeds, 1, cfg.max_new_tokens, cfg.batch_size, seed=None).texts


def prediction(sample: Sample, response: str, answer: str) -> dict[str, Any]:
    """One line of predictions.jsonl: the raw response, what is parsed from it, and the record's truth."""
    text = answer_of(response, answer) or ""
    row = {"id": sample.id, "task": sample.task, "response": response}
    row |= {"pred_choice": choice_from(text, sample.options) if sample.options else None}
    row |= {"pred_segments": segments_from(text) if sample.segments else []}
    row |= {"options": sample.options, "answer": sample.answer, "segments": sample.segments}
    return row | {"duration": sample.duration} | ({"type": sample.type} if sample.type else {})


class Validator:
    """Metrics on the validation samples every `eval.every` steps; the model with the best mean of them is kept.

    The mean is over tasks, of `MAIN_METRIC`. `state` survives a resume.
    """

    def __init__(self, cfg, builder: PromptBuilder, workers: Workers, run: Run):
        self.cfg, self.builder, self.workers, self.run = cfg, builder, workers, run
        self.state = {"best": run.state.get("best", -1.0)}
        self.samples = []
        if cfg.data.validation and cfg.eval.every:
            self.samples = read_samples(cfg.data.validation, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        if cfg.eval.num_samples:
            self.samples = self.samples[: cfg.eval.num_samples]

    def __call__(self, step: int, policy: Policy) -> dict[str, float]:
        """`validation/<task>/<metric>` when it is time after `step` steps, else nothing."""
        if not self.samples or step % self.cfg.eval.every:
            return {}
        accelerator = self.run.accelerator
        mine = self.samples[accelerator.process_index :: accelerator.num_processes]
        rows = gather_object(predict(policy, mine, self.builder, self.workers, self.cfg.eval))
        tasks = score_predictions(rows, self.cfg.eval.answer)["tasks"]
        score = sum(tasks[task][MAIN_METRIC[task]] for task in tasks) / len(tasks)
        if score > self.state["best"]:
            self.state["best"] = score
            if self.run.is_main:
                save_model(policy, self.run.dir / "best", self.cfg.model.path)
        named = {
            f"validation/{task}/{name}": v for task in tasks for name, v in tasks[task].items() if isinstance(v, float)
        }
        return named | {"validation/score": score, "validation/num_unreadable": float(sum("error" in r for r in rows))}


def answer_of(response: str, answer: str = "tagged") -> str | None:
    """The answer in a raw response: the last answer block, or None.

    With `tagged_or_text`, the text after the last think block counts when there is no block.
    """
    tagged = parse_answer(response)
    return final_text(response) if tagged is None and answer == "tagged_or_text" else tagged


def sample_values(row: Mapping[str, Any], answer: str = "tagged") -> dict[str, float]:
    """One prediction row's value, from 0 to 1, of every metric of its task (a metric is 100 x their mean).

    The row has `task`, the truth (`answer`, `segments` in seconds) and either `response` (raw text; `options`
    then help to parse it) or `pred_choice` / `pred_segments` (null / []: a parse failure, counted as wrong).
    Grounding follows the official scripts: the first predicted segment, not clipped, against the best true
    one, for IoU and IoP separately; `*_set` compares unions. Raises ValueError naming the key that is missing
    or bad.
    """
    task = _get(row, "task")
    if task == "mcqa":
        choice = _choice(row, answer)
        return {"accuracy": float(choice == _true_choice(row)), "parse_fail": float(choice is None)}
    if task not in ("tvg", "gqa"):
        raise ValueError(f"key 'task': {task!r} is none of tvg, mcqa, gqa")
    pred, truth = _segments(row, answer), _spans(row, "segments")
    if not truth:
        raise ValueError("key 'segments': expected at least one [start, end] with finite start <= end")
    iou, iop = (max(f(pred[:1], [true]) for true in truth) for f in (temporal_iou, temporal_iop))
    values = {"miou": iou, "miou_set": temporal_iou(pred, truth)}
    if task == "tvg":
        return values | _at_least("r1", iou, (0.3, 0.5, 0.7)) | {"parse_fail": float(not pred)}
    choice = _choice(row, answer)
    right = choice == _true_choice(row)
    values |= {"accuracy": float(right), "acc_gqa": float(right and iop >= 0.5)}
    values |= {"miop": iop, "miop_set": temporal_iop(pred, truth)}
    values |= _at_least("iop", iop, (0.3, 0.5)) | _at_least("iou", iou, (0.3, 0.5))
    return values | {"parse_fail": float(choice is None or not pred)}


def score_predictions(rows: Sequence[Mapping[str, Any]], answer: str = "tagged", seed: int = 0) -> dict[str, Any]:
    """The metrics of prediction rows: {"tasks": {task: metrics}, "types": {task: {type: metrics}}, "videos": {...}}.

    Metrics are `n` (rows), `num_unreadable` (those with an `error`, counted as wrong) and percentages from 0 to 100,
    each with its 95% interval beside it (`miou_ci95`). `types` holds the rows that have a `type`; `videos` the tokens
    that videos really took, and the frames that the token budget cost them. Raises ValueError naming row and key.
    """
    if answer not in ANSWER_MODES:
        raise ValueError(f"answer: {answer!r} is none of {', '.join(ANSWER_MODES)}")
    values: dict[str, list[dict[str, float]]] = {}
    unreadable: Counter[str] = Counter()
    typed: dict[str, dict[str, list[dict[str, float]]]] = {}
    seen: set[Any] = set()
    for number, row in enumerate(rows, 1):
        try:
            row_id, value = _new_id(row, seen), sample_values(row, answer)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        seen.add(row_id)
        values.setdefault(row["task"], []).append(value)
        unreadable[row["task"]] += "error" in row
        if row.get("type") is not None:
            typed.setdefault(row["task"], {}).setdefault(str(row["type"]), []).append(value)
    types = {task: {name: _metrics(group, seed) for name, group in by.items()} for task, by in typed.items()}
    tasks = {task: {"num_unreadable": unreadable[task]} | _metrics(group, seed) for task, group in values.items()}
    return {"tasks": tasks, "types": types, "videos": _video_use(rows)}


def _video_use(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    used = [(row.get("video_tokens"), row.get("frames_cut")) for row in rows]
    used = [pair for pair in used if all(isinstance(number, int) for number in pair)]
    if not used:
        return {}
    tokens, cut = np.mean(used, axis=0)
    return {"tokens_mean": float(tokens), "tokens_max": max(used)[0], "frames_cut_mean": float(cut)}


def bootstrap_interval(values_NM: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap 95% interval of the mean of each of M columns over N samples: (low, high), (M,) each.

    The same resamples serve all columns.
    """
    num_rows, rng = len(values_NM), np.random.default_rng(seed)
    share = np.full(num_rows, 1 / num_rows)
    sums = [rng.multinomial(num_rows, share, size=_CHUNK) @ values_NM for _ in range(NUM_RESAMPLES // _CHUNK)]
    low, high = np.percentile(np.concatenate(sums) / num_rows, (2.5, 97.5), axis=0)
    return low, high


def paired_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of b - a over the same samples in the same order, and its bootstrap 95% interval: mean, low, high.

    In the unit of the values. Raises ValueError when the lengths differ or are 0.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired values need the same samples on both sides, got {len(a)} and {len(b)}")
    difference_N1 = np.subtract(b, a, dtype=float)[:, None]
    low, high = bootstrap_interval(difference_N1, seed)
    return float(difference_N1.mean()), float(low[0]), float(high[0])


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. Raises ValueError naming the row (from 1) that is no JSON object."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append({**json.loads(line)})
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"row {number}: not a JSON object ({error})") from error
    if not rows:
        raise ValueError("no rows")
    return rows


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON; non-finite numbers are a ValueError."""
    Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _get(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"key {key!r}: missing")
    return row[key]


def _new_id(row: Mapping[str, Any], seen: set[Any]) -> str | int:
    row_id = _get(row, "id")
    if not isinstance(row_id, str | int) or row_id in seen:
        raise ValueError(f"key 'id': {row_id!r} is repeated, or neither a string nor an integer")
    return row_id


def _response(row: Mapping[str, Any], answer: str) -> str | None:
    """The answer's text, "" when the response has none, None when the row has no response."""
    response = row.get("response")
    if response is not None and not isinstance(response, str):
        raise ValueError("key 'response': expected a string")
    return None if response is None else answer_of(response, answer) or ""


def _true_choice(row: Mapping[str, Any]) -> str:
    letter = _get(row, "answer")
    if not (isinstance(letter, str) and len(letter) == 1 and "A" <= letter <= "Z"):
        raise ValueError(f"key 'answer': {letter!r} is no upper-case option letter")
    return letter


def _choice(row: Mapping[str, Any], answer: str) -> str | None:
    text = _response(row, answer)
    choice = _get(row, "pred_choice") if text is None else choice_from(text, row.get("options"))
    if choice is not None and not isinstance(choice, str):
        raise ValueError("key 'pred_choice': expected an option letter or null")
    return choice or None


def _segments(row: Mapping[str, Any], answer: str) -> list[Segment]:
    text = _response(row, answer)
    return _spans(row, "pred_segments") if text is None else segments_from(text)


def _spans(row: Mapping[str, Any], key: str) -> list[Segment]:
    """Spans stored in a row; [] when one is reversed or not finite, as in a parsed answer."""
    try:
        spans = [(float(start), float(end)) for start, end in _get(row, key) or ()]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"key {key!r}: expected a list of [start, end] in seconds") from error
    return spans if all(-math.inf < start <= end < math.inf for start, end in spans) else []


def _at_least(name: str, value: float, thresholds: Sequence[float]) -> dict[str, float]:
    return {f"{name}@{threshold}": float(value >= threshold) for threshold in thresholds}


def _metrics(values: list[dict[str, float]], seed: int) -> dict[str, Any]:
    names = list(values[0])
    percent_NM = 100 * np.array([[value[name] for name in names] for value in values])
    low, high = bootstrap_interval(percent_NM, seed)
    metrics: dict[str, Any] = {"n": len(values)}
    for index, name in enumerate(names):
        metrics[name] = float(percent_NM[:, index].mean())
        metrics[f"{name}_ci95"] = [float(low[index]), float(high[index])]
    return metrics


def evaluate(cfg: EvalRunConfig) -> dict[str, Any]:
    """Answer every test sample; writes predictions.jsonl and metrics.json into `run.dir`, returns the metrics."""
    with user_errors():
        run = Run(cfg.run.dir, config.to_yaml(cfg), cfg.run.seed, "none", resume=False, keep=1)
        samples = read_samples(cfg.data.test, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        policy = load_policy(cfg.model).to(run.accelerator.device)
        builder = make_builder(cfg, policy.tokenizer)
    accelerator = run.accelerator
    mine = samples[accelerator.process_index :: accelerator.num_processes]
    bar = functools.partial(tqdm, desc="eval", unit="batch", disable=not run.is_main)
    with make_workers(builder, cfg.data) as workers:
        rows = gather_object(predict(policy, mine, builder, workers, cfg.eval, bar))
    metrics = {"spec": specification(cfg)} | score_predictions(rows, cfg.eval.answer)
    if run.is_main:
        lines = [json.dumps(row, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["id"])]
        (run.dir / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(run.dir / "metrics.json", metrics)
        _print_metrics(metrics)
    run.finish()
    return metrics


def specification(cfg: EvalRunConfig) -> dict[str, Any]:
    """What must be equal for two results to be comparable, and where this one comes from."""
    prompt = dataclasses.asdict(cfg.prompt)
    env = environment()
    return {
        "model": cfg.model.path,
        "test": cfg.data.test,
        "manifest": cfg.data.manifest,
        "video": dataclasses.asdict(cfg.video),
        "prompt_hash": hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:12],
        "max_new_tokens": cfg.eval.max_new_tokens,
        "answer": cfg.eval.answer,
        "packages": env["packages"],
        "commit": env["commit"],
    }


def _print_metrics(metrics: dict[str, Any]) -> None:
    for task, values in metrics["tasks"].items():
        num_failed, num_unreadable = round(values["n"] * values["parse_fail"] / 100), values["num_unreadable"]
        shown = " ".join(f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float) and k != "parse_fail")
        unreadable = f", {num_unreadable} of them for want of a readable video" if num_unreadable else ""
        print(f"{task}: n {values['n']} {shown}; {num_failed} without a usable answer{unreadable}, counted as wrong")


def _run_command(args: argparse.Namespace) -> None:
    with user_errors():
        cfg = config.load(EvalRunConfig, *config.split_overrides(args.config + args.overrides))
    evaluate(cfg)


def _score_command(args: argparse.Namespace) -> None:
    try:
        metrics = score_predictions(read_rows(args.predictions), args.answer)
        write_json(args.out, {"spec": {"answer": args.answer}, **metrics})
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise SystemExit(f"{args.predictions}: {error}") from error
    _print_metrics(metrics)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; bad input ends with one line naming the file, the row and the key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="answers of a model, and their metrics")
    command.add_argument("--config", nargs="+", default=[], metavar="FILE", help="later files win")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(call=_run_command)
    command = commands.add_parser("score", help="metrics from stored predictions, without a model")
    command.add_argument("predictions", help="predictions.jsonl")
    command.add_argument("--out", required=True, help="metrics.json to write")
    command.add_argument("--answer", choices=ANSWER_MODES, default="tagged", help="what counts as the answer")
    command.set_defaults(call=_score_command)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    main()
