"""GRPO as pure tensor functions: group advantages, KL, the clipped loss and its variants, masks, group statistics.

No model, tokenizer or device in here. Letters: P prompts, G completions each, B = P * G, T tokens. Every variant is a
value of an argument or of `config.LossConfig`, named after what it does. The papers stand where their formulas do:

    GRPO      DeepSeekMath, arXiv 2402.03300          DAPO     arXiv 2503.14476
    Dr. GRPO  arXiv 2503.20783                        GSPO     arXiv 2507.18071
    RLOO      arXiv 2402.14740                        CISPO    MiniMax-M1, arXiv 2506.13585
"""

import torch
from torch import Tensor

from config import LossConfig


def completion_mask(tokens_BT: Tensor, eos_ids: list[int]) -> Tensor:
    """(B, T) bool: True up to and including the first of the EOS ids. EOS is an action; pad may be one of them.

    >>> completion_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), eos_ids=[8, 9]).tolist()
    [[True, True, False], [True, True, True]]
    """
    is_eos_BT = torch.isin(tokens_BT, torch.tensor(eos_ids, device=tokens_BT.device))
    return (is_eos_BT.cumsum(1) - is_eos_BT.long()) == 0


def group_advantages(
    rewards_PG: Tensor,
    eps: float = 1e-6,
    baseline: str = "group_mean",
    scale: str = "group_std",
    tolerance: float = 0.0,
) -> Tensor:
    """Advantages (P, G): (R - baseline) / (std + eps), every standard deviation with ddof 1.

    `baseline`: group_mean (DeepSeekMath 4.1.2), or leave_one_out, the mean of the group's others (RLOO's estimator).
    `scale`: group_std (DeepSeekMath 4.1.2); batch_std, of all rewards given (Lite PPO, arXiv 2508.08221); none
    (Dr. GRPO 3.2). A group whose standard deviation is at most `tolerance` is dead: exactly 0.

    >>> group_advantages(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), eps=0.0).tolist()
    [[-0.7071067690849304, 0.7071067690849304], [0.0, 0.0]]
    """
    if baseline not in ("group_mean", "leave_one_out"):
        raise ValueError(f"baseline {baseline!r} is not one of group_mean, leave_one_out")
    shifted_PG = rewards_PG - rewards_PG[:, :1]  # exactly 0 in a dead group, where the mean of equal rewards may be off
    centred_PG = shifted_PG - shifted_PG.mean(1, keepdim=True)
    std_P1 = shifted_PG.std(1, keepdim=True)
    group_size = rewards_PG.shape[1]
    if baseline == "leave_one_out":
        centred_PG = centred_PG * (group_size / (group_size - 1))
    if scale == "group_std":
        centred_PG = centred_PG / (std_P1 + eps)
    elif scale == "batch_std":
        centred_PG = centred_PG / (rewards_PG.std() + eps)
    elif scale != "none":
        raise ValueError(f"scale {scale!r} is not one of group_std, batch_std, none")
    return torch.where(std_P1 > tolerance, centred_PG, 0.0)


def overlong_penalty(lengths_B: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """Soft overlong punishment (B,), DAPO eq. 13: 0 up to max_tokens - buffer tokens, then linear to -1 at max_tokens.

    >>> overlong_penalty(torch.tensor([6, 8, 10]), max_tokens=10, buffer=4).tolist()
    [0.0, -0.5, -1.0]
    """
    return ((max_tokens - buffer - lengths_B) / buffer).clamp(-1.0, 0.0)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3", clamp: float = 10.0) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, same shape as `logps`.

    With r = ref_logps - logps, clamped to +-`clamp` (Schulman 2020, joschu.net/blog/kl-approx.html):
    k1 = -r, unbiased, but in a loss its gradient is that of log-probs alone and says nothing about the reference;
    k2 = r^2 / 2, biased, and its gradient is the KL's own;
    k3 = exp(r) - r - 1, unbiased and never negative (DeepSeekMath eq. 4); in a loss its expected gradient is that of
    KL(reference || policy).

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5])).item()  # exp(-0.5) + 0.5 - 1
    0.10653066635131836
    """
    r = (ref_logps - logps).clamp(-clamp, clamp)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    if kind == "k3":
        return r.exp() - r - 1
    raise ValueError(f"KL estimate {kind!r} is not one of k1, k2, k3")


def token_weights(
    mask_BT: Tensor, aggregation: str, num_tokens: float, num_completions: float, max_tokens: int
) -> Tensor:
    """Weight (B, T), float64, of each completion token in the loss; 0 outside the mask.

    token_mean: 1 / num_tokens (DAPO eq. 12); sequence_mean: 1 / |o_i| / num_completions (DeepSeekMath eq. 3);
    constant: 1 / (num_completions * max_tokens) (Dr. GRPO, its listing 1). `num_tokens` and `num_completions` count
    the whole step, over all micro-batches and processes: so the gradient does not depend on how it is cut.

    >>> token_weights(torch.tensor([[True, True], [True, False]]), "sequence_mean", 3, 2, 2).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    mask_BT = mask_BT.double()
    if aggregation == "token_mean":
        return mask_BT / max(num_tokens, 1)
    if aggregation == "sequence_mean":
        return mask_BT / mask_BT.sum(1, keepdim=True).clamp_min(1) / num_completions
    if aggregation == "constant":
        return mask_BT / (num_completions * max_tokens)
    raise ValueError(f"aggregation {aggregation!r} is not one of token_mean, sequence_mean, constant")


def policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    weights_BT: Tensor,
    cfg: LossConfig,
    ref_logps_BT: Tensor | None = None,
    entropy_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of weight x (surrogate + beta x KL - entropy coefficient x entropy); DeepSeekMath eq. 3.

    `cfg.ratio` says what r is, the ratio of the policy to the one that sampled. `token` takes it per token. `sequence`
    takes exp of the mean log-ratio of the completion's tokens (GSPO eq. 7). `cfg.clip` says what becomes of r, where
    c(r) is r clipped to [1 - clip_low, 1 + clip_high]. `ppo` is -min(r A, c(r) A), which with clip_high > clip_low is
    DAPO's eq. 10. `none` is -r A. `cispo` is -sg(c(r)) A log p, where sg stops the gradient (MiniMax-M1 eq. 4 and 5).
    `ref_logps_BT` is read where `cfg.beta` is not 0, `entropy_BT` where `cfg.entropy` is not. What lies outside
    `mask_BT` has no influence.

    Returns the loss and, without gradient, sums over tokens: `kl`, and `clipped`, the tokens whose clip is active.
    """
    zero = logps_BT.new_zeros(())
    log_ratio_BT = torch.where(mask_BT, logps_BT - torch.where(mask_BT, old_logps_BT, zero), zero)
    if cfg.ratio == "sequence":
        log_ratio_B1 = log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp_min(1)
        ratio_BT = log_ratio_B1.exp().expand_as(log_ratio_BT)
    elif cfg.ratio == "token":
        ratio_BT = log_ratio_BT.exp()
    else:
        raise ValueError(f"ratio {cfg.ratio!r} is not one of token, sequence")
    advantages_B1 = advantages_B[:, None]
    clipped_BT = ratio_BT.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.clip == "ppo":
        surrogate_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
        is_clipped_BT = clipped_BT * advantages_B1 < ratio_BT * advantages_B1
    elif cfg.clip == "cispo":
        surrogate_BT = -clipped_BT.detach() * advantages_B1 * torch.where(mask_BT, logps_BT, zero)
        is_clipped_BT = (clipped_BT != ratio_BT) & (advantages_B1 != 0)
    elif cfg.clip == "none":
        surrogate_BT = -ratio_BT * advantages_B1
        is_clipped_BT = torch.zeros_like(mask_BT)
    else:
        raise ValueError(f"clip {cfg.clip!r} is not one of ppo, cispo, none")
    per_token_BT, kl_BT = surrogate_BT, torch.zeros_like(logps_BT)
    if cfg.beta:
        pair = (torch.where(mask_BT, x, zero) for x in (logps_BT, ref_logps_BT))
        kl_BT = kl_estimate(*pair, cfg.kl, cfg.kl_clamp)
        per_token_BT = per_token_BT + cfg.beta * kl_BT
    if cfg.entropy:
        per_token_BT = per_token_BT - cfg.entropy * torch.where(mask_BT, entropy_BT, zero)
    sums = {"kl": (kl_BT.detach() * mask_BT).sum(), "clipped": (is_clipped_BT & mask_BT).sum().to(logps_BT.dtype)}
    return (per_token_BT * weights_BT.to(logps_BT.dtype)).sum(), sums


def group_std(rewards_PG: Tensor) -> Tensor:
    """(P,) standard deviation (ddof 1) of each group's rewards, exactly 0 where they are equal; nan for G = 1.

    >>> group_std(torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.5, 1.0]])).tolist()
    [0.0, 0.5]
    """
    return (rewards_PG - rewards_PG[:, :1]).std(1)  # less the first: the mean of equal rewards may be off


def is_mixed(rewards_PG: Tensor, tolerance: float = 5e-4) -> Tensor:
    """(P,) bool: groups whose rewards differ, by a standard deviation (ddof 1) above `tolerance`."""
    return group_std(rewards_PG) > tolerance


def is_nearly_equal(rewards_PG: Tensor, tolerance: float, rounding: float = 1e-6) -> Tensor:
    """(P,) bool: groups whose rewards differ by more than rounding, and are not mixed all the same.

    >>> is_nearly_equal(torch.tensor([[0.5, 0.5], [0.5, 0.5001], [0.5, 0.6]]), 5e-4).tolist()
    [False, True, False]
    """
    return ~is_mixed(rewards_PG, tolerance) & (group_std(rewards_PG) > rounding)


def group_stats(
    rewards_PG: Tensor, right_PG: Tensor | None = None, tolerance: float = 5e-4, good: float = 0.999
) -> dict[str, float]:
    """Counts of groups: `mixed` ones carry a signal; the others may be `all_good` or `all_bad`.

    `right_PG`, by default the rewards, says how right each completion is, from 0 to 1. A group that is not mixed is
    all good when the mean of that reaches `good`, all bad when it is at most 1 - `good`; the three need not add up
    to P.
    """
    mixed_P = is_mixed(rewards_PG, tolerance)
    mean_P = (rewards_PG if right_PG is None else right_PG).mean(1)
    return {
        "mixed": float(mixed_P.sum()),
        "all_good": float((~mixed_P & (mean_P >= good)).sum()),
        "all_bad": float((~mixed_P & (mean_P <= 1 - good)).sum()),
    }
