"""The GRPO loop: batch, rollout, reward, advantage, update. Start reading here.

    python train_grpo.py --config configs/tiny.yaml loss.beta=0.0
    python train_grpo.py --config configs/tiny.yaml configs/dapo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml train_grpo.py --config configs/tiny.yaml

By default: std-normalised group advantages, clipped surrogate, k3 KL in the loss, token mean over the step, one update
per rollout (so the ratio is 1 and the loss is about 0 whatever the policy learns: watch the rewards, not the loss).
The variants are values of the sections `loss` and `group`, see grpo.py.
Letters: P prompts of this process, G completions each, B = P * G, T tokens, N groups of all processes.
metrics.jsonl holds, per step:

    reward/total, reward/<part>   means over all completions sampled; a part over those that have it
    group/frac_mixed              groups whose rewards differ, the only ones with a gradient; all_good, all_bad likewise
    group/refills, group/trained  rounds of further sampling; groups that the update ran on
    loss                          mean over the updates; this and what follows only if a group was trained on
    kl, clip_frac, entropy        means over the completion tokens trained on, and over the updates
    length/mean, length/max       completion tokens, EOS included; frac_truncated: without EOS
    logp_gap/mean, logp_gap/max   |sampled - scored log-prob| per token: 0 but for rounding, or something is wrong
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import GrpoConfig
from data import PromptBuilder, Sample, batch_indices, make_builder, read_samples, refill_indices
from eval import Validator
from grpo import group_advantages, group_stats, overlong_penalty, policy_loss, token_weights
from policy import Policy, load_policy, pack, packed_logps, save_model
from reward_functions import load_functions, score_all
from rewards import PARTS, Reward
from rollout import Rollout, generate
from run import Clock, Run, check_precision, local_slice, make_optimizer, set_learning_rate, user_errors

CAUSES = {
    "no group had rewards that differ, so there was no gradient": "questions that are all too easy or too hard for "
    "the model (group/frac_all_good and frac_all_bad tell; select the data), answers that never parse (read "
    "samples.jsonl), too few completions, too low a temperature",
    "over 90% of the completions were cut off at rollout.max_new_tokens": "too small a limit for thinking, a prompt "
    "template that is not the model's own, a generation_config.json that does not name the model's EOS ids",
}


@dataclass(frozen=True)
class Groups:
    """One step's groups, sampled in one or more rounds: this process's own, and the numbers of everybody's.

    The N groups of all processes stand in the order they were sampled in; `own[p]` is the place of this process's
    group p among them. What is decided from `totals_NG` and `tokens_N` is decided alike on all processes.
    """

    rollout: Rollout
    video_embeds: list[Tensor]
    rewards: list[Reward]  # B
    own: list[int]  # P
    totals_NG: Tensor  # total rewards
    tokens_N: Tensor  # completion tokens that count in the loss
    num_refills: int


def score_groups(rollout: Rollout, functions, cfg: GrpoConfig, step: int) -> tuple[list[Reward], Tensor]:
    """B rewards with their parts, and their totals (P, G); a penalty for overlong completions is a part of its own."""
    group_size = rollout.group_size
    samples = [prompt.sample for prompt in rollout.prompts for _ in range(group_size)]
    ids = [tokens for group in rollout.completions for tokens in group]
    rewards = score_all(rollout.texts, samples, cfg, functions, ids, step)
    if cfg.loss.truncated == "penalise":
        longest = cfg.rollout.max_new_tokens
        penalties = overlong_penalty(rollout.mask_BT.sum(1), longest, cfg.loss.overlong_buffer * longest)
        rewards = [
            replace(reward, total=reward.total + penalty, parts=reward.parts | {"overlong": penalty})
            for reward, penalty in zip(rewards, penalties.tolist(), strict=True)
        ]
    totals = [reward.total for reward in rewards]
    return rewards, torch.tensor(totals, dtype=torch.float32).view(-1, group_size)


def loss_mask(rollout: Rollout, cfg: GrpoConfig) -> Tensor:
    """(B, T) bool: the completion tokens that count in the loss."""
    drop_truncated = cfg.loss.truncated == "mask"
    return rollout.mask_BT & ~rollout.truncated_B[:, None] if drop_truncated else rollout.mask_BT


def collect_groups(
    policy: Policy, samples: list[Sample], builder: PromptBuilder, functions, cfg: GrpoConfig, step: int, run, clock
) -> Groups:
    """Sample a step's groups; while some are dead and rounds are left, sample further videos in their place.

    `policy` is the unwrapped model. The videos of a round are shared out evenly; where they do not divide, the last
    one is sampled more than once, and once kept, so that all processes make the same calls.
    """
    r, world, rank = cfg.rollout, run.accelerator.num_processes, run.accelerator.process_index
    wanted = batch_indices(len(samples), cfg.data.batch_size, step, cfg.run.seed)
    taken, own, totals, tokens = [], [], [], []
    rollouts, video_embeds, rewards = [], [], []
    num_refills = 0
    while True:
        share = -(-len(wanted) // world)
        padded = wanted + wanted[-1:] * (share * world - len(wanted))
        with clock("data"):
            prompts = builder.many([samples[i] for i in padded[rank * share : (rank + 1) * share]])
        with clock("vision"):
            embeds = policy.embed_each(prompts)
        with clock("rollout"):
            rollout = generate(
                policy, prompts, embeds, r.group_size, r.max_new_tokens, r.micro_batch_size, cfg.run.seed, step
            )
        with clock("reward"):
            scored, totals_PG = score_groups(rollout, functions, cfg, step)
        tokens_P = loss_mask(rollout, cfg).sum(1).view(-1, r.group_size).sum(1)
        totals.append(run.gather(totals_PG)[: len(wanted)])
        tokens.append(run.gather(tokens_P)[: len(wanted)])
        places = range(rank * share, min((rank + 1) * share, len(wanted)))
        if places:
            own += [len(taken) + place for place in places]
            rollouts.append(rollout.take(range(len(places))))
            video_embeds += embeds[: len(places)]
            rewards += scored[: len(places) * r.group_size]
        taken += wanted
        num_mixed = group_stats(torch.cat(totals), cfg.group.tolerance)["num_mixed"]
        num_missing = cfg.data.batch_size - int(num_mixed)
        wanted = refill_indices(len(samples), taken, num_missing, step, num_refills + 1, cfg.run.seed)
        if num_refills == cfg.group.max_refills or not wanted:
            return Groups(
                Rollout.join(rollouts), video_embeds, rewards, own, torch.cat(totals), torch.cat(tokens), num_refills
            )
        num_refills += 1


def choose_groups(groups: Groups, cfg: GrpoConfig) -> tuple[list[int], list[int], Tensor]:
    """The step's batch, the groups of it to train on (both as places among the N), and advantages (N, G).

    A batch has data.batch_size groups: mixed ones first, then dead ones, which count in the loss's denominator. So
    skipping them changes no gradient (but for their KL and entropy terms).
    """
    mixed_N = groups.totals_NG.std(1) > cfg.group.tolerance
    batch = torch.argsort(~mixed_N, stable=True)[: cfg.data.batch_size].tolist()
    advantages_NG = torch.zeros_like(groups.totals_NG)
    loss = cfg.loss
    advantages_NG[batch] = group_advantages(
        groups.totals_NG[batch], loss.std_eps, loss.baseline, loss.scale, cfg.group.tolerance
    )
    return batch, [n for n in batch if mixed_N[n] or not cfg.group.skip_dead], advantages_NG


def update(
    policy: torch.nn.Module, reference: Policy | None, optimizer, groups: Groups, cfg: GrpoConfig, run: Run
) -> dict[str, float]:
    """The optimizer steps on one step's groups; returns sums over this process's tokens and updates, and `grad_norm`.

    `old_logps` are the policy's own of the first pass. Without a group to train on, on any process, nothing is done.
    """
    batch, trained, advantages_NG = choose_groups(groups, cfg)
    names = ("loss", "kl", "clipped", "entropy", "tokens", "gap", "gap_max")
    if not trained:
        return dict.fromkeys((*names, "trained", "grad_norm"), 0.0)
    raw, size, loss_cfg = run.accelerator.unwrap_model(policy), cfg.data.micro_batch_size, cfg.loss
    mine = [p for p, n in enumerate(groups.own) if n in trained]
    chosen = mine or [0]  # a process with nothing to train on runs its first group with weight 0
    rollout, embeds_of = groups.rollout.take(chosen), [groups.video_embeds[p] for p in chosen]
    completions, mask_BT = rollout.completions, loss_mask(rollout, cfg)
    weights_BT = token_weights(
        mask_BT,
        loss_cfg.aggregation,
        float(groups.tokens_N[batch].sum()),
        len(batch) * rollout.group_size,
        cfg.rollout.max_new_tokens,
    )
    advantages_B = advantages_NG[[groups.own[p] for p in chosen]].flatten().to(raw.device)
    old_of, ref_of, passes = {}, {}, []  # log-probs by micro-batch; sums by pass

    def loss_of(videos: slice) -> Tensor:
        b = slice(videos.start * rollout.group_size, videos.stop * rollout.group_size)
        key, num_columns = (videos.start, videos.stop), mask_BT.shape[1]
        packed = pack(rollout.prompts[videos], completions[videos], raw.model.config, raw.device)
        embeds = torch.cat(embeds_of[videos]) if raw.vision_is_frozen else None
        if reference is not None and key not in ref_of:
            with torch.no_grad(), reference.adapter_off():
                ref_of[key] = packed_logps(reference, packed, embeds, num_columns)[0]
        logps_BT, entropy_BT = packed_logps(policy, packed, embeds, num_columns, entropy_grad=loss_cfg.entropy != 0)
        first = key not in old_of
        old_of.setdefault(key, rollout.logps_BT[b] if loss_cfg.old_logps == "sampled" else logps_BT.detach())
        loss, sums = policy_loss(
            logps_BT,
            old_of[key],
            advantages_B[b],
            mask_BT[b],
            weights_BT[b],
            loss_cfg.ratio,
            loss_cfg.clip,
            loss_cfg.clip_low,
            loss_cfg.clip_high,
            ref_of.get(key),
            loss_cfg.beta,
            loss_cfg.kl,
            loss_cfg.kl_clamp,
            entropy_BT,
            loss_cfg.entropy,
        )
        gap_BT = (logps_BT.detach() - rollout.logps_BT[b]).abs() * first
        sums |= {"loss": loss.detach(), "entropy": (entropy_BT.detach() * mask_BT[b]).sum()}
        sums |= {"tokens": mask_BT[b].sum(), "gap": (gap_BT * mask_BT[b]).sum(), "gap_max": gap_BT.max()}
        passes.append({name: value.item() for name, value in sums.items()})
        return loss

    policy.train()
    micro_batches = [slice(i, min(i + size, len(mine))) for i in range(0, len(mine), size)]
    stats: dict[str, float] = defaultdict(float)
    for _ in range(loss_cfg.updates_per_rollout):
        passes.clear()
        run.backward(policy, micro_batches, loss_of, spare=slice(0, 1))
        stats["grad_norm"] += run.step(policy, optimizer, cfg.optim.grad_clip) / loss_cfg.updates_per_rollout
        for sums in passes[: len(micro_batches)]:  # the others had weight 0
            gap_max = max(stats["gap_max"], sums.pop("gap_max"))
            for name, value in sums.items():
                stats[name] += value
            stats["gap_max"] = gap_max
    return dict.fromkeys(names, 0.0) | stats | {"trained": float(len(trained))}


def step_metrics(groups: Groups, stats: dict[str, float], functions, cfg: GrpoConfig, run: Run) -> dict[str, float]:
    """The step's metrics over all processes, from sums."""
    rollout, num_updates = groups.rollout, cfg.loss.updates_per_rollout
    sums = {name: stats[name] for name in ("loss", "kl", "clipped", "entropy", "tokens", "gap")}
    sums |= {
        "num_completions": float(len(groups.rewards)),
        "completion_tokens": float(rollout.mask_BT.sum()),
        "prompt_tokens": float(sum(len(prompt.ids) for prompt in rollout.prompts)),
        "truncated": float(rollout.truncated_B.sum()),
        "total": sum(reward.total for reward in groups.rewards),
    }
    parts = [*PARTS["gqa"], "overlong", *(function.name for function in functions)]
    for part in parts:
        having = [reward.parts[part] for reward in groups.rewards if part in reward.parts]
        sums |= {f"sum_{part}": sum(having), f"num_{part}": float(len(having))}
    s = run.sums(sums)
    num = s["num_completions"]
    counts, kinds = group_stats(groups.totals_NG, cfg.group.tolerance), ("mixed", "all_good", "all_bad")
    metrics = {
        "reward/total": s["total"] / num,
        **{f"reward/{part}": s[f"sum_{part}"] / s[f"num_{part}"] for part in parts if s[f"num_{part}"]},
        **{f"group/frac_{kind}": counts[f"num_{kind}"] / len(groups.totals_NG) for kind in kinds},
        "group/refills": float(groups.num_refills),
        "group/trained": stats["trained"],
        "length/mean": s["completion_tokens"] / num,
        "length/max": run.maximum(rollout.mask_BT.sum(1).max().item()),
        "frac_truncated": s["truncated"] / num,
        "grad_norm": stats["grad_norm"],
        "tokens/prompt": s["prompt_tokens"],
        "tokens/completion": s["completion_tokens"],
    }
    gap_max = run.maximum(stats["gap_max"])
    if s["tokens"]:  # the gap is the first update's
        metrics |= {"loss": s["loss"] / num_updates, "clip_frac": s["clipped"] / s["tokens"]}
        metrics |= {"kl": s["kl"] / s["tokens"], "entropy": s["entropy"] / s["tokens"]}
        metrics |= {
            "logp_gap/mean": s["gap"] * num_updates / s["tokens"],
            "logp_gap/max": gap_max,
        }  # of the first update
    return metrics


class Alarm:
    """Says so, every `after` steps in a row, when a run learns nothing or never gets to the end of a sentence."""

    def __init__(self, after: int):
        self.after, self.counts = after, dict.fromkeys(CAUSES, 0)

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The warnings due after this step."""
        signs = (metrics["group/frac_mixed"] == 0, metrics["frac_truncated"] > 0.9)
        due = []
        for sign, (name, count) in zip(signs, list(self.counts.items()), strict=True):
            self.counts[name] = count + 1 if sign else 0
            if sign and self.counts[name] % self.after == 0:
                due.append(f"WARNING: for {self.counts[name]} steps {name}. Usual causes: {CAUSES[name]}.")
        return due


def sample_rows(groups: Groups, step: int) -> list[dict]:
    """One row per video for samples.jsonl."""
    rollout, rewards, size = groups.rollout, groups.rewards, groups.rollout.group_size
    return [
        {
            "step": step,
            "group": groups.own[p],
            "id": prompt.sample.id,
            "task": prompt.sample.task,
            "completions": rollout.texts[p * size : (p + 1) * size],
            "rewards": [reward.total for reward in rewards[p * size : (p + 1) * size]],
            "parts": [reward.parts for reward in rewards[p * size : (p + 1) * size]],
        }
        for p, prompt in enumerate(rollout.prompts)
    ]


def train(cfg: GrpoConfig, resume: bool = False) -> Run:
    with user_errors():
        check_precision(cfg.model)
        run = Run(cfg.run.dir, config.to_yaml(cfg), cfg.run.seed, cfg.run.tracker, resume, cfg.run.keep_checkpoints)
        local_slice(range(cfg.data.batch_size), run.accelerator)
        functions = load_functions(cfg.rewards.functions)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed)
        raw = load_policy(cfg.model, cfg.rollout.temperature).to(run.accelerator.device)
        builder = make_builder(cfg, raw.tokenizer)
        validator = Validator(cfg, builder, run)
    reference = None
    if cfg.loss.beta and cfg.model.lora_rank:
        reference = raw  # with its adapter switched off
    elif cfg.loss.beta:
        reference = load_policy(cfg.model, cfg.rollout.temperature).to(run.accelerator.device).eval()
        reference.requires_grad_(False)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    clock, alarm = Clock(), Alarm(cfg.group.warn_after)
    for step in tqdm(range(run.start_step, cfg.run.steps), desc="grpo", disable=not run.is_main):
        with clock("step"):
            lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
            groups = collect_groups(raw, samples, builder, functions, cfg, step, run, clock)
            with clock("update"):
                stats = update(policy, reference, optimizer, groups, cfg, run)
        metrics = step_metrics(groups, stats, functions, cfg, run) | {"lr": lr} | validator(step + 1, raw)
        times = clock.times()
        run.log(step + 1, metrics | times | {"tokens_per_s": metrics["tokens/completion"] / times["time/step"]})
        rows = sample_rows(groups, step + 1)
        run.log_samples(rows)
        if run.is_main:
            for warning in alarm(metrics):
                tqdm.write(warning, file=sys.stderr)
        if run.is_main and (step + 1) % cfg.run.print_every == 0:
            shown = [f"  {r:.2f} {json.dumps(c)}" for c, r in list(zip(rows[0]["completions"], rows[0]["rewards"]))[:2]]
            tqdm.write("\n".join([f"step {step + 1}: reward {metrics['reward/total']:.3f}; {rows[0]['id']}", *shown]))
        if (step + 1) % cfg.run.save_every == 0 or step + 1 == cfg.run.steps:
            run.save_checkpoint(step + 1, validator.state)
    if run.is_main:
        save_model(raw, run.dir / "final", cfg.model.path)
    run.finish()
    return run


def main(argv: list[str] | None = None) -> Run:
    with user_errors():
        cfg, resume = config.from_command_line(GrpoConfig, argv, __doc__, "configs/tiny.yaml")
    return train(cfg, resume)


if __name__ == "__main__":
    main()
