"""The loss against numbers worked out by hand, and against plain numpy loops written from the papers."""

import itertools

import numpy as np
import pytest
import torch
from grpo_reference import (
    AGGREGATIONS,
    CLIPS,
    KLS,
    LN2,
    RATIOS,
    B,
    T,
    assert_same,
    batch,
    f64,
    our_loss,
    our_weights,
    reference_loss,
    reference_weights,
    spoil,
)

from config import LossConfig
from grpo import (
    group_advantages,
    kl_estimate,
    policy_loss,
    token_weights,
)

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
        loss, sums = policy_loss(logps, -one, f64(advantage), mask, one, LossConfig(clip=clip, clip_high=0.3, beta=0.0))
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
        ours, sums = policy_loss(
            logps, old, f64(1.0, -1.0), mask, weights, LossConfig(ratio="sequence", clip=clip, clip_high=0.3, beta=0.0)
        )
        assert ours.item() == pytest.approx(loss) and sums["clipped"].item() == clipped
        torch.testing.assert_close(torch.autograd.grad(ours, logps)[0], f64(*grad))


def test_the_whole_loss_by_hand():
    """Two completions of 2 and 1 tokens, advantages 1 and -1, ratio 1, reference at ln 2 above, weights 1/3: the loss
    is (-2 + 1 + 3 x 0.1 x 0.30685282 - 0.01 x (1 + 2 + 3)) / 3, the gradient of a token (-A + 0.1 x (1 - 2)) / 3."""
    logps = f64([-1.0, -2.0], [-3.0, 0.0]).requires_grad_(True)
    entropy = f64([1.0, 2.0], [3.0, 4.0]).requires_grad_(True)
    mask = torch.tensor([[True, True], [True, False]])
    old, cfg = logps.detach(), LossConfig(beta=0.1, entropy=0.01)
    loss, sums = policy_loss(logps, old, f64(1.0, -1.0), mask, mask / 3, cfg, old + LN2, entropy)
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
        "batch": lambda: policy_loss(one, one, one[0], mask, one, LossConfig(ratio="batch")),
        "trpo": lambda: policy_loss(one, one, one[0], mask, one, LossConfig(clip="trpo")),
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
    wide = our_loss(b, weights, clip="ppo", clip_low=1.0 - 1e-12, clip_high=1e9, **how)
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
