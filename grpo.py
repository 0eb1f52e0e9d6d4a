"""GRPO as pure tensor functions: group advantages, KL, the clipped loss, masks and group statistics.

No model, tokenizer, config or device in here. Letters: P prompts, G completions each, B = P * G, T tokens.
GRPO is arXiv 2402.03300 (DeepSeekMath), DAPO is arXiv 2503.14476.
"""

import torch
from torch import Tensor


def completion_mask(tokens_BT: Tensor, eos_ids: list[int]) -> Tensor:
    """(B, T) bool: True up to and including the first of the EOS ids. EOS is an action; pad may be one of them.

    >>> completion_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), eos_ids=[8, 9]).tolist()
    [[True, True, False], [True, True, True]]
    """
    is_eos_BT = torch.isin(tokens_BT, torch.tensor(eos_ids, device=tokens_BT.device))
    return (is_eos_BT.cumsum(1) - is_eos_BT.long()) == 0


def group_advantages(rewards_PG: Tensor, eps: float = 1e-6) -> Tensor:
    """Advantages (P, G): (R - mean) / (std + eps) within each group, std with ddof 1. DeepSeekMath 4.1.2.

    >>> group_advantages(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), eps=0.0).nan_to_num().tolist()
    [[-0.7071067690849304, 0.7071067690849304], [0.0, 0.0]]
    """
    shifted_PG = rewards_PG - rewards_PG[:, :1]  # exactly 0 in a dead group, where the mean of equal rewards may be off
    centred_PG = shifted_PG - shifted_PG.mean(1, keepdim=True)
    return centred_PG / (shifted_PG.std(1, keepdim=True) + eps)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3", clamp: float = 10.0) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, same shape as `logps`.

    k3 = exp(r) - r - 1 with r = ref_logps - logps, clamped to +-`clamp`: DeepSeekMath eq. 4; unbiased, never negative.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5])).item()  # exp(-0.5) + 0.5 - 1
    0.10653066635131836
    """
    if kind != "k3":
        raise ValueError(f"KL estimate {kind!r} is not k3")
    r = (ref_logps - logps).clamp(-clamp, clamp)
    return r.exp() - r - 1


def policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    denominator: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logps_BT: Tensor | None = None,
    beta: float = 0.0,
    kl_clamp: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with KL penalty, summed over completion tokens and divided by `denominator`.

    DeepSeekMath eq. 3; with clip_high > clip_low DAPO's eq. 10; with the step's number of completion tokens (over all
    micro-batches and processes) as the denominator, DAPO's token mean (eq. 12). Returns the loss and, without
    gradient, sums over tokens: `kl`, `clipped` (tokens whose ratio is clipped against its advantage).
    """
    mask_BT = mask_BT.to(logps_BT.dtype)
    advantages_B1 = advantages_B[:, None]
    ratio_BT = (logps_BT - old_logps_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    per_token_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    kl_BT = torch.zeros_like(logps_BT)
    if beta:
        kl_BT = kl_estimate(logps_BT, ref_logps_BT, clamp=kl_clamp)
        per_token_BT = per_token_BT + beta * kl_BT
    with torch.no_grad():
        is_clipped_BT = (clipped_BT * advantages_B1 < ratio_BT * advantages_B1).to(mask_BT.dtype)
        sums = {"kl": (kl_BT * mask_BT).sum(), "clipped": (is_clipped_BT * mask_BT).sum()}
    return (per_token_BT * mask_BT).sum() / denominator, sums


def group_stats(rewards_PG: Tensor, tolerance: float = 1e-4, good: float = 0.999) -> dict[str, float]:
    """Counts of groups, for sums over processes: those that carry a signal, and those that do not.

    A group is mixed when the standard deviation (ddof 1) of its total rewards exceeds `tolerance`; a dead one is all
    good when its mean reaches `good`, else all bad when it is below 1 - `good`, so the three need not add up to P.
    """
    std_P, mean_P = rewards_PG.std(1), rewards_PG.mean(1)
    dead_P = std_P <= tolerance
    return {
        "num_groups": float(len(rewards_PG)),
        "num_mixed": float((~dead_P).sum()),
        "num_all_good": float((dead_P & (mean_P >= good)).sum()),
        "num_all_bad": float((dead_P & (mean_P <= 1 - good)).sum()),
    }
