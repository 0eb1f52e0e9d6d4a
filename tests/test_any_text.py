"""Any text: rewards of generated and random outputs are finite, in range and quick; no model and no video."""

import itertools
import math
import random
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reward_samples import OPTIONS, OVERLAPS, THINK, config, sample, thought

import answers
import rewards
from records.tasks import TASKS

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "<", "<answer", "<think>I look.</think>"]
JSON = ["{", "}", "[", "]", '"', ":", '{"a":', '"start_time"', '"segments": [[', '"answer": "B"', "NaN", "1e999", "```"]
TIMES = ["3", "7.5", "-3", "1e309", "nan", "inf", "1.2.3", "12:61", "0:03", "1:02:03", "10s", "٣", "३", "９", "9" * 400]
WORDS = ["B", "(b)", "A. ", "a cat", "C or D", " to ", "-", "–", ",", ";", " and ", "8 to 4", "3 to 7", "\n", "\\"]
ODD = ["\ud800", "\x00", "\u200b", "\u2028", "İ", "ß", "🎥", "\u202e", "é"]
UNITS = TAGS + JSON + TIMES + WORDS + ODD + [" ", "  ,", ".", "1:", "3 to 7, ", "3 - ", "9.", '{"answer":', "[[1, 2], "]
LENGTHS = [10] * 4 + [100] * 4 + [1000] * 2 + [3900] * 2 + [20_000, 100_000]  # on either side of the answer's limit
WRAPS = ["{}", "<answer>{}</answer>", THINK + "<answer>{}</answer>", THINK + "<answer>3 to 7{}</answer>"]
WRAPS += ["<think>{}</think><answer>B</answer>", "<think><answer>B</answer></think>{}", "```json\n{}\n```"]
AWKWARD = ["3 to 7", "4 to 8", "[4, 8]", "B", "A", "", "A, 4 to 8", '{"answer": "C"}', "b.", "```"]
ROWS = [
    *(sample(task, options=options) for task in TASKS for options in (OPTIONS, AWKWARD)),
    sample("tvg", duration=None, segments=[(0.0, 2.5), (6.0, 7.0)]),
]
ASKED = [
    (row, config(think, overlap=overlap))
    for row, think, overlap in itertools.product(ROWS, (True, False), OVERLAPS)
    if row.task != "mcqa" or overlap == "iou"
]

pieces = st.lists(st.one_of(st.sampled_from(UNITS), st.text(max_size=5)), max_size=25).map("".join)
repeats = st.builds(lambda unit, num: unit * (num // len(unit) + 1), st.sampled_from(UNITS), st.sampled_from(LENGTHS))
bodies = st.one_of(pieces, pieces, pieces, st.text(), repeats, st.builds("{}{}{}".format, pieces, repeats, pieces))
outputs = st.builds(lambda wrap, body: wrap.replace("{}", body), st.sampled_from(WRAPS), bodies)


def random_output(rng: random.Random) -> str:
    """One string of the grammar of `outputs`, without hypothesis."""

    def few() -> str:
        num, odd = rng.randrange(25), chr(rng.randrange(0x11000))
        return "".join(rng.choices([*UNITS, odd], k=num))

    def run() -> str:
        unit = rng.choice(UNITS)
        return unit * (rng.choice(LENGTHS) // len(unit) + 1)

    body = rng.choice([few, few, few, few, run, lambda: few() + run() + few()])()
    return rng.choice(WRAPS).replace("{}", body)


def check_any(text: str) -> tuple[float, int]:
    """Score one text for every row, layout and overlap; returns the seconds of CPU and the number of scores."""
    start = time.process_time()
    results = [rewards.score(text, row, cfg) for row, cfg in ASKED]
    seconds = time.process_time() - start
    for (row, _), reward in zip(ASKED, results):
        assert tuple(reward.parts) == TASKS[row.task].parts
        assert all(math.isfinite(x) and 0 <= x <= 1 for x in (reward.total, *reward.parts.values()))
    return seconds, len(results)


def report(name: str, times: list[tuple[float, int]], capsys) -> None:
    mean_ms = 1000 * sum(seconds for seconds, _ in times) / sum(num for _, num in times)
    worst_ms = 1000 * max(seconds / num for seconds, num in times)
    with capsys.disabled():
        print(f"\n{name}: {len(times)} strings, {mean_ms:.3f} ms of CPU per score, {worst_ms:.1f} ms for the worst")


def test_any_text_gives_finite_numbers_between_0_and_1(capsys):
    times = []

    @settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(outputs)
    @example("[" * 3000)
    @example(thought("[" * 3900))
    def run(text):
        times.append(check_any(text))

    run()
    report("hypothesis", times, capsys)


@pytest.mark.slow
def test_a_hundred_thousand_texts(capsys):
    rng = random.Random(0)
    report("seeded", [check_any(random_output(rng)) for _ in range(100_000)], capsys)


@settings(max_examples=200, deadline=None)
@given(outputs, st.sampled_from(list(TASKS)), st.booleans())
def test_any_text_without_the_gate(text, task, think):
    reward = rewards.score(text, sample(task), config(think, gate=False))
    assert all(math.isfinite(x) and 0 <= x <= 1 for x in (reward.total, *reward.parts.values()))


@pytest.mark.parametrize("num_chars", [3900, 100_000])
@pytest.mark.parametrize("unit", UNITS)
def test_long_runs_of_anything_take_little_time(unit, num_chars):
    """Nested, unclosed and repeated, on either side of the answer's length limit: no quadratic parser."""
    text = unit * (num_chars // len(unit))
    for wrap, task in itertools.product(WRAPS, TASKS):
        start = time.process_time()
        assert 0 <= rewards.score(wrap.replace("{}", text), sample(task), config()).total <= 1
        assert time.process_time() - start < 0.1


def test_an_answer_past_the_length_limit_is_malformed():
    many = ", ".join(["1 to 2"] * 400)
    assert len(answers.segments_from(many)) == 400
    assert answers.segments_from(many + ", " + many) == []
    assert answers.choice_from("B" + " " * answers.MAX_ANSWER_CHARS, OPTIONS) is None
