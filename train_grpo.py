"""The GRPO loop: batch, rollout, reward, advantage, update. Start reading here.

    python train_grpo.py --config configs/tiny.yaml loss.beta=0.0
    python train_grpo.py --config configs/tiny.yaml configs/dapo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml train_grpo.py --config configs/tiny.yaml

By default: std-normalised group advantages, clipped surrogate, k3 KL in the loss, token mean over the step, one update
per rollout (so the ratio is 1 and the loss is about 0 whatever the policy learns: watch the rewards, not the loss).
The variants are values of the sections `loss` and `group`, see grpo.py; metrics are defined in docs/metrics.md.
Letters: P prompts of this process, G completions each, B = P * G, T tokens, N groups of all processes.
"""

from dataclasses import dataclass
from functools import partial

from config import GrpoConfig, LossConfig
from runtime.arguments import from_command_line, user_errors

if __name__ == "__main__":  # here, so that a misspelt key is told before torch is imported, which takes seconds
    from_command_line(GrpoConfig, None, __doc__, "configs/tiny.yaml")

import torch
from torch import Tensor

from data import Loader, make_reader
from groups import Batch, choose_groups, loss_mask, sample_groups
from grpo import policy_loss, token_weights
from metrics.validation import Validator
from model.folder import save_model
from model.optim import make_optimizer, set_learning_rate
from policy import Packed, Policy, load_policy, pack, packed_logps
from preflight import plan
from preflight.selfcheck import check_model, check_ranks, open_run
from records.files import read_samples
from reward_functions import failures_in, load_functions
from rollout import Rollout
from runtime.clock import Clock
from runtime.run import Run
from runtime.signals import interruptible
from step_log import Alarm, UpdateStats, frac_nearly_equal, print_step, sample_rows, step_metrics


@dataclass
class MicroBatch:
    """The groups of one forward and backward pass, B completions of up to T tokens in one row."""

    row: Packed
    video_embeds: tuple[Tensor, ...] | None  # of each video; None where the tower is trained, and runs in each pass
    mask_BT: Tensor  # tokens that count in the loss
    weights_BT: Tensor  # of each token in the loss
    advantages_B: Tensor
    sampled_logps_BT: Tensor
    old_logps_BT: Tensor | None  # those that the ratio is taken to; None until the first pass has given them
    ref_logps_BT: Tensor | None = None

    def logps(self, policy: torch.nn.Module, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (B, T) under a policy, which may be wrapped."""
        embeds = None if self.video_embeds is None else torch.cat(self.video_embeds)
        return packed_logps(policy, self.row, embeds, self.mask_BT.shape[1], entropy_grad)


def micro_batches(policy: Policy, rollout: Rollout, batch: Batch, cfg: GrpoConfig, run: Run) -> list[MicroBatch]:
    """The groups that this process trains on, laid out: what is sent to a device waits until it has computed.

    A process with nothing to train on gets its first group with weight 0, to make the same calls as the others.
    """
    chosen, size = batch.mine or [0], cfg.data.micro_batch_size
    rollout = rollout.take(chosen)
    completions, mask_BT = rollout.completions, loss_mask(rollout, cfg)
    weights_BT = token_weights(
        mask_BT, cfg.loss.aggregation, batch.num_tokens, batch.num_completions, cfg.rollout.max_new_tokens
    )
    weights_BT = weights_BT if batch.mine else torch.zeros_like(weights_BT)
    advantages_B = batch.advantages_PG[chosen].flatten().to(policy.device)
    slices = [slice(i, i + size) for i in range(0, len(chosen), size)]
    num_tokens = [sum(len(tokens) for group in completions[videos] for tokens in group) for videos in slices]
    most_tokens = int(run.engine.maximum(max(num_tokens)))
    parts = []
    for videos in slices:
        rows = slice(videos.start * rollout.group_size, videos.stop * rollout.group_size)
        part = MicroBatch(
            row=pack(rollout.prompts[videos], completions[videos], policy.model.config, policy.device, most_tokens),
            video_embeds=rollout.video_embeds[videos] if policy.vision_is_frozen else None,
            mask_BT=mask_BT[rows],
            weights_BT=weights_BT[rows],
            advantages_B=advantages_B[rows],
            sampled_logps_BT=rollout.logps_BT[rows],
            old_logps_BT=rollout.logps_BT[rows] if cfg.loss.old_logps == "sampled" else None,
        )
        parts.append(part)
    return parts


def loss_of(policy: torch.nn.Module, part: MicroBatch, cfg: LossConfig, stats: UpdateStats) -> Tensor:
    """Loss of one pass, whose sums go to `stats`. The first pass sets the old log-probs, if they are the policy's."""
    mask_BT = part.mask_BT
    logps_BT, entropy_BT = part.logps(policy, entropy_grad=cfg.entropy != 0)
    if part.old_logps_BT is None:
        part.old_logps_BT = logps_BT.detach()
    given = (part.advantages_B, mask_BT, part.weights_BT, cfg, part.ref_logps_BT, entropy_BT)
    loss, sums = policy_loss(logps_BT, part.old_logps_BT, *given)
    is_first_update = not stats.grad_norms
    gap_BT = (logps_BT.detach() - part.sampled_logps_BT).abs() * mask_BT * is_first_update
    sums |= {"loss": loss.detach(), "entropy": (entropy_BT.detach() * mask_BT).sum()}
    stats.passes.append(sums | {"tokens": mask_BT.sum(), "gap": gap_BT.sum(), "gap_max": gap_BT.max()})
    return loss


def update(
    policy: torch.nn.Module,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    batch: Batch,
    cfg: GrpoConfig,
    run: Run,
) -> UpdateStats:
    """The optimizer steps on one rollout. Without a group to train on, on any process, nothing is done.

    The old log-probs are the policy's own of the first pass, unless `loss.old_logps` says otherwise.
    """
    stats = UpdateStats(trained=len(batch.trained))
    if not batch.trained:
        return stats
    parts = micro_batches(run.engine.unwrap(policy), rollout, batch, cfg, run)
    policy.train()
    for part in run.engine.evened(parts) if reference is not None else ():
        with torch.no_grad(), reference.adapter_off(), run.engine.watchdog.meeting():
            part.ref_logps_BT, _ = part.logps(reference)
    for _ in range(cfg.loss.updates_per_rollout):
        run.engine.backward(policy, parts, partial(loss_of, policy, cfg=cfg.loss, stats=stats))
        grad_norm = run.engine.step(policy, optimizer, cfg.optim.grad_clip)
        stats.end_update(grad_norm, num_own=len(parts) if batch.mine else 0)
    return stats


def load_reference(policy: Policy, cfg: GrpoConfig, run: Run) -> Policy | None:
    """The policy as it was at the start, for the KL; with LoRA it is the policy itself, its adapter switched off."""
    if not cfg.loss.beta or cfg.model.lora_rank:
        return policy if cfg.loss.beta else None
    reference = load_policy(cfg.model, cfg.rollout.temperature).requires_grad_(False).eval()
    return run.engine.prepare_frozen(reference)


def train(cfg: GrpoConfig, resume: bool = False) -> Run:
    with user_errors():
        run = open_run(cfg, resume)
        functions = load_functions(cfg.rewards.functions)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        raw = load_policy(cfg.model, cfg.rollout.temperature).to(run.engine.device)
        check_ranks(raw, samples, cfg, run)
        reader = make_reader(cfg, raw.tokenizer, raw.device)
        validator = Validator(cfg, reader, run, samples)
        clock = Clock(run.engine.phase)
        loader = Loader(samples, reader, cfg, run, clock)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    reference = load_reference(raw, cfg, run)
    alarm = Alarm(cfg.group.warn_after, run.state.get("alarm"))
    with reader.workers, run.stoppable(), failures_in(run.dir):
        with user_errors():
            start = None if run.start_step else reference  # what the policy must equal
            check_model(policy, start, loader.peek(run.start_step), reader, cfg, run)
        for step in run.steps("grpo"):
            with clock("step"):
                lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
                with run.engine.whole_weights(cfg.model.gather_weights) as whole:
                    rollout, rewards = sample_groups(raw, loader, functions, step, cfg, run, synced=not whole)
                batch = choose_groups(rewards, cfg)
                with clock("update"):
                    stats = update(policy, reference, optimizer, rollout, batch, cfg, run)
            metrics = step_metrics(rollout, rewards, stats, functions, cfg, run)
            metrics |= {"data/num_replaced": loader.num_replaced, "data/num_active": len(loader.samples), "lr": lr}
            metrics |= validator(step + 1, raw) | clock.read()
            run.log(step + 1, metrics | {"tokens_per_s": metrics["tokens/completion"] / metrics["time/step"]})
            rows = sample_rows(rollout, rewards, batch, step + 1)
            run.log_samples(rows)
            warnings = alarm(metrics, frac_nearly_equal(rewards, cfg))
            if run.is_main:
                print_step(step + 1, metrics, rows, warnings, cfg.run, run)
            run.check_finite(step + 1, [row | {"trained": row["group"] in batch.trained} for row in rows])
            del rollout  # the next step needs the memory of its videos' patches
            if run.save_due(step + 1):
                run.save_checkpoint(step + 1, validator.state | loader.state | loader.order.state | alarm.state)
    run.finish(lambda folder, weights: save_model(raw.model, raw.adapter, folder, cfg.model.path, weights))
    return run


def main(argv: list[str] | None = None) -> Run | None:
    cfg, resume, planned = from_command_line(GrpoConfig, argv, __doc__, "configs/tiny.yaml")
    if planned:
        with user_errors():
            return plan.show(cfg, planned)
    with interruptible():
        run = train(cfg, resume)
    run.die_if_stopped()
    return run


if __name__ == "__main__":
    main()
