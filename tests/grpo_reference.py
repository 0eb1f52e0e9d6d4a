"""Plain numpy loops written from the papers, and a batch with every case in it, for the tests of grpo.py."""

import numpy as np
import pytest
import torch

from config import LossConfig
from grpo import (
    policy_loss,
    token_weights,
)

B, T, MAX_TOKENS = 12, 6, 9  # MAX_TOKENS is the limit of the sampler, T the longest completion of the batch
LN2 = float(np.log(2))
AGGREGATIONS, RATIOS, KLS = ("sequence_mean", "token_mean", "constant"), ("token", "sequence"), ("k1", "k2", "k3")
BASELINES, SCALES = ("group_mean", "leave_one_out"), ("group_std", "batch_std", "none")
CLIPS = {
    "symmetric": dict(clip="ppo", clip_low=0.2, clip_high=0.2),
    "asymmetric": dict(clip="ppo", clip_low=0.2, clip_high=0.3),
    "none": dict(clip="none"),
    "cispo": dict(clip="cispo", clip_low=0.2, clip_high=0.3),
}


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch() -> dict[str, np.ndarray]:
    """Completions of 1, T, 0 and 3 tokens, the last of advantage 0, then a mean ratio in each range of either clip
    under an advantage of either sign."""
    rng = np.random.default_rng(0)
    lengths_B = np.array([1, T, 0, 3, 2, 5, 4, T, 3, 2, 5, 4])
    advantages_B = rng.uniform(0.3, 3, B) * np.array([1, -1, 1, 0, 1, 1, 1, 1, -1, -1, -1, -1])
    mean_ratios_B = np.array([1.4, 0.7, 1, 1.4, 1.5, 1.25, 1.05, 0.6, 1.5, 1.25, 1.05, 0.6])
    mask_BT = np.arange(T) < lengths_B[:, None]
    noise_BT = rng.normal(0, 0.3, (B, T)) * mask_BT
    noise_BT -= noise_BT.sum(1, keepdims=True) / np.maximum(lengths_B, 1)[:, None]
    logps_BT = -rng.uniform(0.01, 4, (B, T))
    return {
        "logps": logps_BT,
        "old": logps_BT - np.log(mean_ratios_B)[:, None] + noise_BT,
        "ref": logps_BT + rng.normal(0, 0.7, (B, T)),
        "entropy": rng.uniform(0, 2, (B, T)),
        "advantages": advantages_B,
        "mask": mask_BT,
    }


def reference_weights(mask, aggregation, num_tokens, num_completions):
    weights = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask)):
        if aggregation == "sequence_mean":
            weights[i, t] = 1 / sum(mask[i]) / num_completions  # DeepSeekMath eq. 3
        elif aggregation == "token_mean":
            weights[i, t] = 1 / num_tokens  # DAPO eq. 8
        else:
            weights[i, t] = 1 / (num_completions * MAX_TOKENS)  # Dr. GRPO, arXiv 2503.20783
    return weights


def reference_kl(kind, r):
    """The estimate and its derivative in logps, where r = ref_logps - logps; no derivative beyond the clamp of 1."""
    slope = {"k1": 1.0, "k2": -r, "k3": 1 - np.exp(r)}[kind] if abs(r) < 1 else 0.0
    r = min(max(r, -1), 1)
    return {"k1": -r, "k2": r**2 / 2, "k3": np.exp(r) - r - 1}[kind], slope


def reference_loss(
    b, weights, ratio="token", clip="ppo", clip_low=0.2, clip_high=0.2, kl=None, beta=0.0, entropy_coef=0.0
):
    """Token by token: the loss, its gradients in logps and in entropy, and the sums of kl and of clipped tokens."""
    loss, grad, sums = 0.0, np.zeros((B, T)), {"kl": 0.0, "clipped": 0}
    for i in range(B):
        own, a = [t for t in range(T) if b["mask"][i, t]], b["advantages"][i]
        for t in own:
            weight, logp = weights[i, t], b["logps"][i, t]
            over = [t] if ratio == "token" else own  # the tokens that make up this token's ratio; GSPO eq. 7
            r = np.exp(sum(b["logps"][i, s] - b["old"][i, s] for s in over) / len(over))
            bounded = min(max(r, 1 - clip_low), 1 + clip_high)
            if clip == "cispo":  # the bounded ratio is a constant; MiniMax-M1 eq. 4
                surrogate, slope, is_clipped = -bounded * a * logp, 0.0, bounded != r and a != 0
                grad[i, t] -= weight * bounded * a
            else:
                is_clipped = clip == "ppo" and ((a > 0 and r > 1 + clip_high) or (a < 0 and r < 1 - clip_low))
                surrogate = -min(r * a, bounded * a) if clip == "ppo" else -r * a
                slope = 0.0 if is_clipped else -r * a  # in the log of the ratio
            for s in over:
                grad[i, s] += weight * slope / len(over)
            loss += weight * (surrogate - entropy_coef * b["entropy"][i, t])
            sums["clipped"] += is_clipped
            if beta:
                value, slope = reference_kl(kl, b["ref"][i, t] - logp)
                loss += weight * beta * value
                grad[i, t] += weight * beta * slope
                sums["kl"] += value
    return loss, grad, -entropy_coef * weights, sums


def our_loss(b, weights, kl="k3", beta=0.0, entropy_coef=0.0, **how):
    """The same four from `policy_loss`; reference and entropy are left out where nothing asks for them."""
    x = {name: torch.tensor(value) for name, value in b.items()}
    x["logps"].requires_grad_(True)
    x["entropy"].requires_grad_(True)
    cfg = LossConfig(beta=beta, kl=kl, kl_clamp=1.0, entropy=entropy_coef, **how)
    given = (x["logps"], x["old"], x["advantages"], x["mask"], torch.as_tensor(weights), cfg)
    loss, sums = policy_loss(*given, x["ref"] if beta else None, x["entropy"] if entropy_coef else None)
    loss.backward()
    assert not any(value.requires_grad for value in sums.values())
    entropy_grad = x["entropy"].grad if entropy_coef else torch.zeros_like(x["entropy"])
    return loss.item(), x["logps"].grad.numpy(), entropy_grad.numpy(), {n: v.item() for n, v in sums.items()}


def our_weights(mask, aggregation, num_tokens, num_completions) -> np.ndarray:
    return token_weights(torch.tensor(mask), aggregation, num_tokens, num_completions, MAX_TOKENS).numpy()


def assert_same(ours, expected, rtol=1e-10):
    for value, wanted in zip(ours[:3], expected[:3]):
        np.testing.assert_allclose(value, wanted, rtol=rtol, atol=1e-12)
    assert ours[3] == pytest.approx(expected[3], rel=1e-10)


def spoil(b: dict) -> dict:
    """The batch with every kind of garbage in its padding."""
    rng, spoilt = np.random.default_rng(9), dict(b)
    for name in ("logps", "old", "ref", "entropy"):
        garbage = rng.choice([np.nan, np.inf, -np.inf, 1e308, -1e4, 0.0, 7.0], (B, T))
        spoilt[name] = np.where(b["mask"], b[name], garbage)
    return spoilt
