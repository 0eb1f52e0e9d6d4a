"""The rules on small tables of rewards, by hand: who is kept, why the others are not, how a budget is shared out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import RuleConfig
from grpo import group_std
from selection.rules import REASONS, Item, check_kept, choose, counts_by_stratum, largest_remainder, plot, reason, table

RIGHT, WRONG, MIXED = (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)


def item(name, *rewards, task="tvg", **fields) -> Item:
    return Item(name, task, fields.pop("source", ""), rewards, **fields)


# ---- statistics ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_statistics_are_numpys(rewards):
    one = item("a", *rewards)
    assert one.mean == pytest.approx(np.mean(rewards)) and one.best == max(rewards)
    assert one.std == pytest.approx(np.std(rewards, ddof=1), abs=1e-12)


def test_equal_rewards_have_no_deviation_at_all():
    """0.1 + 0.1 + 0.1 is not 0.3: by the plain formula this is 1e-17."""
    assert item("a", 0.1, 0.1, 0.1).std == 0.0


def test_one_reward_has_no_deviation_and_says_so():
    assert math.isnan(item("a", 0.5).std) and item("a", 0.5).statistics() == {"mean": 0.5, "std": None, "best": 0.5}


def test_the_deviation_is_the_one_that_training_uses():
    rewards = np.random.default_rng(0).random((20, 8))
    expected = group_std(torch.tensor(rewards)).tolist()
    assert [item("a", *row).std for row in rewards.tolist()] == pytest.approx(expected)


# ---- mixed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "task", "expected"),
    [
        (RIGHT, "mcqa", "too_easy"),
        (WRONG, "mcqa", "too_hard"),
        (MIXED, "mcqa", ""),
        ((1.0, 0.0, 1.0, 1.0), "mcqa", ""),
        (RIGHT, "tvg", "too_easy"),
        (WRONG, "tvg", "too_hard"),
        ((0.4, 0.4, 0.4, 0.4), "tvg", "low_variance"),  # alike, and neither right nor wrong
        ((0.5, 0.6, 0.6, 0.7), "tvg", "low_variance"),  # standard deviation 0.0816
        ((0.0, 0.1, 0.4, 0.3), "tvg", "low_best"),  # 0.183, but nothing to learn from
        ((0.0, 0.1, 0.5, 0.3), "tvg", ""),  # 0.222, and the best at the threshold
        ((0.0, 0.2, 0.0, 0.2), "gqa", "low_best"),
        ((0.5, 1.0, 0.5, 0.75), "gqa", ""),  # always the right option, and a span found now and then
    ],
)
def test_mixed(rewards, task, expected):
    assert reason(item("a", *rewards, task=task), RuleConfig(min_std=0.1, min_best=0.5)) == expected


def test_thresholds_are_inclusive():
    rewards = (0.25, 0.5, 0.75)  # standard deviation 0.25, exactly
    for low, expected in ((0.25, ""), (0.2500001, "low_variance")):
        assert reason(item("a", *rewards), RuleConfig(min_std=low, min_best=0.75)) == expected
    assert reason(item("a", *rewards), RuleConfig(min_best=0.7500001)) == "low_best"


def test_no_answer_at_all_is_a_class_of_its_own():
    unparsed, unread = item("a", *WRONG, parsed=False), item("b", error="damaged")
    for rule in ("mixed", "mean_range"):
        assert [reason(x, RuleConfig(rule=rule)) for x in (unparsed, unread)] == ["unparsed", "unreadable"]
    drawn = [reason(x, RuleConfig(rule="random", budget=1)) for x in (unparsed, unread)]
    assert drawn == ["", "unreadable"]  # the control draws from everything that can be trained on


# ---- the other rules -----------------------------------------------------------------------------------------------


def test_mean_range_takes_its_ends_and_one_reward():
    cfg = RuleConfig(rule="mean_range", low=0.1, high=0.7)
    means = {0.05: "too_hard", 0.1: "", 0.4: "", 0.7: "", 0.71: "too_easy"}
    assert choose([item(str(x), x) for x in means], cfg) == list(means.values())
    assert choose([item("a", 0.0, 0.1)], cfg) == ["too_hard"]


def test_top_variance_keeps_the_largest():
    items = [item(str(i), 0.0, x) for i, x in enumerate((0.2, 0.8, 0.0, 0.6, 0.9))]
    reasons = choose(items, RuleConfig(rule="top_variance", budget=3))
    assert [i for i, why in enumerate(reasons) if not why] == [1, 3, 4]
    assert set(reasons) == {"", "over_budget"}


def test_random_is_a_seeded_draw_whatever_the_rewards():
    def kept(seed, value):
        reasons = choose(
            [item(str(i), value, 1 - value) for i in range(40)], RuleConfig(rule="random", budget=10, seed=seed)
        )
        return [i for i, why in enumerate(reasons) if not why]

    assert kept(0, 0.0) == kept(0, 0.5) != kept(1, 0.0)
    assert all(len(kept(seed, 0.0)) == 10 for seed in range(5))


def test_equals_are_drawn_and_not_the_first_of_the_file():
    items = [item(str(i), *MIXED, task="mcqa") for i in range(40)]
    draws = []
    for seed in range(3):
        reasons = choose(items, RuleConfig(rule="top_variance", budget=10, seed=seed))
        draws.append([i for i, why in enumerate(reasons) if not why])
    assert len({tuple(draw) for draw in draws}) == 3 and max(max(draw) for draw in draws) > 20


# ---- budgets -------------------------------------------------------------------------------------------------------


def test_a_budget_is_shared_out_by_task_and_source():
    """Of 8 + 4 + 4 + 2 that pass, 9: 4, 2, 2 and 1; what does not pass has no share."""
    items = [item(f"a{i}", 0.0, 0.5 + i / 20, source="x") for i in range(8)]
    items += [item(f"b{i}", 0.0, 1.0, source="y") for i in range(4)]
    items += [item(f"c{i}", *MIXED, task="mcqa", source="x") for i in range(4)]
    items += [item(f"d{i}", 0.0, 0.5, task="gqa", source="x") for i in range(2)]
    items += [item(f"e{i}", *RIGHT, task="mcqa", source="y") for i in range(20)]
    reasons = choose(items, RuleConfig(budget=9))
    counts = counts_by_stratum(items, reasons)
    kept = {name: row["kept"] for name, row in counts.items()}
    assert kept == {"tvg/x": 4, "tvg/y": 2, "mcqa/x": 2, "mcqa/y": 0, "gqa/x": 1, "all": 9}
    assert [x.id for x, why in zip(items, reasons) if not why][:4] == ["a4", "a5", "a6", "a7"]  # the largest deviations
    assert counts["mcqa/y"]["too_easy"] == 20 and counts["all"]["over_budget"] == 9


def test_a_budget_above_what_passes_keeps_all_of_it():
    items = [item(str(i), 0.0, 1.0) for i in range(3)]
    assert choose(items, RuleConfig(budget=100)) == ["", "", ""]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), budget=st.integers(0, 200))
def test_shares_are_within_one_of_the_proportion(sizes, budget):
    shares, total = largest_remainder(sizes, budget), sum(sizes)
    assert sum(shares) == min(budget, total)
    for share, size in zip(shares, sizes):
        assert share <= size and abs(share - min(budget, total) * size / total) < 1


# ---- bad input, and what is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mixed", "top_variance"])
def test_a_rule_of_variance_refuses_one_reward(rule):
    items = [item("a", 0.0, 1.0), item("b", 0.5)]
    with pytest.raises(ValueError, match=rf"^select.rule={rule} needs at least 2 rewards of every item, 'b' has 1$"):
        choose(items, RuleConfig(rule=rule, budget=1))


def test_nothing_kept_says_which_condition_removed_how_many():
    items = [item("a", *RIGHT), item("b", *WRONG), item("c", *WRONG), item("d", error="x"), item("e", 0.3, 0.31)]
    cfg = RuleConfig()
    with pytest.raises(ValueError) as raised:
        check_kept(choose(items, cfg), cfg)
    told = str(raised.value)
    assert told.startswith("select.rule=mixed keeps none of 5 items: 1 unreadable (") and "\n" not in told
    assert all(part in told for part in ("1 too_easy (", "2 too_hard (", "1 low_variance (", "select.min_std"))
    assert "low_best" not in told


def test_the_table_has_a_row_for_each_stratum_and_adds_up():
    items = [item("a", *RIGHT, source="x"), item("b", *MIXED), item("c", error="x", task="gqa")]
    counts = counts_by_stratum(items, choose(items, RuleConfig()))
    assert list(counts) == ["gqa", "tvg", "tvg/x", "all"]
    assert all(row["items"] == row["kept"] + sum(row[why] for why in REASONS) for row in counts.values())
    lines = list(table(counts))
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


def test_the_histogram_is_drawn_the_same_each_time_and_without_variance_too(tmp_path):
    items = [item("a", 0.2), item("b", 0.5), item("c", error="x", task="gqa")]
    cfg = RuleConfig(rule="mean_range")
    for name in ("1.png", "2.png"):
        plot(items, choose(items, cfg), cfg, tmp_path / name)
    drawn = [(tmp_path / name).read_bytes() for name in ("1.png", "2.png")]
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")
