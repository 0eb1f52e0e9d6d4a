"""Overlaps of segments: by hand, and by counting small steps of time; no model and no video."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards


@pytest.mark.parametrize(
    ("pred", "truth", "iou", "iop"),
    [
        ([(3, 7)], [(3, 7)], 1, 1),
        ([(3, 7)], [(5, 9)], 2 / 6, 2 / 4),
        ([(0, 20)], [(4, 8)], 0.2, 0.2),
        ([(5, 6)], [(4, 8)], 0.25, 1),
        ([(0, 1)], [(2, 3)], 0, 0),
        ([(0, 2)], [(2, 3)], 0, 0),
        ([(0, 2), (6, 8)], [(1, 7)], 2 / 8, 2 / 4),
        ([(0, 4), (2, 6), (6, 8)], [(0, 8)], 1, 1),  # overlaps within a side count once
        ([(3, 4), (1, 2)], [[1, 4]], 2 / 3, 1),  # any order; lists as in JSON
        ([(6, 6)], [(5, 9)], 0, 1),  # no length, inside
        ([(9, 9)], [(5, 9)], 0, 1),
        ([(10, 10)], [(5, 9)], 0, 0),
        ([(6, 6), (10, 10)], [(5, 9)], 0, 0.5),
        ([(6, 6)], [(6, 6)], 0, 1),
        ([], [(5, 9)], 0, 0),
        ([(5, 9)], [], 0, 0),
        ([(0, 1.7e308)], [(0, 1.0)], 1 / 1.7e308, 1 / 1.7e308),
    ],
)
def test_overlap_by_hand(pred, truth, iou, iop):
    assert rewards.temporal_iou(pred, truth) == pytest.approx(iou)
    assert rewards.temporal_iop(pred, truth) == pytest.approx(iop)


@pytest.mark.parametrize(
    ("pred", "truth", "duration", "expected"),
    [
        ([(4, 8)], [(4, 8)], 20, 1),
        ([(3, 7)], [(5, 9)], 20, 1 / 3 * 0.9 * 0.9),
        ([(0, 20)], [(4, 8)], 20, 0.2 * 0.8 * 0.4),  # the whole video: 0.064
        ([(4, 6)], [(4, 8)], 20, 0.5 * 1 * 0.9),
        ([(9, 12)], [(4, 8)], 20, 0),  # a miss
        ([(5, 5)], [(4, 8)], 20, 0),
        ([(3, 7)], [(5, 9)], None, 1 / 3 * (1 - 2 / 9) ** 2),  # no video that holds both is shorter than 9 s
        ([(0, 2), (6, 8)], [(0, 8)], 10, 0.5),  # the hull has the right ends
        ([(0, 2)], [(0, 2), (6, 8)], 10, 0.5 * 1 * 0.4),
        ([(0, 40)], [(0, 10)], 10, 0),  # not clipped: off by more than the video
        ([], [(4, 8)], 20, 0),
        ([(4, 8)], [], 20, 0),
    ],
)
def test_timestamp_iou_by_hand(pred, truth, duration, expected):
    assert rewards.timestamp_iou(pred, truth, duration) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pred", "truth", "expected"),
    [
        ([(4, 8)], [(4, 8)], 1),
        ([(2, 10)], [(4, 8)], (1 + 0.5) / 2),  # one centre: no distance
        ([(3, 7)], [(5, 9)], (1 + 2 / 6 - (2 / 6) ** 2) / 2),
        ([(0, 20)], [(4, 8)], (1 + 0.2 - (4 / 20) ** 2) / 2),  # the whole video: 0.58
        ([(0, 4)], [(4, 8)], 3 / 8),  # touching
        ([(16, 20)], [(4, 8)], (1 - (12 / 16) ** 2) / 2),
        ([(6, 6)], [(4, 8)], 1 / 2),  # a point at the centre
        ([(20, 20)], [(4, 8)], (1 - (14 / 16) ** 2) / 2),
        ([(0, 2), (6, 8)], [(0, 8)], (1 + 0.5) / 2),
        ([(0, 2), (6, 8)], [(0, 2), (6, 8)], 1),
        ([(0, 8)], [(0, 2), (6, 8)], (1 + 0.5) / 2),
        ([(6, 6)], [(6, 6)], 0),  # no hull
        ([], [(4, 8)], 0),
        ([(4, 8)], [], 0),
        ([(0, 1.7e308)], [(0, 1.0)], (1 - 0.25) / 2),
    ],
)
def test_distance_iou_by_hand(pred, truth, expected):
    assert rewards.distance_iou(pred, truth) == pytest.approx(expected)
    assert rewards.distance_iou(truth, pred) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [(7, 3), (math.nan, 3), (1, math.inf)])
def test_overlap_refuses_what_is_no_segment(bad):
    for overlap in (rewards.temporal_iou, rewards.temporal_iop, rewards.distance_iou):
        for pred, truth in (([bad], [(0, 1)]), ([(0, 1)], [bad])):
            with pytest.raises(ValueError, match="not a segment"):
                overlap(pred, truth)
    with pytest.raises(ValueError, match="not a segment"):
        rewards.timestamp_iou([bad], [(0, 1)], 10)


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


@given(spans, spans)
def test_overlap_equals_counting_unit_cells(pred, truth):
    cells = [{second for start, end in side for second in range(start, end)} for side in (pred, truth)]
    both, either = cells[0] & cells[1], cells[0] | cells[1]
    assert rewards.temporal_iou(pred, truth) == pytest.approx(len(both) / len(either) if either else 0)
    assert rewards.temporal_iou(pred, truth) == rewards.temporal_iou(truth, pred)
    if cells[0]:
        assert rewards.temporal_iop(pred, truth) == pytest.approx(len(both) / len(cells[0]))


def covered(segments) -> list:
    """The union, as disjoint segments with length, to tell whether two answers say the same."""
    return [segment for segment in rewards._merge(segments) if segment[1] > segment[0]]


@given(spans, spans, st.integers(0, 20))
def test_timestamp_iou_is_the_iou_and_a_penalty(pred, truth, more):
    """In [0, 1], symmetric, never above the IoU, equal to it where the ends are right, 1 for the right answer only."""
    duration = max([1, *(end for _, end in pred + truth)]) + more
    value, iou = rewards.timestamp_iou(pred, truth, duration), rewards.temporal_iou(pred, truth)
    assert 0 <= value <= iou
    assert value == rewards.timestamp_iou(truth, pred, duration)
    if value == 1:
        assert covered(pred) == covered(truth)
    assert rewards.timestamp_iou(pred, truth, None) <= value + 1e-12  # a longer video forgives more
    if pred and truth and rewards._hull(pred) == rewards._hull(truth):
        assert value == pytest.approx(iou)


@given(spans, spans)
def test_distance_iou_is_the_iou_and_a_distance(pred, truth):
    """In [0, 1], symmetric, (1 + IoU) / 2 at most, 1 for the right answer only."""
    value, iou = rewards.distance_iou(pred, truth), rewards.temporal_iou(pred, truth)
    assert 0 <= value <= (1 + iou) / 2
    assert value == rewards.distance_iou(truth, pred)
    if value == 1:
        assert covered(pred) == covered(truth)
    if iou == 0 and len(pred) == len(truth) == 1 and pred[0][0] < pred[0][1] and truth[0][0] < truth[0][1]:
        assert value <= 3 / 8


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_distance_iou_tells_misses_apart(gap, length, true_length):
    """The nearer a span of one length, the more it pays, on either side of the truth."""
    start, end = 50, 50 + true_length
    sides = [
        [[(end + away, end + away + length)] for away in (gap, gap + 1)],
        [[(start - away - length, start - away)] for away in (gap, gap + 1)],
    ]
    for near, far in sides:
        assert rewards.distance_iou(near, [(start, end)]) > rewards.distance_iou(far, [(start, end)]) > 0
        assert rewards.temporal_iou(near, [(start, end)]) == rewards.temporal_iou(far, [(start, end)]) == 0


@given(spans.filter(len), st.integers(0, 30), st.integers(1, 9))
def test_pieces_pay_no_more_than_one_span_over_all_of_them(pred, start, length):
    """Points at both ends of the video lengthen the hull and cost no IoU: `0 to 0, 15 to 18, 20 to 20` paid 0.48
    where `15 to 18` pays 0.22 (truth 4 to 8), and such points raised the payment of almost any other answer too."""
    truth = [(start, start + length)]
    assert rewards.distance_iou(pred, truth) <= rewards.distance_iou([rewards._hull(pred)], truth) + 1e-12
