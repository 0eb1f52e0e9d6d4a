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
    group/frac_mixed              groups whose rewards differ, the only ones with a gradient
    group/frac_all_good, _all_bad of the others, those whose answers are all perfect, all worth nothing
    group/refills, group/trained  rounds of further sampling; groups that the update ran on
    loss                          mean over the updates; this and what follows only if a group was trained on
    kl, entropy                   means over the completion tokens trained on, and over the updates
    clip_frac                     likewise, of the last update: in a rollout's first one every ratio is 1
    length/mean, length/max       completion tokens, EOS included; frac_truncated: without EOS
    logp_gap/mean, logp_gap/max   |sampled - scored log-prob| per token: 0 but for rounding, or something is wrong
    tokens/video, data/frames_cut means over the videos: tokens really used, frames that the token budget took away
    data/num_replaced             samples that could not be read and were replaced by others, see loader.py
    data/num_active               samples that training still uses: all, unless data.refilter_every drops some
    update/num_skipped            updates of the step whose gradient was not finite: they moved nothing, on any process
    time/data, time/data_wait     seconds until the prompts were there; waiting for decoded frames and other processes
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import config
import plan
from config import GrpoConfig
from data import read_samples, refill_indices
from engine import check_batch, check_engine
from eval import Validator
from grpo import group_advantages, group_stats, is_mixed, overlong_penalty, policy_loss, token_weights
from loader import Loader, make_workers
from optim import make_optimizer, set_learning_rate
from policy import Policy, pack, packed_logps
from pretrained import load_policy, save_model
from prompts import make_builder, video_means, video_sums
from records import to_record
from reward_functions import load_functions, score_all
from rewards import PARTS, Reward, task_reward
from rollout import Rollout, generate
from run import Clock, Run, user_errors
from selfcheck import check_model, check_ranks
from signals import interruptible
from timelines import completions_text, draw_timelines

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
    group p among them. What is decided from the (N, G) numbers is decided alike on all processes.
    """

    rollout: Rollout
    video_embeds: list[Tensor]
    rewards: list[Reward]  # B
    own: list[int]  # P
    totals_NG: Tensor  # rewards, penalties included: what advantages are made of
    earned_NG: Tensor  # rewards before the penalty for overlong completions: a group is dead when these are equal
    right_NG: Tensor  # the task's own parts alone, 1 for a perfect answer
    tokens_NG: Tensor  # completion tokens that count in the loss
    num_refills: int


def score_groups(rollout: Rollout, functions, cfg: GrpoConfig, step: int) -> tuple[list[Reward], Tensor]:
    """B rewards with their parts, and (P, G, 4): what `Groups` holds of every completion, in its order."""
    samples = [prompt.sample for prompt in rollout.prompts for _ in range(rollout.group_size)]
    ids = [tokens for group in rollout.completions for tokens in group]
    earned = score_all(rollout.texts, samples, cfg, functions, ids, step)
    rewards = earned
    if cfg.loss.truncated == "penalise":
        longest = cfg.rollout.max_new_tokens
        penalties_B = overlong_penalty(rollout.mask_BT.sum(1), longest, cfg.loss.overlong_buffer * longest)
        rewards = [
            Reward(reward.total + penalty, reward.parts | {"overlong": penalty})
            for reward, penalty in zip(earned, (cfg.loss.overlong_penalty * penalties_B).tolist(), strict=True)
        ]
    right = [task_reward(sample.task, reward.parts) for reward, sample in zip(earned, samples)]
    numbers = [[reward.total for reward in rewards], [reward.total for reward in earned], right]
    tokens_B = loss_mask(rollout, cfg).sum(1).cpu()
    numbers_B4 = torch.stack([*torch.tensor(numbers, dtype=torch.float32), tokens_B.float()], dim=1)
    return rewards, numbers_B4.view(-1, rollout.group_size, 4)


def loss_mask(rollout: Rollout, cfg: GrpoConfig) -> Tensor:
    """(B, T) bool: the completion tokens that count in the loss."""
    drop_truncated = cfg.loss.truncated == "mask"
    return rollout.mask_BT & ~rollout.truncated_B[:, None] if drop_truncated else rollout.mask_BT


def is_alive(earned_NG: Tensor, tokens_NG: Tensor, cfg: GrpoConfig) -> Tensor:
    """(N,) bool: groups with a signal: rewards that differ, and tokens to put it on."""
    return is_mixed(earned_NG, cfg.group.tolerance) & (tokens_NG.sum(1) > 0)


def collect_groups(
    policy: Policy, loader: Loader, functions, cfg: GrpoConfig, step: int, run: Run, clock, synced: bool = False
) -> Groups:
    """Sample a step's groups; while some are dead and rounds are left, sample further videos in their place.

    `policy` is the unwrapped model; `synced` as for rollout.generate. The videos of a round are shared out evenly;
    where they do not divide, the last one is sampled more than once, and once kept, so that all processes make the
    same calls.
    """
    r = cfg.rollout
    own, numbers, indices = [], [], []
    rollouts, video_embeds, rewards = [], [], []
    num_refills = num_groups = 0
    with clock("data"):
        batch = loader.batch(step)
    while True:
        prompts = batch.prompts
        with clock("vision"):
            embeds = policy.embed_each(prompts)
        with clock("rollout"):
            rollout = generate(
                policy,
                prompts,
                embeds,
                r.group_size,
                r.max_new_tokens,
                r.micro_batch_size,
                cfg.run.seed,
                step,
                batch.occurrences,
                synced,
            )
        numbers_PG4 = torch.zeros(len(prompts), r.group_size, 4)
        if batch.places:
            own += [num_groups + place for place in batch.places]
            rollouts.append(rollout.take(range(len(batch.places))))
            video_embeds += embeds[: len(batch.places)]
            with clock("reward"):
                scored, numbers_PG4[: len(batch.places)] = score_groups(rollouts[-1], functions, cfg, step)
            rewards += scored
        numbers.append(run.engine.gather(numbers_PG4)[: batch.num_places])
        num_groups += batch.num_places
        indices += batch.indices
        totals_NG, earned_NG, right_NG, tokens_NG = torch.cat(numbers).unbind(2)
        alive_N = is_alive(earned_NG, tokens_NG, cfg)
        num_missing = cfg.data.batch_size - int(alive_N.sum())
        wanted = refill_indices(len(loader.samples), batch.taken, num_missing, step, num_refills + 1, cfg.run.seed)
        if num_refills == cfg.group.max_refills or not wanted:
            loader.order.visited(indices, alive_N.tolist())
            rollout = Rollout.join(rollouts)
            return Groups(rollout, video_embeds, rewards, own, totals_NG, earned_NG, right_NG, tokens_NG, num_refills)
        num_refills += 1
        with clock("data"):
            batch = loader.refill(step, num_refills, wanted, batch.taken)


def choose_groups(groups: Groups, cfg: GrpoConfig) -> tuple[list[int], list[int], Tensor]:
    """The step's batch, the groups of it to train on (both as places among the N), and advantages (N, G).

    A batch has data.batch_size groups: live ones first, then dead ones, which count in the loss's denominator. So
    skipping them changes no gradient (but for their KL and entropy terms).
    """
    alive_N = is_alive(groups.earned_NG, groups.tokens_NG, cfg)
    batch = torch.argsort(~alive_N, stable=True)[: cfg.data.batch_size].tolist()
    advantages_NG = torch.zeros_like(groups.totals_NG)
    loss = cfg.loss
    advantages_NG[batch] = group_advantages(
        groups.totals_NG[batch], loss.std_eps, loss.baseline, loss.scale, cfg.group.tolerance
    )
    has_tokens_N = groups.tokens_NG.sum(1) > 0
    trained = [n for n in batch if alive_N[n] or (has_tokens_N[n] and not cfg.group.skip_dead)]
    return batch, trained, advantages_NG * alive_N[:, None]


def update(
    policy: torch.nn.Module, reference: Policy | None, optimizer, groups: Groups, cfg: GrpoConfig, run: Run
) -> dict[str, float]:
    """The optimizer steps on one step's groups; returns sums over this process's tokens and updates, and `grad_norm`.

    `old_logps` are the policy's own of the first pass. Without a group to train on, on any process, nothing is done.
    """
    batch, trained, advantages_NG = choose_groups(groups, cfg)
    stats: dict[str, float] = defaultdict(float, trained=float(len(trained)))
    if not trained:
        return stats
    raw, size, loss_cfg = run.engine.unwrap(policy), cfg.data.micro_batch_size, cfg.loss
    mine = [p for p, n in enumerate(groups.own) if n in trained]
    chosen = mine or [0]  # a process with nothing to train on runs its first group with weight 0
    rollout, embeds_of = groups.rollout.take(chosen), [groups.video_embeds[p] for p in chosen]
    completions, mask_BT = rollout.completions, loss_mask(rollout, cfg)
    tokens_NG = groups.tokens_NG[batch]
    weights_BT = token_weights(
        mask_BT,
        loss_cfg.aggregation,
        num_tokens=tokens_NG.sum().item(),
        num_completions=(tokens_NG > 0).sum().item(),
        max_tokens=cfg.rollout.max_new_tokens,
    )
    if not mine:
        weights_BT.zero_()
    advantages_B = advantages_NG[[groups.own[p] for p in chosen]].flatten().to(raw.device)
    num, group_size = len(chosen), rollout.group_size
    micro_batches = [slice(i, min(i + size, num)) for i in range(0, num, size)]
    tokens_P = rollout.mask_BT.sum(1).view(num, group_size).sum(1)
    most_tokens = int(run.engine.maximum(max(tokens_P[videos].sum().item() for videos in micro_batches)))
    old_of, ref_of, updates = {}, {}, []  # log-probs by micro-batch; by update the sums of its passes

    def loss_of(videos: slice) -> Tensor:
        b = slice(videos.start * group_size, videos.stop * group_size)
        packed = pack(rollout.prompts[videos], completions[videos], raw.model.config, raw.device, most_tokens)
        embeds = torch.cat(embeds_of[videos]) if raw.vision_is_frozen else None
        scored = (packed, embeds, mask_BT.shape[1])
        first = len(updates) == 1  # a repeated micro-batch is scored again: all processes make the same calls
        if reference is not None and first:
            with torch.no_grad(), reference.adapter_off():
                ref_of[b.start] = packed_logps(reference, *scored)[0]
        logps_BT, entropy_BT = packed_logps(policy, *scored, entropy_grad=loss_cfg.entropy != 0)
        if first:
            old_of[b.start] = rollout.logps_BT[b] if loss_cfg.old_logps == "sampled" else logps_BT.detach()
        loss, sums = policy_loss(
            logps_BT,
            old_of[b.start],
            advantages_B[b],
            mask_BT[b],
            weights_BT[b],
            ratio=loss_cfg.ratio,
            clip=loss_cfg.clip,
            clip_low=loss_cfg.clip_low,
            clip_high=loss_cfg.clip_high,
            ref_logps_BT=ref_of.get(b.start),
            beta=loss_cfg.beta,
            kl=loss_cfg.kl,
            kl_clamp=loss_cfg.kl_clamp,
            entropy_BT=entropy_BT,
            entropy_coef=loss_cfg.entropy,
        )
        gap_BT = (logps_BT.detach() - rollout.logps_BT[b]).abs() * mask_BT[b] * first
        sums |= {"loss": loss.detach(), "entropy": (entropy_BT.detach() * mask_BT[b]).sum()}
        sums |= {"tokens": mask_BT[b].sum(), "gap": gap_BT.sum(), "gap_max": gap_BT.max()}
        updates[-1].append({name: value.item() for name, value in sums.items()})
        return loss

    policy.train()
    for _ in range(loss_cfg.updates_per_rollout):
        updates.append([])
        run.engine.backward(policy, micro_batches, loss_of)
        norm = run.engine.step(policy, optimizer, cfg.optim.grad_clip)
        stats["grad_norm"] += norm / loss_cfg.updates_per_rollout
        stats["num_skipped"] += not math.isfinite(norm)
        stats["clipped"] = 0.0  # of the last update: in the first one the ratio is 1
        for sums in updates[-1][: len(micro_batches)] if mine else ():  # the others had weight 0
            stats["gap_max"] = max(stats["gap_max"], sums.pop("gap_max"))
            for name, value in sums.items():
                stats[name] += value
    return stats


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
        **video_sums(rollout.prompts),
    }
    parts = [*PARTS["gqa"], "overlong", *(function.name for function in functions)]
    for part in parts:
        having = [reward.parts[part] for reward in groups.rewards if part in reward.parts]
        sums |= {f"sum/{part}": sum(having), f"num/{part}": float(len(having))}
    s = run.engine.sums(sums)
    num = s["num_completions"]
    counts = group_stats(groups.earned_NG, groups.right_NG, cfg.group.tolerance)
    metrics = {
        "reward/total": s["total"] / num,
        **{f"reward/{part}": s[f"sum/{part}"] / s[f"num/{part}"] for part in parts if s[f"num/{part}"]},
        **{f"group/frac_{kind}": count / len(groups.totals_NG) for kind, count in counts.items()},
        "group/refills": float(groups.num_refills),
        "group/trained": stats["trained"],
        "length/mean": s["completion_tokens"] / num,
        "length/max": run.engine.maximum(rollout.mask_BT.sum(1).max().item()),
        "frac_truncated": s["truncated"] / num,
        "grad_norm": stats["grad_norm"],
        "update/num_skipped": stats["num_skipped"],
        "tokens/prompt": s["prompt_tokens"],
        "tokens/completion": s["completion_tokens"],
        **video_means(s),
    }
    gap_max = run.engine.maximum(stats["gap_max"])
    if s["tokens"]:  # the gap is the first update's
        metrics |= {"loss": s["loss"] / num_updates, "clip_frac": s["clipped"] * num_updates / s["tokens"]}
        metrics |= {"kl": s["kl"] / s["tokens"], "entropy": s["entropy"] / s["tokens"]}
        metrics |= {
            "logp_gap/mean": s["gap"] * num_updates / s["tokens"],
            "logp_gap/max": gap_max,
        }  # of the first update
    return metrics


class Alarm:
    """Says so, every `after` steps in a row, when a run learns nothing or never gets to the end of a sentence.

    `state` is that of the run which is resumed, or None.
    """

    def __init__(self, after: int, state: list[int] | None = None):
        self.after, self.counts = after, dict(zip(CAUSES, state or [0] * len(CAUSES), strict=True))

    @property
    def state(self) -> dict:
        return {"alarm": list(self.counts.values())}

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        """The warnings due after this step."""
        signs = (metrics["group/frac_mixed"] == 0, metrics["frac_truncated"] > 0.9)
        due = []
        for sign, (name, count) in zip(signs, list(self.counts.items()), strict=True):
            self.counts[name] = count + 1 if sign else 0
            if sign and self.counts[name] % self.after == 0:
                due.append(f"WARNING: for {self.counts[name]} steps {name}. Usual causes: {CAUSES[name]}.")
        return due


def sample_rows(groups: Groups, step: int, cfg: GrpoConfig) -> list[dict]:
    """One row per video for samples.jsonl: the record, and its G completions with their rewards and advantages."""
    rollout, rewards, size = groups.rollout, groups.rewards, groups.rollout.group_size
    advantages_NG = choose_groups(groups, cfg)[2]
    return [
        {
            "step": step,
            "group": groups.own[p],
            **to_record(prompt.sample),
            "completions": rollout.texts[p * size : (p + 1) * size],
            "rewards": [reward.total for reward in rewards[p * size : (p + 1) * size]],
            "parts": [reward.parts for reward in rewards[p * size : (p + 1) * size]],
            "advantages": advantages_NG[groups.own[p]].tolist(),
        }
        for p, prompt in enumerate(rollout.prompts)
    ]


def batch_rows(groups: Groups, cfg: GrpoConfig, step: int) -> list[dict]:
    """The rows of samples.jsonl, and whether the update ran on them."""
    trained = choose_groups(groups, cfg)[1]
    return [row | {"trained": row["group"] in trained} for row in sample_rows(groups, step, cfg)]


def print_step(step: int, metrics: dict[str, float], rows: list[dict], warnings: list[str], every: int) -> None:
    """Warnings, and now and then two completions."""
    for warning in warnings:
        tqdm.write(warning, file=sys.stderr)
    if step % every == 0:
        shown = [f"  {r:.2f} {json.dumps(c)}" for c, r in list(zip(rows[0]["completions"], rows[0]["rewards"]))[:2]]
        tqdm.write("\n".join([f"step {step}: reward {metrics['reward/total']:.3f}; {rows[0]['id']}", *shown]))


def load_reference(policy: Policy, cfg: GrpoConfig, run: Run) -> Policy | None:
    """The policy as it was at the start, for the KL; with LoRA it is the policy itself, its adapter switched off."""
    if not cfg.loss.beta or cfg.model.lora_rank:
        return policy if cfg.loss.beta else None
    reference = load_policy(cfg.model, cfg.rollout.temperature).requires_grad_(False).eval()
    return run.engine.prepare_frozen(reference)


def train(cfg: GrpoConfig, resume: bool = False) -> Run:
    with user_errors():
        check_engine(cfg)
        run = Run(cfg.run, config.to_yaml(cfg), resume)
        check_batch(cfg.data.batch_size, run.engine.world_size)
        functions = load_functions(cfg.rewards.functions)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        raw = load_policy(cfg.model, cfg.rollout.temperature).to(run.engine.device)
        check_ranks(raw, samples, cfg, run)
        builder = make_builder(cfg, raw.tokenizer)
        workers = make_workers(builder, cfg.data)
        validator = Validator(cfg, builder, workers, run)
        clock = Clock(run.engine.phase)
        loader = Loader(samples, builder, workers, cfg, run, clock)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    reference = load_reference(raw, cfg, run)
    alarm = Alarm(cfg.group.warn_after, run.state.get("alarm"))
    with workers, run.stoppable():
        with user_errors():
            start = None if run.start_step else reference  # what the policy must equal
            check_model(policy, start, loader.peek(run.start_step), builder, workers, cfg, run)
        for step in run.steps("grpo"):
            with clock("step"):
                lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
                with run.engine.whole_weights(cfg.model.gather_weights) as whole:
                    groups = collect_groups(raw, loader, functions, cfg, step, run, clock, synced=not whole)
                with clock("update"):
                    stats = update(policy, reference, optimizer, groups, cfg, run)
            metrics = step_metrics(groups, stats, functions, cfg, run) | {"data/num_replaced": loader.num_replaced}
            metrics |= {"data/num_active": len(loader.samples), "lr": lr} | validator(step + 1, raw)
            times = clock.times()
            run.log(step + 1, metrics | times | {"tokens_per_s": metrics["tokens/completion"] / times["time/step"]})
            rows = sample_rows(groups, step + 1, cfg)
            run.log_samples(rows)
            warnings = alarm(metrics)
            if run.is_main:
                print_step(step + 1, metrics, rows, warnings, cfg.run.print_every)
                if cfg.run.tracker != "none" and (step + 1) % cfg.run.print_every == 0:
                    run.show(step + 1, completions_text(rows), draw_timelines(rows))
            run.check_finite(step + 1, partial(batch_rows, groups, cfg, step + 1))
            if run.save_due(step + 1):
                run.save_checkpoint(step + 1, validator.state | loader.state | loader.order.state | alarm.state)
    run.finish(lambda folder, weights: save_model(raw, folder, cfg.model.path, weights))
    return run


def main(argv: list[str] | None = None) -> Run | None:
    with user_errors():
        cfg, resume, planned = config.from_command_line(GrpoConfig, argv, __doc__, "configs/tiny.yaml")
        if planned:
            return plan.show(cfg, planned)
    with interruptible():
        return train(cfg, resume)


if __name__ == "__main__":
    main()
