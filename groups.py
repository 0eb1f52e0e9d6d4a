"""A step's groups: G completions of each video, what they earned, and which are trained on with what advantages.

The loop is in train_grpo.py, the formulas are in grpo.py. Letters: P prompts of this process, G completions each,
B = P * G, T tokens, N groups of all processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import GrpoConfig
from data import Loader, refill_indices
from grpo import group_advantages, is_mixed, overlong_penalty
from policy import Policy
from reward_functions import RewardFunction, score_all
from rewards import Reward, task_reward
from rollout import Rollout, generate
from runtime.run import Run


@dataclass(frozen=True)
class Scores:
    """Four numbers of every completion of some groups, each (groups, G) float32."""

    total: Tensor  # rewards, penalties included: what advantages are made of
    earned: Tensor  # rewards before the penalty for overlong completions: a group is dead when these are equal
    right: Tensor  # the task's own parts alone, 1 for a perfect answer
    tokens: Tensor  # completion tokens that count in the loss


@dataclass(frozen=True)
class GroupRewards:
    """What one step's completions earned: those of this process with their parts, and everybody's scores.

    The N groups of all processes stand in the order they were sampled in. What is decided from `scores` is therefore
    decided alike on all processes.
    """

    rewards: list[Reward]  # B
    places: list[int]  # P: the place of each of this process's groups among the N
    scores: Scores  # (N, G)
    num_refills: int


@dataclass(frozen=True)
class Batch:
    """The groups that a step trains on, as places among the N, and their advantages."""

    groups: list[int]  # data.batch_size of them, dead ones included: they count in the loss's denominator
    trained: list[int]  # those of them that the update runs on
    mine: list[int]  # this process's groups p that it runs on
    advantages_NG: Tensor  # 0 for a group that is dead or not in the batch
    advantages_PG: Tensor  # the same of this process's groups
    num_tokens: float  # in the loss, of the whole batch
    num_completions: float  # that have such tokens


def sample_groups(
    policy: Policy,
    loader: Loader,
    functions: Sequence[RewardFunction],
    step: int,
    cfg: GrpoConfig,
    run: Run,
    synced: bool = False,
) -> tuple[Rollout, GroupRewards]:
    """Sample a step's groups and score them. While some are dead and rounds are left, further videos are sampled.

    `policy` is the unwrapped model; `synced` as for rollout.generate. The videos of a round are shared out evenly.
    Where they do not divide, the last one is sampled more than once, and once kept, so that all processes make the
    same calls.
    """
    clock, size = loader.clock, cfg.rollout.group_size
    rollouts, rewards, places, packed, indices = [], [], [], [], []
    num_groups = num_refills = 0
    with clock("data"):
        batch = loader.batch(step)
    while True:
        with clock("vision"):
            embeds = policy.embed_each(batch.prompts)
        with clock("rollout"):
            rollout = generate(
                policy, batch.prompts, embeds, cfg.rollout, cfg.run.seed, step, batch.occurrences, synced
            )
        packed_PG4, num_own = torch.zeros(len(batch.prompts), size, 4), len(batch.places)
        if num_own:
            rollouts.append(rollout.take(range(num_own)))
            with clock("reward"):
                scored, packed_PG4[:num_own] = score_groups(rollouts[-1], functions, cfg, step)
            rewards += scored
        places += [num_groups + place for place in batch.places]
        packed.append(run.engine.gather(packed_PG4)[: batch.num_places])
        indices += batch.indices
        num_groups += batch.num_places
        scores = Scores(*torch.cat(packed).unbind(2))
        alive_N = is_alive(scores, cfg)
        num_missing, wanted = cfg.data.batch_size - int(alive_N.sum()), []
        if num_missing and num_refills < cfg.group.max_refills:
            wanted = refill_indices(len(loader.samples), batch.taken, num_missing, step, num_refills + 1, cfg.run.seed)
        if not wanted:
            loader.order.visited(indices, alive_N.tolist())
            return Rollout.join(rollouts), GroupRewards(rewards, places, scores, num_refills)
        num_refills += 1
        with clock("data"):
            batch = loader.refill(step, num_refills, wanted, batch.taken)


def score_groups(
    rollout: Rollout, functions: Sequence[RewardFunction], cfg: GrpoConfig, step: int
) -> tuple[list[Reward], Tensor]:
    """B rewards with their parts, and the fields of `Scores`, packed as (P, G, 4) for one collective call."""
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
    packed_B4 = torch.stack([*torch.tensor(numbers, dtype=torch.float32), tokens_B.float()], dim=1)
    return rewards, packed_B4.view(-1, rollout.group_size, 4)


def loss_mask(rollout: Rollout, cfg: GrpoConfig) -> Tensor:
    """(B, T) bool: the completion tokens that count in the loss."""
    drop_truncated = cfg.loss.truncated == "mask"
    return rollout.mask_BT & ~rollout.truncated_B[:, None] if drop_truncated else rollout.mask_BT


def is_alive(scores: Scores, cfg: GrpoConfig) -> Tensor:
    """(N,) bool: groups with a signal: rewards that differ, and tokens to put it on."""
    return is_mixed(scores.earned, cfg.group.tolerance) & (scores.tokens.sum(1) > 0)


def choose_groups(rewards: GroupRewards, cfg: GrpoConfig) -> Batch:
    """The step's batch: live groups first, then dead ones, which count in the loss's denominator.

    So skipping the dead changes no gradient (but for their KL and entropy terms).
    """
    scores, loss = rewards.scores, cfg.loss
    alive_N, has_tokens_N = is_alive(scores, cfg), scores.tokens.sum(1) > 0
    groups = torch.argsort(~alive_N, stable=True)[: cfg.data.batch_size].tolist()
    trained = [n for n in groups if alive_N[n] or (has_tokens_N[n] and not cfg.group.skip_dead)]
    advantages_NG = torch.zeros_like(scores.total)
    advantages_NG[groups] = group_advantages(
        scores.total[groups], loss.std_eps, loss.baseline, loss.scale, cfg.group.tolerance
    )
    advantages_NG *= alive_N[:, None]
    tokens_NG = scores.tokens[groups]
    return Batch(
        groups=groups,
        trained=trained,
        mine=[p for p, n in enumerate(rewards.places) if n in trained],
        advantages_NG=advantages_NG,
        advantages_PG=advantages_NG[rewards.places],
        num_tokens=tokens_NG.sum().item(),
        num_completions=(tokens_NG > 0).sum().item(),
    )
