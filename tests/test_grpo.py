"""Advantages, penalties, KL, weights, statistics and masks against numbers worked out by hand and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from grpo_reference import (
    AGGREGATIONS,
    BASELINES,
    KLS,
    LN2,
    MAX_TOKENS,
    RATIOS,
    SCALES,
    B,
    T,
    batch,
    f64,
    our_weights,
)

from config import LossConfig
from grpo import (
    completion_mask,
    group_advantages,
    group_stats,
    kl_estimate,
    overlong_penalty,
    policy_loss,
    token_weights,
)

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


# ---- group statistics ----------------------------------------------------------------------------------------------


def test_group_stats_by_hand():
    rewards = torch.tensor(
        [[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5], [0, 1, 0], [0.9995, 0.9995, 0.9995], [0.2, 0.2, 0.201]]
    )
    expected = {"mixed": 2.0, "all_good": 2.0, "all_bad": 1.0}
    assert group_stats(rewards) == expected
    assert group_stats(rewards[5:], tolerance=1e-3)["mixed"] == 0  # its standard deviation is 5.8e-4
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
        cfg = LossConfig(ratio=ratio, clip=clip, clip_high=0.3, beta=0.1, kl=kl, kl_clamp=0.1, entropy=0.1)
        policy_loss(*args, cfg, b["ref"], b["entropy"])
    for aggregation in AGGREGATIONS:
        token_weights(b["mask"], aggregation, 7, B, MAX_TOKENS)
    for baseline, scale in itertools.product(BASELINES, SCALES):
        group_advantages(b["rewards"], 1e-6, baseline, scale, 0.1)
    overlong_penalty(b["lengths"], 10, 4)
    group_stats(b["rewards"])
    completion_mask(b["tokens"], [1, 2])
    assert all(torch.equal(b[name], copies[name]) for name in b)
