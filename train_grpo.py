"""The GRPO loop: batch, rollout, reward, advantage, update. Start reading here.

    python train_grpo.py --config configs/tiny.yaml loss.beta=0.0
    python train_grpo.py --config configs/tiny.yaml configs/dapo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml train_grpo.py --config configs/tiny.yaml

By default: std-normalised group advantages, clipped surrogate, k3 KL in the loss, token mean over the step, one update
per rollout (so the ratio is 1 and the loss is about 0 whatever the policy learns: watch the rewards, not the loss).
The variants are values of the sections `loss` and `group`, see grpo.py; metrics are defined in README.md.
Letters: P prompts of this process, G completions each, B = P * G, T tokens, N groups of all processes.
"""

import math
from collections import defaultdict
from functools import partial

from config import GrpoConfig
from runtime.arguments import from_command_line, user_errors

if __name__ == "__main__":  # here, so that a misspelt key is told before torch is imported, which takes seconds
    from_command_line(GrpoConfig, None, __doc__, "configs/tiny.yaml")

import torch

import config
from data import Loader, make_reader, refill_indices
from groups import Groups, choose_groups, is_alive, loss_mask, score_groups
from grpo import policy_loss, token_weights
from metrics.validation import Validator
from model.folder import save_model
from model.optim import make_optimizer, set_learning_rate
from policy import Policy, load_policy, pack, packed_logps
from preflight import plan
from preflight.selfcheck import check_model, check_ranks
from records.files import read_samples
from reward_functions import failures_in, load_functions
from rollout import Rollout, generate
from runtime.clock import Clock
from runtime.engine import check_batch, check_engine
from runtime.run import Run
from runtime.signals import die_of, interruptible
from step_log import Alarm, batch_rows, frac_nearly_equal, print_step, sample_rows, step_metrics


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
        wanted = []
        if num_missing and num_refills < cfg.group.max_refills:
            wanted = refill_indices(len(loader.samples), batch.taken, num_missing, step, num_refills + 1, cfg.run.seed)
        if not wanted:
            loader.order.visited(indices, alive_N.tolist())
            rollout = Rollout.join(rollouts)
            return Groups(rollout, video_embeds, rewards, own, totals_NG, earned_NG, right_NG, tokens_NG, num_refills)
        num_refills += 1
        with clock("data"):
            batch = loader.refill(step, num_refills, wanted, batch.taken)


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
    tokens_P = [sum(map(len, group)) for group in completions]
    most_tokens = int(run.engine.maximum(max(sum(tokens_P[videos]) for videos in micro_batches)))
    rows = {  # all laid out before the first pass: what is sent to a device waits until it has computed
        videos.start: pack(rollout.prompts[videos], completions[videos], raw.model.config, raw.device, most_tokens)
        for videos in micro_batches
    }
    old_of, ref_of, updates = {}, {}, []  # log-probs by micro-batch; by update the sums of its passes

    def loss_of(videos: slice) -> torch.Tensor:
        b = slice(videos.start * group_size, videos.stop * group_size)
        embeds = torch.cat(embeds_of[videos]) if raw.vision_is_frozen else None
        scored = (rows[videos.start], embeds, mask_BT.shape[1])
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
        updates[-1].append(sums)
        return loss

    policy.train()
    for _ in range(loss_cfg.updates_per_rollout):
        updates.append([])
        run.engine.backward(policy, micro_batches, loss_of)
        norm = run.engine.step(policy, optimizer, cfg.optim.grad_clip)
        stats["grad_norm"] += norm / loss_cfg.updates_per_rollout
        stats["num_skipped"] += not math.isfinite(norm)
        stats["clipped"] = 0.0  # of the last update: in the first one the ratio is 1
        for sums in fetch(updates[-1][: len(micro_batches)]) if mine else ():  # the others had weight 0
            stats["gap_max"] = max(stats["gap_max"], sums.pop("gap_max"))
            for name, value in sums.items():
                stats[name] += value
    return stats


def fetch(passes: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """The numbers of all passes at once: a device that is asked for each of them stands still as often.

    >>> fetch([{"kl": torch.tensor(0.5), "num": torch.tensor(3)}, {"kl": torch.tensor(1.5), "num": torch.tensor(4)}])
    [{'kl': 0.5, 'num': 3.0}, {'kl': 1.5, 'num': 4.0}]
    """
    values = torch.stack([value.double() for sums in passes for value in sums.values()])
    return [dict(zip(passes[0], row, strict=True)) for row in values.view(len(passes), -1).tolist()]


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
        run.caution(config.cautions(cfg))
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
                    groups = collect_groups(raw, loader, functions, cfg, step, run, clock, synced=not whole)
                with clock("update"):
                    stats = update(policy, reference, optimizer, groups, cfg, run)
            metrics = step_metrics(groups, stats, functions, cfg, run) | {"data/num_replaced": loader.num_replaced}
            metrics |= {"data/num_active": len(loader.samples), "lr": lr} | validator(step + 1, raw)
            metrics |= clock.read()
            run.log(step + 1, metrics | {"tokens_per_s": metrics["tokens/completion"] / metrics["time/step"]})
            rows = sample_rows(groups, step + 1, cfg)
            run.log_samples(rows)
            warnings = alarm(metrics, frac_nearly_equal(groups, cfg))
            if run.is_main:
                print_step(step + 1, metrics, rows, warnings, cfg.run, run)
            run.check_finite(step + 1, partial(batch_rows, groups, cfg, step + 1))
            del groups  # the next step needs the memory of its videos' patches
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
    if run.stop_signal is not None:
        die_of(run.stop_signal)
    return run


if __name__ == "__main__":
    main()
