"""Data selection: K responses to every item, the statistics of their rewards, and the items that a rule keeps.

    python select_data.py --config configs/tiny_select.yaml
    python select_data.py --config configs/tiny_select.yaml select.rule=top_variance select.budget=500   # at once
    accelerate launch --config_file configs/accelerate/ddp.yaml select_data.py --config configs/tiny_select.yaml
    python train_grpo.py --config configs/tiny.yaml data.train=runs/tiny_select/selected.jsonl

The rules are in selection/rules.py. K is rollout.group_size. Into run.dir it writes

    scores.jsonl      one row per item: rewards (the task's own, without the format) and their mean, std and best; the
                      parts of each; parse_fail, truncated, sampled_tokens, prompt_tokens; or the error of its video
    selected.jsonl    the records kept, videos as absolute paths, extra.reward_mean, reward_std and reward_best added
    rejected.jsonl    the others, each with its reason
    histogram.png, summary.json

The same command goes on where it was killed. Once scores.jsonl is there, it applies the rule and samples nothing. Then
any key of the section select may be changed, and a change of another one, or of the model's weights, is an error.
select.scores names other scores, which need neither model nor videos: a scores.jsonl of the same model, video, prompt,
rollout and rewards, but for the keys in select.allow, or a file of rows with `id` and `rewards`, or with `id` and
`extra.difficulty` (a reward in percent, as Time-R1 publishes).
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import SelectConfig
from runtime.arguments import from_command_line, user_errors

if __name__ == "__main__":  # here, so that a misspelt key is told before torch is imported, which takes seconds
    from_command_line(SelectConfig, None, __doc__, "configs/tiny_select.yaml")

import yaml
from tqdm import tqdm

import config
from data import NUM_LISTED, check_readable, make_reader
from metrics.predictions import answer_batches
from model.folder import weights_hash
from policy import Policy, load_policy
from preflight.selfcheck import check_model, check_ranks
from prompts import Prompt
from records import jsonl
from records.files import read_samples
from records.record import Sample, to_record
from reward_functions import RewardFunction, failures_in, load_functions, score_all
from rewards import parses, task_reward
from rollout import generate
from runtime.checkpoint import write_text
from runtime.environment import code_hash, environment
from runtime.resumable import DoneBatches, cut, remove_lines
from runtime.run import MAY_CHANGE, UNUSED, Run, config_differences
from runtime.signals import interruptible
from selection.rules import Item, check_kept, choose, counts_by_stratum, plot, reason, table
from selection.scores import SCORES, head_of, origin, read_scores

STEP = -1  # of the seeds: no step of training, whose first would draw the very same responses


class SelectRun(Run):
    """A run folder that is opened again: with nothing but the section select changed."""

    def _open(self, config_yaml: str, resume: bool) -> None:
        path = self.dir / "config.yaml"
        used = self.dir.exists() and {e.name for e in self.dir.iterdir() if e.suffix != ".tmp"} - UNUSED
        if path.is_file() and used:
            differing = config_differences(path, config_yaml)
            free = MAY_CHANGE | {"run.dir"}
            differing = {k: v for k, v in differing.items() if k not in free and not k.startswith("select.")}
            if differing:
                raise ValueError(
                    f"{path} differs in {', '.join(differing.values())}: give another run.dir (there select.scores="
                    f"{self.dir / SCORES} takes the scores of this one)"
                )
        elif used:
            raise FileExistsError(f"run.dir {self.dir} exists and is not of a selection; give another run.dir")
        self._lock()
        write_text(path, config_yaml)
        if not any(self.dir.glob("scores*.jsonl")):
            made_with = environment() | {"weights": weights_hash(yaml.safe_load(config_yaml)["model"]["path"])}
            write_text(self.dir / "env.json", json.dumps(made_with, indent=2) + "\n")


def score_prompts(
    policy: Policy, prompts: Sequence[Prompt], functions: Sequence[RewardFunction], cfg: SelectConfig
) -> list[dict[str, Any]]:
    """K responses to each prompt, over one prefill, and what is written of them."""
    size = cfg.rollout.group_size
    rollout = generate(policy, prompts, policy.embed_each(prompts), cfg.rollout, cfg.run.seed, STEP)
    samples = [prompt.sample for prompt in prompts for _ in range(size)]
    ids = [tokens for group in rollout.completions for tokens in group]
    scored = score_all(rollout.texts, samples, cfg, functions, ids)
    rows = []
    for p, prompt in enumerate(prompts):
        group = slice(p * size, (p + 1) * size)
        task, parts = prompt.sample.task, [reward.parts for reward in scored[group]]
        names = dict.fromkeys(name for part in parts for name in part)
        rewards = [task_reward(task, part) for part in parts]
        row = {"rewards": rewards} | Item(prompt.sample.id, task, "", tuple(rewards)).statistics()
        row["parts"] = {name: [part.get(name) for part in parts] for name in names}
        row["parse_fail"] = sum(not parses(text, prompt.sample) for text in rollout.texts[group])
        row["truncated"] = int(rollout.truncated_B[group].sum()) / size
        row["sampled_tokens"] = int(rollout.mask_BT[group].sum())
        rows.append(row | {"prompt_tokens": len(prompt.ids)})
    return rows


def sample_scores(samples: Sequence[Sample], cfg: SelectConfig, run: Run) -> None:
    """Score what is not scored yet; leaves scores.jsonl."""
    with user_errors():
        functions = load_functions(cfg.rewards.functions)
        policy = load_policy(cfg.model, cfg.rollout.temperature).to(run.engine.device)
        check_ranks(policy, samples, cfg, run)
        by = {"weights": policy.fingerprint(), "code_hash": code_hash()}
        scores = DoneBatches(run, "scores", cut(samples, cfg.rollout.micro_batch_size), head_of, by)
        reader = make_reader(cfg, policy.tokenizer, policy.device)
    bad: list[dict] = []
    shares: Counter[str] = Counter()
    with reader.workers, run.engine.phase("scores"), failures_in(run.dir):
        with user_errors():
            check_model(policy, None, samples, reader, cfg, run)
        mine = scores.mine
        batches = [scores.batches[number] for number in mine]
        scored = answer_batches(
            lambda prompts: score_prompts(policy, prompts, functions, cfg),
            batches,
            reader,
            cfg.rollout.micro_batch_size,
        )
        bar = tqdm(scored, "select", len(mine), unit="batch", disable=not run.is_main)
        for number, found in zip(mine, bar, strict=True):
            rows = [head_of(sample) | row for sample, row in zip(scores.batches[number], found, strict=True)]
            with user_errors():
                scores.add(number, rows)
            bad += [row for row in rows if "error" in row]
            shares.update(reason(Item.of(row), cfg.select) or "passed" for row in rows)
            told = " ".join(f"{name} {num / shares.total():.0%}" for name, num in shares.most_common())
            bar.set_postfix_str(told, refresh=False)
            check_readable(bad, len(bad), len(samples), cfg.data.max_bad_share)
    rows = scores.gather()
    bad = [row for row in rows if "error" in row]
    check_readable(bad, len(bad), len(rows), cfg.data.max_bad_share)
    with user_errors():
        run.engine.raise_together(lambda: jsonl.write(run.dir / SCORES, rows))


def apply_rule(samples: Sequence[Sample], path: Path, cfg: SelectConfig, folder: Path) -> None:
    """Apply the rule to the scores in `path`; writes everything else into the folder and prints the table."""
    spec, rows = origin(path, config.to_yaml(cfg), cfg.select.allow), read_scores(path, samples)
    items = [Item.of(row) for row in rows]
    reasons = choose(items, cfg.select)
    for name in ("selected.jsonl", "rejected.jsonl", "summary.json", "histogram.png"):
        (folder / name).unlink(missing_ok=True)  # of another rule
    counts = counts_by_stratum(items, reasons)
    print("\n".join(table(counts)))
    for item in [item for item in items if item.error][:NUM_LISTED]:
        print(f"unreadable: {item.id}: {item.error}")
    selected, rejected = [], []
    for sample, item, why in zip(samples, items, reasons):
        result = {"error": item.error} if item.error else item.statistics()
        if why:
            rejected.append({"id": item.id, "task": item.task, "source": item.source, "reason": why} | result)
        else:
            extra = {f"reward_{name}": value for name, value in result.items()}
            selected.append(to_record(sample) | {"extra": (sample.extra or {}) | extra})
    jsonl.write(folder / "rejected.jsonl", rejected)
    plot(items, reasons, cfg.select, folder / "histogram.png")
    check_kept(reasons, cfg.select)
    jsonl.write(folder / "selected.jsonl", selected)
    summary = {"select": dataclasses.asdict(cfg.select), "scores": cfg.select.scores or SCORES, "spec": spec}
    summary |= {"counts": counts, "responses": responses(rows)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    seen = f"{folder / 'selected.jsonl'}; see rejected.jsonl and histogram.png"
    print(f"{len(selected)} of {len(items)} items kept: {seen}")


def responses(rows: Sequence[dict]) -> dict[str, float]:
    """What sampling cost and what became of the responses; only their number where the scores are from elsewhere."""
    num = sum(len(row.get("rewards", ())) for row in rows)
    keys = ("truncated", "parse_fail", "sampled_tokens", "prompt_tokens")
    sampled = [row for row in rows if row.keys() >= set(keys)]
    if not sampled:
        return {"num": num}
    truncated, failed, tokens, prompt_tokens = (sum(row[key] for row in sampled) for key in keys)
    fractions = {"frac_truncated": truncated / len(sampled), "frac_parse_fail": failed / num}
    return {"num": num} | fractions | {"sampled_tokens": tokens, "prompt_tokens": prompt_tokens}


def select(cfg: SelectConfig) -> None:
    with user_errors():
        run = SelectRun(cfg.run, config.to_yaml(cfg), resume=False, checkpoints=False)
        path = Path(cfg.select.scores) if cfg.select.scores else run.dir / SCORES
        to_sample = not cfg.select.scores and not path.is_file()
        data = cfg.data
        samples = read_samples(data.train, data.out_of_clip, cfg.run.seed, data.manifest, need_videos=to_sample)
    if to_sample:
        sample_scores(samples, cfg, run)
    if path == run.dir / SCORES:
        remove_lines(run, "scores")
    with user_errors():
        run.engine.raise_together(lambda: apply_rule(samples, path, cfg, run.dir))
    run.finish()


def main(argv: list[str] | None = None) -> None:
    cfg, _, _ = from_command_line(SelectConfig, argv, __doc__, "configs/tiny_select.yaml")
    with interruptible(flag=""):
        select(cfg)


if __name__ == "__main__":
    main()
