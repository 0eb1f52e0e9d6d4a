"""The validation samples that are answered, and what they share with the training set."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from metrics.validation import counts_of, even_shares, shared, spread
from records.files import read_samples
from records.record import Sample


def samples_of(*groups):
    """So many samples of each (task, source, number), one group after the other."""
    return [Sample(f"{source}/{task}/{i}", task, "", "") for task, source, num in groups for i in range(num)]


def test_a_mix_of_tasks_is_spread_over_them():
    """The first 200 of these records were 148, 52 and 0 of the three tasks."""
    mix = samples_of(("tvg", "tiny", 148), ("mcqa", "tiny", 60), ("gqa", "tiny", 148))
    chosen = spread(mix, 200)
    assert counts_of(chosen) == "tvg/tiny 70, mcqa/tiny 60, gqa/tiny 70"
    assert counts_of(spread(mix, 100)) == "tvg/tiny 33, mcqa/tiny 33, gqa/tiny 34"
    assert chosen == sorted(chosen, key=mix.index) and chosen == spread(mix, 200)


def test_a_task_of_several_sources_is_spread_over_those():
    """Nine for each task, and of the first one's nine the small source gives all that it has."""
    mix = samples_of(("tvg", "a", 50), ("tvg", "b", 2), ("tvg", "c", 50), ("mcqa", "d", 50))
    assert counts_of(spread(mix, 18)) == "tvg/a 3, tvg/b 2, tvg/c 4, mcqa/d 9"
    named = [replace(sample, source="x") for sample in mix]
    assert counts_of(spread(named, 18)) == "tvg/x 9, mcqa/x 9"


def test_those_of_one_source_are_evenly_spaced():
    assert [sample.id for sample in spread(samples_of(("tvg", "a", 10)), 3)] == ["a/tvg/0", "a/tvg/3", "a/tvg/6"]


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 100))
def test_shares_are_as_even_as_the_groups_allow(sizes, num):
    shares = even_shares(sizes, num)
    assert sum(shares) == min(num, sum(sizes)) and all(0 <= a <= b for a, b in zip(shares, sizes))
    cut = [share for share, size in zip(shares, sizes) if share < size]
    assert not cut or (max(cut) - min(cut) <= 1 and max(shares) <= max(cut) + 1)


def test_what_two_splits_share_is_counted(tmp_path):
    """By content under another id; a video under another name. A question about a shared video is its own."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    first = Sample("1", "tvg", str(tmp_path / "a.mp4"), "When?", 10.0, segments=((1.0, 2.0),))
    train = [first, replace(first, id="2", video=str(tmp_path / "b.mp4"))]
    other = replace(first, id="3", question="And when?")
    assert shared(train, [replace(other, id="1", video="c.mp4")]) == (0, 0)  # the number alone is equal
    assert shared(train, [replace(first, id="4", video=str(tmp_path / "link.mp4"), source="copy")]) == (1, 1)
    assert shared(train, [other, replace(other, id="5")]) == (0, 1)
    assert shared(train, [replace(other, video="c.mp4")]) == (0, 0)


def test_the_splits_of_the_tiny_world_share_nothing(world):
    train, validation = (read_samples(str(world / f"mix_{split}.yaml")) for split in ("train", "validation"))
    assert shared(train, validation) == (0, 0) and shared(train, train) == (
        len(train),
        len({sample.video for sample in train}),
    )
    num = len(validation)
    assert set(Counter(sample.task for sample in spread(validation, num // 2))) == {"tvg", "mcqa", "gqa"}
