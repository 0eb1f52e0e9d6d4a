"""A step's groups: what was sampled, what it earned, and which of it is trained on with what advantages.

Not the loop, which samples more groups until enough of them have a signal (train_grpo.py), and no formulas (grpo.py).
Letters: P prompts of this process, G completions each, B = P * G, T tokens, N groups of all processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from config import GrpoConfig
from grpo import group_advantages, is_mixed, overlong_penalty
from reward_functions import score_all
from rewards import Reward, task_reward
from rollout import Rollout


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
