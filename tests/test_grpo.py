"""Every formula against numbers worked out by hand, and against a plain numpy loop written from the papers."""

import numpy as np
import pytest
import torch

from grpo import completion_mask, group_advantages, group_stats, kl_estimate, policy_loss

P, G, T = 3, 4, 6
B = P * G


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int = 0) -> dict:
    """Log-probs whose ratios lie on both sides of either clip, ragged lengths of 1 to T, advantages of both signs."""
    rng = np.random.default_rng(seed)
    lengths_B = np.array([1, T, *rng.integers(1, T + 1, B - 2)])
    logps_BT = -rng.uniform(0.01, 4, (B, T))
    return {
        "logps": logps_BT,
        "old": logps_BT + rng.normal(0, 0.4, (B, T)),
        "ref": logps_BT + rng.normal(0, 0.7, (B, T)),
        "advantages": rng.normal(0, 1.5, B),
        "mask": np.arange(T) < lengths_B[:, None],
    }


def reference_loss(b: dict, denominator: float, low: float, high: float, beta: float, clamp: float = 10.0):
    """DeepSeekMath eq. 3 and 4, token by token: the loss, its gradient in logps, and the sums of kl and clipped."""
    loss, grad, kl_sum, clipped = 0.0, np.zeros((B, T)), 0.0, 0
    for i in range(B):
        for t in range(T):
            if not b["mask"][i, t]:
                continue
            a, ratio = b["advantages"][i], np.exp(b["logps"][i, t] - b["old"][i, t])
            bounded = min(max(ratio, 1 - low), 1 + high)
            surrogate = min(ratio * a, bounded * a)
            is_clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
            grad[i, t] = 0.0 if is_clipped else -ratio * a
            clipped += is_clipped
            r = b["ref"][i, t] - b["logps"][i, t]
            kl = np.exp(min(max(r, -clamp), clamp)) - min(max(r, -clamp), clamp) - 1
            grad[i, t] += beta * (1 - np.exp(r)) if abs(r) < clamp else 0.0
            kl_sum += kl
            loss += -surrogate + beta * kl
    return loss / denominator, grad / denominator, kl_sum, clipped


def our_loss(b: dict, denominator: float, low: float = 0.2, high: float = 0.2, beta: float = 0.0, clamp: float = 10.0):
    t = {name: torch.tensor(value) for name, value in b.items()}
    t["logps"].requires_grad_(True)
    loss, sums = policy_loss(
        t["logps"], t["old"], t["advantages"], t["mask"], denominator, low, high, t["ref"], beta, clamp
    )
    loss.backward()
    return loss.item(), t["logps"].grad.numpy(), sums


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Rewards 0, 1, 2, 3: mean 1.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, std = sqrt(5 / 3)."""
    advantages = group_advantages(f64([0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]), eps=0.0)
    std = (5 / 3) ** 0.5
    torch.testing.assert_close(advantages[0], f64(-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std))
    torch.testing.assert_close(advantages[1], f64(1.5, -0.5, -0.5, -0.5))  # mean 1/4, std = sqrt(3/4 / 3) = 1/2


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_advantages_against_numpy(eps):
    rewards = np.random.default_rng(0).uniform(0, 1, (5, 8))
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + eps)
    torch.testing.assert_close(group_advantages(torch.tensor(rewards), eps), torch.tensor(expected))


def test_advantages_do_not_depend_on_shift_scale_order_or_other_groups():
    rewards = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, 0.0)
    torch.testing.assert_close(group_advantages(3 * rewards + 7, 0.0), advantages)
    order = [3, 1, 5, 0, 2, 4]
    torch.testing.assert_close(group_advantages(rewards[:, order], 0.0), advantages[:, order])
    torch.testing.assert_close(group_advantages(rewards[2:3], 0.0), advantages[2:3])
    torch.testing.assert_close(advantages.sum(1), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_group_has_advantages_of_exactly_zero(dtype):
    """The mean of equal numbers is not always that number: eight times 0.7 in float32 was off by one rounding, the
    standard deviation was as small, and every completion of the group got an advantage of 0.056."""
    for num in range(2, 17):
        rewards = torch.rand(200, 1, dtype=dtype, generator=torch.Generator().manual_seed(num)).expand(-1, num)
        assert (group_advantages(rewards) == 0).all(), num


# ---- KL ------------------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    """r = -0.5: exp(-0.5) + 0.5 - 1 = 0.10653066; r = ln 2: 2 - 0.69314718 - 1 = 0.30685282; r = 0: 0."""
    kl = kl_estimate(f64(-1.0, -1.0, -1.0), f64(-1.5, -1.0 + np.log(2), -1.0))
    torch.testing.assert_close(kl, f64(0.1065306597, 0.3068528194, 0.0), atol=1e-9, rtol=0)


def test_kl_clamp():
    """A log-ratio of +-50 counts as +-2: exp(2) - 3 = 4.38905610 and exp(-2) + 1 = 1.13533528, and has no gradient."""
    logps = f64(-60.0, -1.0, -1.0).requires_grad_(True)
    kl = kl_estimate(logps, f64(-10.0, -51.0, -1.5), clamp=2.0)
    torch.testing.assert_close(kl, f64(4.3890560989, 1.1353352832, 0.1065306597), atol=1e-9, rtol=0)
    kl.sum().backward()
    torch.testing.assert_close(logps.grad, f64(0.0, 0.0, 1 - np.exp(-0.5)))


def test_kl_is_an_unbiased_estimate_of_the_divergence_and_never_negative():
    """Its mean under the policy is sum p (log p - log q), on a distribution over 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    kl = kl_estimate(p, q)
    assert (kl >= 0).all()
    torch.testing.assert_close((p.exp() * kl).sum(), (p.exp() * (p - q)).sum())


def test_another_kl_is_an_error():
    with pytest.raises(ValueError, match="'k9' is not k3"):
        kl_estimate(f64(0.0), f64(0.0), kind="k9")


# ---- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # inside: -ratio * A, and its gradient in logps likewise
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.6, 0.0, 1),  # above, good: stops at 1 + 0.3
        (0.5, 2.0, -1.0, -1.0, 0),  # below, good: the smaller is the unclipped, free to grow again
        (1.5, -2.0, 3.0, 3.0, 0),  # above, bad: unclipped, pushed back
        (0.5, -2.0, 1.6, 0.0, 1),  # below, bad: stops at 1 - 0.2
        (1.25, 2.0, -2.5, -2.5, 0),  # between 1 + 0.2 and 1 + 0.3: the upper clip is the larger one
        (0.75, -2.0, 1.6, 0.0, 1),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, grad, clipped):
    """clip_low 0.2, clip_high 0.3, one token."""
    logps = f64([np.log(ratio) - 1]).requires_grad_(True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    value, sums = policy_loss(logps, f64([-1.0]), f64(advantage), mask, 1.0, clip_low=0.2, clip_high=0.3)
    value.backward()
    assert value.item() == pytest.approx(loss) and logps.grad.item() == pytest.approx(grad)
    assert sums["clipped"].item() == clipped and sums["kl"].item() == 0


def test_the_whole_loss_by_hand():
    """Two completions of 2 and 1 tokens, advantages 1 and -1, ratio 1, reference at ln 2 above: (-2 + 1 + 3 x 0.1 x
    0.30685282) / 3 tokens; the gradient of one token is (-A + 0.1 x (1 - 2)) / 3."""
    logps = f64([-1.0, -2.0], [-3.0, 0.0]).requires_grad_(True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, sums = policy_loss(
        logps, logps.detach(), f64(1.0, -1.0), mask, 3, ref_logps_BT=logps.detach() + np.log(2), beta=0.1
    )
    loss.backward()
    assert loss.item() == pytest.approx((-1 + 0.3 * 0.3068528194) / 3)
    torch.testing.assert_close(logps.grad, f64([-1.1 / 3, -1.1 / 3], [0.9 / 3, 0.0]))
    assert sums["kl"].item() == pytest.approx(3 * 0.3068528194) and sums["clipped"].item() == 0
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.0, 0.5)])
@pytest.mark.parametrize(("beta", "clamp"), [(0.0, 10.0), (0.04, 10.0), (0.5, 0.3)])
def test_the_loss_and_its_gradient_against_numpy(low, high, beta, clamp):
    b = batch()
    loss, grad, sums = our_loss(b, 37.0, low, high, beta, clamp)
    expected, expected_grad, kl, clipped = reference_loss(b, 37.0, low, high, beta, clamp)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-10, atol=1e-14)
    assert sums["clipped"].item() == clipped > 0
    assert sums["kl"].item() == pytest.approx(kl if beta else 0.0)


def test_the_gradient_against_finite_differences():
    b, step = batch(1), 1e-6
    grad = our_loss(b, 10.0, 0.2, 0.3, 0.1)[1]
    for i, t in [(0, 0), (1, 3), (1, T - 1), (5, 0)]:
        values = []
        for sign in (1, -1):
            moved = b["logps"].copy()
            moved[i, t] += sign * step
            values.append(our_loss({**b, "logps": moved}, 10.0, 0.2, 0.3, 0.1)[0])
        assert grad[i, t] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    b = batch()
    _, grad, sums = our_loss({**b, "old": b["logps"]}, 5.0)
    np.testing.assert_allclose(grad, -b["advantages"][:, None] * b["mask"] / 5.0)
    assert sums["clipped"] == 0


def test_what_lies_past_the_end_does_not_matter():
    b = batch()
    loss, grad, sums = our_loss(b, 20.0, 0.2, 0.3, 0.1)
    garbage = np.random.default_rng(9).uniform(-30, 30, (3, B, T))
    spoilt = {n: np.where(b["mask"], b[n], g) for n, g in zip(("logps", "old", "ref"), garbage)}
    again, grad_again, sums_again = our_loss({**b, **spoilt}, 20.0, 0.2, 0.3, 0.1)
    assert again == loss and sums_again == sums
    np.testing.assert_array_equal(grad_again, grad)
    assert (grad[~b["mask"]] == 0).all()


@pytest.mark.parametrize("size", [1, 5, 12])
def test_micro_batches_add_up_under_one_denominator(size):
    b = batch()
    tokens = float(b["mask"].sum())
    loss, grad, sums = our_loss(b, tokens, 0.2, 0.3, 0.1)
    parts = [our_loss({n: v[i : i + size] for n, v in b.items()}, tokens, 0.2, 0.3, 0.1) for i in range(0, B, size)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad, rtol=1e-12)
    for name in sums:
        assert sum(part[2][name].item() for part in parts) == pytest.approx(sums[name].item())


# ---- group statistics ----------------------------------------------------------------------------------------------


def test_group_stats_by_hand():
    rewards = torch.tensor(
        [[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5], [0, 1, 0], [0.9995, 0.9995, 0.9995], [0.2, 0.2, 0.2003]]
    )
    expected = {"num_groups": 6.0, "num_mixed": 2.0, "num_all_good": 2.0, "num_all_bad": 1.0}
    assert group_stats(rewards) == expected
    assert group_stats(rewards[5:], tolerance=1e-3)["num_mixed"] == 0  # its standard deviation is 1.7e-4
    assert group_stats(rewards, good=0.5) == expected | {"num_all_good": 3.0, "num_all_bad": 2.0}


def test_group_stats_do_not_take_rounding_for_a_signal():
    rewards = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 8)
    assert group_stats(rewards)["num_mixed"] == 0


# ---- mask ----------------------------------------------------------------------------------------------------------


def test_the_mask_ends_with_the_first_of_two_eos_ids():
    """8 and 9 end a completion, and 9 is the padding too; a row without either is whole."""
    tokens = torch.tensor([[5, 9, 9, 9], [5, 8, 9, 9], [9, 9, 9, 9], [5, 6, 7, 5], [5, 6, 7, 8], [8, 5, 9, 5]])
    assert completion_mask(tokens, [8, 9]).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 0, 0, 0],
    ]
    assert completion_mask(tokens, [8]).sum(1).tolist() == [4, 2, 4, 4, 4, 1]


def test_the_mask_against_a_loop():
    tokens = torch.randint(0, 6, (200, 7), generator=torch.Generator().manual_seed(0))
    for row, mask in zip(tokens.tolist(), completion_mask(tokens, [4, 5]).tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in (4, 5)), len(row))
        assert mask == [t < length for t in range(7)]


# ---- purity --------------------------------------------------------------------------------------------------------


def test_no_argument_is_changed():
    b = {name: torch.tensor(value) for name, value in batch().items()}
    copies = {name: value.clone() for name, value in b.items()}
    rewards, tokens = torch.rand(P, G), torch.randint(0, 6, (B, T))
    rewards_copy, tokens_copy = rewards.clone(), tokens.clone()
    policy_loss(b["logps"], b["old"], b["advantages"], b["mask"], 3.0, 0.2, 0.3, b["ref"], 0.1)
    kl_estimate(b["logps"], b["ref"], clamp=0.1)
    group_advantages(rewards)
    group_stats(rewards)
    completion_mask(tokens, [1, 2])
    assert all(torch.equal(b[name], copies[name]) for name in b)
    assert torch.equal(rewards, rewards_copy) and torch.equal(tokens, tokens_copy)
