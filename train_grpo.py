"""The GRPO loop: batch, rollout, reward, advantage, update. Start reading here.

    python train_grpo.py --config configs/tiny.yaml loss.beta=0.0
    accelerate launch --config_file configs/accelerate/ddp.yaml train_grpo.py --config configs/tiny.yaml

Which GRPO: std-normalised group advantages, clipped surrogate, k3 KL in the loss, token mean over the step, one update
per rollout (so the ratio is 1 and the loss is about 0 whatever the policy learns: watch the rewards, not the loss).
Letters: P prompts of this process, G completions each, B = P * G, T tokens. metrics.jsonl holds, per step:

    reward/total, reward/<part>   means over completions; a part over those that have it
    group/frac_mixed              groups whose rewards differ, the only ones with a gradient; all_good, all_bad likewise
    kl, clip_frac, entropy        means over completion tokens
    length/mean, length/max       completion tokens, EOS included; frac_truncated: without EOS
    logp_gap/mean, logp_gap/max   |sampled - scored log-prob| per token: 0 but for rounding, or something is wrong
"""

import json

import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import GrpoConfig
from data import Prompt, batch_indices, make_builder, read_samples
from eval import Validator
from grpo import group_advantages, group_stats, policy_loss
from policy import Policy, load_policy, pack, packed_logps, save_model
from rewards import Reward, score
from rollout import Rollout, generate
from run import Clock, Run, check_precision, local_slice, make_optimizer, set_learning_rate, user_errors


def sample_groups(
    policy: Policy, prompts: list[Prompt], video_embeds: list[Tensor], cfg: GrpoConfig, step: int
) -> Rollout:
    """G completions per video, every prompt run once."""
    r = cfg.rollout
    return generate(
        policy, prompts, video_embeds, r.group_size, r.max_new_tokens, r.micro_batch_size, cfg.run.seed, step
    )


def score_groups(rollout: Rollout, cfg: GrpoConfig) -> tuple[list[Reward], Tensor]:
    """B rewards with their parts, and their totals (P, G)."""
    group_size = cfg.rollout.group_size
    rewards = [score(text, rollout.prompts[b // group_size].sample, cfg) for b, text in enumerate(rollout.texts)]
    totals_PG = torch.tensor([reward.total for reward in rewards], dtype=torch.float32).view(-1, group_size)
    return rewards, totals_PG


def update(
    policy: torch.nn.Module,
    reference: Policy | None,
    optimizer,
    rollout: Rollout,
    video_embeds: list[Tensor],
    advantages_PG: Tensor,
    cfg: GrpoConfig,
    run: Run,
) -> dict[str, float]:
    """One optimizer step on one rollout; returns sums over this process's tokens, and `grad_norm` and `gap_max`."""
    raw, group_size = run.accelerator.unwrap_model(policy), cfg.rollout.group_size
    completions, advantages_B = rollout.completions, advantages_PG.flatten()
    num_tokens = run.sums({"tokens": float(rollout.mask_BT.sum())})["tokens"]
    parts_of: dict[int, dict[str, float]] = {}  # by micro-batch: one that Run.backward repeats counts once
    gap_max = 0.0

    def loss_of(videos: slice) -> Tensor:
        nonlocal gap_max
        b = slice(videos.start * group_size, videos.stop * group_size)
        mask_BT, sampled_BT = rollout.mask_BT[b], rollout.logps_BT[b]
        num_columns = mask_BT.shape[1]
        packed = pack(rollout.prompts[videos], completions[videos], raw.model.config, raw.device)
        embeds = torch.cat(video_embeds[videos]) if cfg.model.freeze_vision else None
        ref_logps_BT = None
        if reference is not None:
            with torch.no_grad():
                ref_logps_BT = packed_logps(reference, packed, embeds, num_columns)[0]
        logps_BT, entropy_BT = packed_logps(policy, packed, embeds, num_columns)
        loss, parts = policy_loss(
            logps_BT,
            sampled_BT if cfg.loss.old_logps == "sampled" else logps_BT.detach(),
            advantages_B[b].to(raw.device),
            mask_BT,
            num_tokens,
            cfg.loss.clip_low,
            cfg.loss.clip_high,
            ref_logps_BT,
            cfg.loss.beta,
            cfg.loss.kl_clamp,
        )
        gap_BT = (logps_BT.detach() - sampled_BT).abs()
        gap_max = max(gap_max, gap_BT.max().item())
        parts |= {"loss": loss.detach(), "entropy": entropy_BT.sum(), "gap": gap_BT.sum()}
        parts_of[videos.start] = {name: value.item() for name, value in parts.items()}
        return loss

    policy.train()
    num, size = len(rollout.prompts), cfg.data.micro_batch_size
    run.backward(policy, [slice(i, min(i + size, num)) for i in range(0, num, size)], loss_of)
    names = ("loss", "kl", "clipped", "entropy", "gap")
    sums = {name: sum(parts[name] for parts in parts_of.values()) for name in names}
    return sums | {"grad_norm": run.step(policy, optimizer, cfg.optim.grad_clip), "gap_max": gap_max}


def step_metrics(
    rollout: Rollout, rewards: list[Reward], totals_PG: Tensor, stats: dict[str, float], run: Run
) -> dict[str, float]:
    """The step's metrics over all processes, from sums."""
    num_tokens = float(rollout.mask_BT.sum())
    sums = {name: stats[name] for name in ("loss", "kl", "clipped", "entropy", "gap")} | group_stats(totals_PG)
    sums |= {
        "num_completions": float(len(rewards)),
        "tokens": num_tokens,
        "prompt_tokens": float(sum(len(prompt.ids) for prompt in rollout.prompts)),
        "truncated": float(rollout.truncated_B.sum()),
        "total": sum(reward.total for reward in rewards),
    }
    for part in ("format", "answer", "iou"):
        having = [reward.parts[part] for reward in rewards if part in reward.parts]
        sums |= {f"sum_{part}": sum(having), f"num_{part}": float(len(having))}
    s = run.sums(sums)
    parts = {f"reward/{p}": s[f"sum_{p}"] / s[f"num_{p}"] for p in ("format", "answer", "iou") if s[f"num_{p}"]}
    return {
        "reward/total": s["total"] / s["num_completions"],
        **parts,
        "group/frac_mixed": s["num_mixed"] / s["num_groups"],
        "group/frac_all_good": s["num_all_good"] / s["num_groups"],
        "group/frac_all_bad": s["num_all_bad"] / s["num_groups"],
        "loss": s["loss"],
        "kl": s["kl"] / s["tokens"],
        "clip_frac": s["clipped"] / s["tokens"],
        "entropy": s["entropy"] / s["tokens"],
        "length/mean": s["tokens"] / s["num_completions"],
        "length/max": run.maximum(rollout.mask_BT.sum(1).max().item()),
        "frac_truncated": s["truncated"] / s["num_completions"],
        "logp_gap/mean": s["gap"] / s["tokens"],
        "logp_gap/max": run.maximum(stats["gap_max"]),
        "grad_norm": stats["grad_norm"],
        "tokens/prompt": s["prompt_tokens"],
        "tokens/completion": s["tokens"],
    }


def sample_rows(rollout: Rollout, rewards: list[Reward], step: int) -> list[dict]:
    """One row per video for samples.jsonl."""
    size = len(rewards) // len(rollout.prompts)
    return [
        {
            "step": step,
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
        check_precision(cfg.model.dtype)
        run = Run(cfg.run.dir, config.to_yaml(cfg), cfg.run.seed, cfg.run.tracker, resume, cfg.run.keep_checkpoints)
        local_slice(range(cfg.data.batch_size), run.accelerator)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed)
        raw = load_policy(cfg.model, cfg.rollout.temperature).to(run.accelerator.device)
        builder = make_builder(cfg, raw.tokenizer)
        validator = Validator(cfg, builder, run)
    reference = None
    if cfg.loss.beta > 0:
        reference = load_policy(cfg.model, cfg.rollout.temperature).to(run.accelerator.device).eval()
        reference.requires_grad_(False)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    clock = Clock()
    for step in tqdm(range(run.start_step, cfg.run.steps), desc="grpo", disable=not run.is_main):
        with clock("step"):
            lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
            with clock("data"):
                indices = batch_indices(len(samples), cfg.data.batch_size, step, cfg.run.seed)
                prompts = builder.many([samples[i] for i in local_slice(indices, run.accelerator)])
            with clock("vision"):
                video_embeds = raw.embed_each(prompts)
            with clock("rollout"):
                rollout = sample_groups(raw, prompts, video_embeds, cfg, step)
            with clock("reward"):
                rewards, totals_PG = score_groups(rollout, cfg)
                advantages_PG = group_advantages(totals_PG, cfg.loss.std_eps)
            with clock("update"):
                stats = update(policy, reference, optimizer, rollout, video_embeds, advantages_PG, cfg, run)
        metrics = step_metrics(rollout, rewards, totals_PG, stats, run) | {"lr": lr} | validator(step + 1, raw)
        times = clock.times()
        run.log(step + 1, metrics | times | {"tokens_per_s": metrics["tokens/completion"] / times["time/step"]})
        rows = sample_rows(rollout, rewards, step + 1)
        run.log_samples(rows)
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
