"""Every formula against numbers worked out by hand, and against plain numpy loops written from the papers."""

import itertools

import numpy as np
import pytest
import torch

from grpo import (
    completion_mask,
    group_advantages,
    group_stats,
    kl_estimate,
    overlong_penalty,
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


# ---- the reference -------------------------------------------------------------------------------------------------


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
    how |= dict(ref_logps_BT=x["ref"], beta=beta, kl=kl, kl_clamp=1.0) if beta else {}
    how |= dict(entropy_BT=x["entropy"], entropy_coef=entropy_coef) if entropy_coef else {}
    loss, sums = policy_loss(x["logps"], x["old"], x["advantages"], x["mask"], torch.as_tensor(weights), **how)
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


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Rewards 0, 1, 2, 3: mean 1.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, std = sqrt(5 / 3)."""
    rewards = f64([0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0])
    advantages, std = group_advantages(rewards, eps=0.0), (5 / 3) ** 0.5
    torch.testing.assert_close(advantages[0], f64(-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std))
    torch.testing.assert_close(advantages[1], f64(1.5, -0.5, -0.5, -0.5))  # mean 1/4, std = sqrt(3/4 / 3) = 1/2
    torch.testing.assert_close(group_advantages(rewards, eps=0.5)[1], f64(0.75, -0.25, -0.25, -0.25))
    unscaled, leave_one_out = (group_advantages(rewards, baseline=name, scale="none") for name in BASELINES)
    torch.testing.assert_close(unscaled, f64([-1.5, -0.5, 0.5, 1.5], [0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(leave_one_out[0], f64(-2.0, -2 / 3, 2 / 3, 2.0))  # the others: 2, 5/3, 4/3 and 1


def test_batch_std_by_hand():
    """The dead group counts in the standard deviation: 0, 2, 1, 1 have sqrt(2 / 3), the first two alone sqrt(2)."""
    rewards, std = f64([0.0, 2.0], [1.0, 1.0]), (2 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(rewards, 0.0, scale="batch_std"), f64([-1 / std, 1 / std], [0, 0]))
    expected = f64([-2 / (std + 0.5), 2 / (std + 0.5)], [0, 0])
    torch.testing.assert_close(group_advantages(rewards, 0.5, "leave_one_out", "batch_std"), expected)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_against_numpy(baseline, scale, eps):
    rewards = np.random.default_rng(0).uniform(0, 1, (5, 8)) * np.arange(1, 6)[:, None]
    expected = np.zeros((5, 8))
    for p, g in np.ndindex(5, 8):
        group = list(rewards[p])
        others = group[:g] + group[g + 1 :] if baseline == "leave_one_out" else group
        divisor = {"group_std": np.std(group, ddof=1) + eps, "batch_std": np.std(rewards, ddof=1) + eps, "none": 1}
        expected[p, g] = (group[g] - sum(others) / len(others)) / divisor[scale]
    ours = group_advantages(torch.tensor(rewards), eps, baseline, scale)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_under_shift_scale_order_and_baseline(baseline, scale):
    rewards = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, 0.0, baseline, scale)
    torch.testing.assert_close(group_advantages(rewards + 7, 0.0, baseline, scale), advantages)
    factor = 3 if scale == "none" else 1
    torch.testing.assert_close(group_advantages(3 * rewards, 0.0, baseline, scale), factor * advantages)
    order = [3, 1, 5, 0, 2, 4]
    torch.testing.assert_close(group_advantages(rewards[:, order], 0.0, baseline, scale), advantages[:, order])
    torch.testing.assert_close(advantages.sum(1), torch.zeros(4, dtype=torch.float64))
    if baseline == "leave_one_out":
        torch.testing.assert_close(advantages, 6 / 5 * group_advantages(rewards, 0.0, "group_mean", scale))
    if scale != "batch_std":
        torch.testing.assert_close(group_advantages(rewards[2:3], 0.0, baseline, scale), advantages[2:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_dead_group_has_advantages_of_exactly_zero(baseline, scale, dtype):
    """The mean of equal numbers is not always that number: eight times 0.7 in float32 was off by one rounding, the
    standard deviation was as small, and every completion of the group got an advantage of 0.056."""
    for num in range(2, 17):
        rewards = (torch.arange(1, 20, dtype=dtype) / 20)[:, None].repeat(1, num)
        for some, eps in itertools.product([rewards, *rewards[:, None]], (0.0, 1e-6)):  # rounds differently alone
            assert (group_advantages(some, eps, baseline, scale) == 0).all(), num
        rewards[7, 0] += 1
        advantages = group_advantages(rewards, 1e-6, baseline, scale)
        assert advantages.dtype == dtype and (advantages[7] != 0).all()
        assert (torch.cat([advantages[:7], advantages[8:]]) == 0).all(), num


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_within_the_tolerance_counts_as_dead(baseline, scale):
    """Rewards 1, 0, 0, 0 have a standard deviation of exactly 1/2; the other group has 1.29 and keeps its own."""
    rewards = f64([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0])
    plain = group_advantages(rewards, 1e-6, baseline, scale)
    torch.testing.assert_close(group_advantages(rewards, 1e-6, baseline, scale, tolerance=0.49), plain)
    dead, alive = group_advantages(rewards, 1e-6, baseline, scale, tolerance=0.5)
    assert (dead == 0).all() and torch.equal(alive, plain[1]) and (plain[0] != 0).all()


# ---- overlong penalty ----------------------------------------------------------------------------------------------


def test_overlong_penalty_by_hand():
    """At most 10 tokens, the last 4 of them punished: one quarter each."""
    ours = overlong_penalty(torch.tensor([0, 1, 6, 7, 8, 9, 10, 12, 1000]), max_tokens=10, buffer=4)
    assert ours.tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert overlong_penalty(torch.tensor([0, 5, 10]), 10, 10).tolist() == [0, -0.5, -1]
    assert overlong_penalty(torch.tensor([9, 10]), 10, 1).tolist() == [0, -1]


# ---- KL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "grads"),
    [
        ("k1", (0.5, -LN2, 0.0, -2.0, 2.0), (1.0, 1.0, 1.0, 0.0, 0.0)),
        ("k2", (0.125, 0.2402265070, 0.0, 2.0, 2.0), (0.5, -LN2, 0.0, 0.0, 0.0)),
        # exp(-0.5) - 0.5, 2 - ln 2 - 1, 0, exp(2) - 3 and exp(-2) + 1
        ("k3", (0.1065306597, 0.3068528194, 0.0, 4.3890560989, 1.1353352832), (0.3934693403, -1.0, 0.0, 0.0, 0.0)),
    ],
)
def test_kl_by_hand(kind, values, grads):
    """r = ref - logp is -0.5, ln 2, 0, and twice beyond the clamp: +-50 counts as +-2 and has no gradient."""
    logps = f64(-1.0, -1.0, -1.0, -60.0, -1.0).requires_grad_(True)
    kl = kl_estimate(logps, f64(-1.5, LN2 - 1, -1.0, -10.0, -51.0), kind, clamp=2.0)
    torch.testing.assert_close(kl, f64(*values), atol=1e-9, rtol=0)
    kl.sum().backward()
    torch.testing.assert_close(logps.grad, f64(*grads), atol=1e-9, rtol=0)


def test_what_each_kl_estimates():
    """Over a distribution of 5 tokens: k1 and k3 have the divergence, sum p (log p - log q), as their mean; k2 has the
    gradient of the divergence as the mean of its gradient, which k1 has not; k2 and k3 are never negative."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = logits.requires_grad_(True).log_softmax(0), other.log_softmax(0)
    divergence = (p.exp() * (p - q)).sum()
    mean = {kind: (p.exp().detach() * kl_estimate(p, q, kind)).sum() for kind in KLS}
    torch.testing.assert_close(mean["k1"], divergence)
    torch.testing.assert_close(mean["k3"], divergence)
    assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()
    grads = {kind: torch.autograd.grad(mean[kind], logits, retain_graph=True)[0] for kind in KLS}
    torch.testing.assert_close(grads["k2"], torch.autograd.grad(divergence, logits)[0])
    torch.testing.assert_close(grads["k1"], torch.zeros(5, dtype=torch.float64))


# ---- token weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [[1 / 12, 1 / 12, 1 / 12], [1 / 4, 0, 0], [0, 0, 0]]),
        ("token_mean", [[1 / 8, 1 / 8, 1 / 8], [1 / 8, 0, 0], [0, 0, 0]]),
        ("constant", [[1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0], [0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(aggregation, expected):
    """Three completions, of 3, 1 and 0 tokens, out of a step of 4 completions and 8 tokens; at most 5 tokens each."""
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    ours = token_weights(mask, aggregation, num_tokens=8, num_completions=4, max_tokens=5)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_aggregations_agree_on_equal_lengths():
    mask = np.arange(T) < np.full((B, 1), 4)
    sequence, token, constant = (our_weights(mask, how, 4 * B, B) for how in AGGREGATIONS)
    np.testing.assert_allclose(sequence, token, rtol=1e-12)
    np.testing.assert_allclose(constant, token * 4 / MAX_TOKENS, rtol=1e-12)


# ---- loss by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "ppo", "cispo"),
    [  # ppo: loss, gradient, clipped; cispo: gradient, clipped
        (1.0, 2.0, (-2.0, -2.0, 0), (-2.0, 0)),  # inside: -ratio * A, and its gradient in logps likewise
        (1.1, 2.0, (-2.2, -2.2, 0), (-2.2, 0)),
        (1.5, 2.0, (-2.6, 0.0, 1), (-2.6, 1)),  # above, good: ppo stops at 1 + 0.3, cispo goes on with it
        (0.5, 2.0, (-1.0, -1.0, 0), (-1.6, 1)),  # below, good: the smaller is the unclipped, free to grow again
        (1.5, -2.0, (3.0, 3.0, 0), (2.6, 1)),  # above, bad: unclipped, pushed back
        (0.5, -2.0, (1.6, 0.0, 1), (1.6, 1)),  # below, bad: ppo stops at 1 - 0.2, cispo goes on with it
        (1.25, 2.0, (-2.5, -2.5, 0), (-2.5, 0)),  # between 1 + 0.2 and 1 + 0.3: the upper clip is the larger one
        (0.75, -2.0, (1.6, 0.0, 1), (1.6, 1)),
        (1.5, 0.0, (0.0, 0.0, 0), (0.0, 0)),
    ],
)
def test_the_clips_by_hand(ratio, advantage, ppo, cispo):
    """clip_low 0.2, clip_high 0.3; one token of weight 1, sampled at a log-prob of -1. CISPO's loss is its gradient
    times the log-prob."""
    logp, mask, one = np.log(ratio) - 1, torch.ones(1, 1, dtype=torch.bool), f64([1.0])
    expected = {"ppo": ppo, "none": (-ratio * advantage, -ratio * advantage, 0), "cispo": (cispo[0] * logp, *cispo)}
    for clip, wanted in expected.items():
        logps = f64([logp]).requires_grad_(True)
        loss, sums = policy_loss(logps, -one, f64(advantage), mask, one, "token", clip, 0.2, 0.3)
        loss.backward()
        assert (loss.item(), logps.grad.item(), sums["clipped"].item()) == pytest.approx(wanted)
        assert sums["kl"].item() == 0


def test_gspo_by_hand():
    """Log-ratios ln 2 and ln 8 of two tokens: the ratio is 4, whatever the padding holds; that of the second completion
    is 1/2. Of the gradient w (-r A) of two tokens, each of weight 1/2, each log-prob gets half: -2."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights, old = f64([0.5, 0.5, 0.0], [1.0, 0.0, 0.0]), f64([-3.0, -4.0, -1.0], [-1.0, -1.0, -1.0])
    logps = (old + f64([LN2, 3 * LN2, 5.0], [-LN2, 5.0, 5.0])).requires_grad_(True)
    for clip, loss, grad, clipped in [
        ("none", -4 + 0.5, [[-2.0, -2.0, 0.0], [0.5, 0.0, 0.0]], 0),
        ("ppo", -1.3 + 0.8, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 3),
        ("cispo", -0.65 * (-7 + 4 * LN2) + 0.8 * (-1 - LN2), [[-0.65, -0.65, 0.0], [0.8, 0.0, 0.0]], 3),
    ]:
        ours, sums = policy_loss(logps, old, f64(1.0, -1.0), mask, weights, "sequence", clip, 0.2, 0.3)
        assert ours.item() == pytest.approx(loss) and sums["clipped"].item() == clipped
        torch.testing.assert_close(torch.autograd.grad(ours, logps)[0], f64(*grad))


def test_the_whole_loss_by_hand():
    """Two completions of 2 and 1 tokens, advantages 1 and -1, ratio 1, reference at ln 2 above, weights 1/3: the loss
    is (-2 + 1 + 3 x 0.1 x 0.30685282 - 0.01 x (1 + 2 + 3)) / 3, the gradient of a token (-A + 0.1 x (1 - 2)) / 3."""
    logps = f64([-1.0, -2.0], [-3.0, 0.0]).requires_grad_(True)
    entropy = f64([1.0, 2.0], [3.0, 4.0]).requires_grad_(True)
    mask = torch.tensor([[True, True], [True, False]])
    old, how = logps.detach(), dict(beta=0.1, entropy_BT=entropy, entropy_coef=0.01)
    loss, sums = policy_loss(logps, old, f64(1.0, -1.0), mask, mask / 3, ref_logps_BT=old + LN2, **how)
    loss.backward()
    assert loss.item() == pytest.approx((-1 + 0.3 * 0.3068528194 - 0.06) / 3)
    torch.testing.assert_close(logps.grad, f64([-1.1 / 3, -1.1 / 3], [0.9 / 3, 0.0]))
    torch.testing.assert_close(entropy.grad, f64([-0.01 / 3, -0.01 / 3], [-0.01 / 3, 0.0]))
    assert sums["kl"].item() == pytest.approx(3 * 0.3068528194) and sums["clipped"].item() == 0


@pytest.mark.parametrize("name", ["k9", "batch", "trpo", "median", "value", "minmax"])
def test_an_unknown_variant_is_an_error_that_names_it(name):
    one, mask = f64([0.0]), torch.ones(1, 1, dtype=torch.bool)
    calls = {
        "k9": lambda: kl_estimate(one, one, kind="k9"),
        "batch": lambda: policy_loss(one, one, one[0], mask, one, ratio="batch"),
        "trpo": lambda: policy_loss(one, one, one[0], mask, one, clip="trpo"),
        "median": lambda: token_weights(mask, "median", 1, 1, 1),
        "value": lambda: group_advantages(f64([0.0, 1.0]), baseline="value"),
        "minmax": lambda: group_advantages(f64([0.0, 1.0]), scale="minmax"),
    }
    with pytest.raises(ValueError, match=f"'{name}'"):
        calls[name]()


# ---- loss against the reference ------------------------------------------------------------------------------------


def test_the_batch_holds_every_case():
    b = batch()
    mask, a, log_ratios = b["mask"], np.broadcast_to(b["advantages"][:, None], (B, T)), b["logps"] - b["old"]
    means = np.repeat(np.where(mask, log_ratios, 0).sum(1) / np.maximum(mask.sum(1), 1), T).reshape(B, T)
    for ratio, sign in itertools.product((np.exp(log_ratios), np.exp(means)), (1, -1)):
        assert len(set(np.digitize(ratio[mask & (sign * a > 0)], [0.8, 1.2, 1.3]))) == 4
    assert set(np.digitize((b["ref"] - b["logps"])[mask], [-1, 1])) == {0, 1, 2}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kl", [*KLS, "none"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_combination_against_the_reference(aggregation, ratio, kl, clip, entropy_coef):
    """Value, gradients and sums, with garbage in the padding."""
    b, step = batch(), (64, 17)
    how = dict(ratio=ratio, **CLIPS[clip], entropy_coef=entropy_coef) | ({} if kl == "none" else dict(kl=kl, beta=0.3))
    expected = reference_loss(b, reference_weights(b["mask"], aggregation, *step), **how)
    assert_same(our_loss(spoil(b), our_weights(b["mask"], aggregation, *step), **how), expected)
    assert (expected[3]["clipped"] > 0) == (clip != "none") and (expected[3]["kl"] != 0) == (kl != "none")


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_reference_against_finite_differences(ratio, kl, clip):
    """With CISPO the old log-prob moves along: its gradient is that under a ratio that stands still."""
    b, step = batch(), 1e-6
    weights = reference_weights(b["mask"], "sequence_mean", 64, 17)
    how = dict(ratio=ratio, **CLIPS[clip], kl=kl, beta=0.3, entropy_coef=0.01)
    grad = reference_loss(b, weights, **how)[1]
    for i, t in itertools.product(range(B), (0, T - 1)):
        values = []
        for sign in (1, -1):
            moved = np.zeros((B, T))
            moved[i, t] = sign * step
            old = b["old"] + moved if clip == "cispo" else b["old"]
            values.append(reference_loss(b | {"logps": b["logps"] + moved, "old": old}, weights, **how)[0])
        assert grad[i, t] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-8)


# ---- loss: properties ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_at_ratio_one_every_variant_has_the_gradient_of_reinforce(aggregation, ratio, clip):
    b = batch()
    weights = reference_weights(b["mask"], aggregation, b["mask"].sum(), B)
    _, grad, _, sums = our_loss(b | {"old": b["logps"]}, weights, ratio=ratio, **CLIPS[clip])
    np.testing.assert_allclose(grad, -b["advantages"][:, None] * weights, rtol=1e-12)
    assert sums == {"kl": 0, "clipped": 0}


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_clip_that_is_never_reached_is_none(ratio):
    b = batch()
    weights, how = reference_weights(b["mask"], "token_mean", 40, B), dict(ratio=ratio, kl="k3", beta=0.1)
    wide = our_loss(b, weights, clip="ppo", clip_low=1.0, clip_high=1e9, **how)
    assert_same(wide, our_loss(b, weights, clip="none", **how), rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_ratio_of_one_token_is_that_of_its_sequence(clip):
    b = batch()
    b["mask"] = np.arange(T) < (np.arange(B) % 3 > 0)[:, None]  # lengths 0, 1, 1
    weights = reference_weights(b["mask"], "sequence_mean", 8, B)
    token, sequence = (our_loss(b, weights, ratio=ratio, **CLIPS[clip]) for ratio in RATIOS)
    assert_same(token, sequence, rtol=1e-14)


@pytest.mark.parametrize("sizes", [[1] * B, [5, 5, 2], [1, 8, 3], [B]])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_under_the_denominators_of_the_step(aggregation, ratio, sizes):
    """In any order and cut; one micro-batch may hold nothing but an empty completion."""
    b, how = batch(), dict(ratio=ratio, **CLIPS["asymmetric"], kl="k3", beta=0.1, entropy_coef=0.01)
    step = (int(b["mask"].sum()), B)
    whole = our_loss(b, our_weights(b["mask"], aggregation, *step), **how)
    loss, grad, entropy_grad, sums = 0.0, np.zeros((B, T)), np.zeros((B, T)), {"kl": 0.0, "clipped": 0.0}
    for rows in np.split(np.random.default_rng(1).permutation(B), np.cumsum(sizes)[:-1]):
        micro = {name: value[rows] for name, value in b.items()}
        part = our_loss(micro, our_weights(micro["mask"], aggregation, *step), **how)
        loss += part[0]
        grad[rows], entropy_grad[rows] = part[1:3]
        sums = {name: sums[name] + part[3][name] for name in sums}
    assert_same((loss, grad, entropy_grad, sums), whole, rtol=1e-12)


# ---- group statistics ----------------------------------------------------------------------------------------------


def test_group_stats_by_hand():
    rewards = torch.tensor(
        [[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5], [0, 1, 0], [0.9995, 0.9995, 0.9995], [0.2, 0.2, 0.2003]]
    )
    expected = {"mixed": 2.0, "all_good": 2.0, "all_bad": 1.0}
    assert group_stats(rewards) == expected
    assert group_stats(rewards[5:], tolerance=1e-3)["mixed"] == 0  # its standard deviation is 1.7e-4
    assert group_stats(rewards, good=0.5) == expected | {"all_good": 3.0, "all_bad": 2.0}


def test_group_stats_judge_dead_groups_by_how_right_they_are():
    """Well formed and all wrong earns 0.5 each: no signal, and all bad. A mixed group is neither."""
    rewards = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.5, 0.5], [0.5, 1.0]])
    right = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.3, 0.3], [0.0, 0.0]])
    assert group_stats(rewards, right) == {"mixed": 1.0, "all_good": 1.0, "all_bad": 1.0}


def test_group_stats_do_not_take_rounding_for_a_signal():
    rewards = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 8)
    assert group_stats(rewards)["mixed"] == 0
    assert all(group_stats(group)["mixed"] == 0 for group in rewards[:, None])  # rounds differently alone


# ---- mask ----------------------------------------------------------------------------------------------------------


def test_the_mask_ends_with_the_first_of_two_eos_ids():
    """8 and 9 end a completion, and 9 is the padding too; a row without either is whole."""
    tokens = torch.tensor([[5, 9, 9, 9], [5, 8, 9, 9], [9, 9, 9, 9], [5, 6, 7, 5], [5, 6, 7, 8], [8, 5, 9, 5]])
    two, one, full = [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]
    assert completion_mask(tokens, [8, 9]).int().tolist() == [two, two, one, full, full, one]
    assert completion_mask(tokens, [8]).sum(1).tolist() == [4, 2, 4, 4, 4, 1]


def test_the_mask_against_a_loop():
    tokens = torch.randint(0, 6, (200, 7), generator=torch.Generator().manual_seed(0))
    for row, mask in zip(tokens.tolist(), completion_mask(tokens, [4, 5]).tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in (4, 5)), len(row))
        assert mask == [t < length for t in range(7)]


# ---- purity --------------------------------------------------------------------------------------------------------


def test_no_argument_is_changed():
    b = {name: torch.tensor(value) for name, value in batch().items()} | {"weights": torch.rand(B, T)}
    b |= {"rewards": torch.rand(3, 4), "tokens": torch.randint(0, 6, (B, T)), "lengths": torch.arange(B)}
    copies = {name: value.clone() for name, value in b.items()}
    args = [b[name] for name in ("logps", "old", "advantages", "mask", "weights")]
    for ratio, clip, kl in itertools.product(RATIOS, ("ppo", "none", "cispo"), KLS):
        policy_loss(*args, ratio, clip, 0.2, 0.3, b["ref"], 0.1, kl, 0.1, b["entropy"], 0.1)
    for aggregation in AGGREGATIONS:
        token_weights(b["mask"], aggregation, 7, B, MAX_TOKENS)
    for baseline, scale in itertools.product(BASELINES, SCALES):
        group_advantages(b["rewards"], 1e-6, baseline, scale, 0.1)
    overlong_penalty(b["lengths"], 10, 4)
    group_stats(b["rewards"])
    completion_mask(b["tokens"], [1, 2])
    assert all(torch.equal(b[name], copies[name]) for name in b)
