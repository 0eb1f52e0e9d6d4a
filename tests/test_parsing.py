"""Parser tables: which answers, options and segments are read from a text; no model and no video."""

import pytest
from reward_samples import OPTIONS

import answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>A</answer><answer>B", "A"),  # an unclosed block is no block
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<think><answer>A</answer></think>", None),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>A</answer><think>x</think>", None),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
        ("<answer", None),
        ("B", None),
        ("", None),
    ],
)
def test_parse_answer(text, answer):
    assert answers.parse_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[(text, "B") for text in ("B", "b", " B\n", "(B)", "(b)", "B.", "B)", "B:", "(B).", "```\nB\n```")],
        *[(text, "B") for text in ("B. a cat", "(B) a cat", "B) A cat.", "b: a  cat", "a cat", "A cat.")],
        *[(text, "B") for text in ("B, 3 to 7", "B. 3 to 7", "(B) 3.0 to 7.5", "B; 1 to 2, 3 to 4")],
        *[(text, "B") for text in ('{"answer": "B"}', '{"answer": "a cat", "start_time": 3, "end_time": 7}')],
        ('```json\n{"answer": "(b)", "segments": [[3, 7]]}\n```', "B"),
        *[(text, None) for text in ("", " ", ".", "()", "E", "BB", "A B", "A, B", "A or B", "AB", "(B", "Ｂ")],
        *[(text, None) for text in ("B. a dog", "B. a cow", "B a dog", "A cat or a dog", "3 to 7", "B, 7 to 3")],
        *[(text, None) for text in ('{"answer": 1}', '{"answer": null}', '["B"]', '{"answer": "A", "answer": "B"}')],
    ],
)
def test_parse_choice(answer, letter):
    assert answers.parse_choice(f"<answer>{answer}</answer>", OPTIONS) == letter


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["x", "x", "y"], "x", None),  # a duplicated option is ambiguous by text, not by letter
        (["x", "x", "y"], "B. x", "B"),
        (["B", "A", "C"], "B", None),  # letter B, or option A's text
        (["B", "A", "C"], "C", "C"),
        (["x", "e"], "E", "B"),  # no option E, so the text decides
        (["us", "US"], "US", "B"),  # case decides where it can
        (["us", "US"], "Us", None),
        (["3 to 7", "8 to 9"], "B. 3 to 7", None),  # another option's text, not a span
        (["3 to 7", "8 to 9"], "A. 3 to 7", "A"),
        (["[1, 2]", "[3, 4]"], "[3, 4]", "B"),
        (["", "x"], "", None),
        ([str(n) for n in range(30)], "29", None),  # no letter is left for it
        (None, "g", "G"),
        (None, "a cat", None),
    ],
)
def test_choice_against_awkward_options(options, answer, letter):
    assert answers.choice_from(answer, options) == letter


GOOD_SEGMENTS = [
    ("3 to 7", [(3, 7)]),
    ("3.25 - 7.5", [(3.25, 7.5)]),
    ("3-7", [(3, 7)]),
    ("3 – 7.", [(3, 7)]),
    ("3s to 7s", [(3, 7)]),
    ("10 seconds TO 12 Seconds", [(10, 12)]),
    ("3 to 7 sec", [(3, 7)]),
    ("5 to 5", [(5, 5)]),
    ("0:03 to 1:07.5", [(3, 67.5)]),
    ("00:00:03 - 01:00:07", [(3, 3607)]),
    ("90:00 to 91:00", [(5400, 5460)]),
    ("3 to 7, 9 to 12", [(3, 7), (9, 12)]),
    ("9 to 12; 3 to 7", [(9, 12), (3, 7)]),  # the order given
    ("1 to 2, 3 to 4, and 5 to 6 and 7 to 8", [(1, 2), (3, 4), (5, 6), (7, 8)]),
    ("B, 3 to 7", [(3, 7)]),
    ("B. 3 to 7", [(3, 7)]),
    ("(B) 3.0 to 7.5 and 8 to 9", [(3, 7.5), (8, 9)]),
    ('{"start_time": "1.0", "end_time": "2.0"}', [(1, 2)]),
    ('{"end": 2, "start": 1e0}', [(1, 2)]),
    ('{"start_time": "00:01", "end_time": "2s"}', [(1, 2)]),
    ('{"segments": [[1, 2], [3, 4]]}', [(1, 2), (3, 4)]),
    ("[[1, 2]]", [(1, 2)]),
    ("[1, 2]", [(1, 2)]),
    ('[{"start_time": 1, "end_time": 2}, {"start_time": 3, "end_time": 4}]', [(1, 2), (3, 4)]),
    ('{"answer": "B", "start_time": 3, "end_time": 7}', [(3, 7)]),
    ('{"answer": "B", "segments": [[3, 7]]}', [(3, 7)]),
    ('```json\n{"start_time": 1, "end_time": 2}\n```', [(1, 2)]),
    ("```\n3 to 7\n```", [(3, 7)]),
]
BAD_SEGMENTS = [
    *("", " ", "nothing", "3", "3 7", "3, 7", "3 to", "to 7", "3 to 7 to 9", "from 3", "3 to 7 maybe"),
    *(
        "7 to 3",
        "3 to 7, 9 to 8",
        "3 to 7,",
        "3 to 7 and",
        "3 to 7, x",
        "-3 to 7",
        "3 to -7",
        "-3 - 7",
        "3---7",
    ),
    *("12:61 to 13:00", "1:60:00 to 2:00:00", "1:5 to 1:6", "1:02:03:04 to 2:00:00:00", ": to :", ". to ."),
    *(
        "nan to 7",
        "3 to inf",
        "1e1 to 20",
        "3 to " + "9" * 400,
        "٣ to ٧",
        "³ to ⁷",
        "３ to ７",
        "1,5 to 2,5",
        "1.2.3 to 4",
    ),
    *("B", "(B)", "B, 7 to 3", "B 7 to 3", "cat, 3 to 7", "__import__('os') to 7", "1+1 to 7", "0x1 to 0x2"),
    *(
        "[]",
        "{}",
        "[[]]",
        "[[1]]",
        "[[1, 2, 3]]",
        "[1, 2, 3, 4]",
        "[[2, 1]]",
        "[[1, 2], [4, 3]]",
        "[[-1, 2]]",
    ),
    *(
        "[[NaN, 2]]",
        "[[1, Infinity]]",
        "[[1, 1e999]]",
        "[[true, 2]]",
        "[[null, 2]]",
        "[[[1, 2]]]",
        "[[1, 2]",
        "12",
    ),
    *(
        '{"start_time": 1}',
        '{"start_time": 2, "end_time": 1}',
        '{"start_time": 1, "end": 2}',
        '{"segments": 3}',
    ),
    *('{"start_time": 1, "start_time": 2, "end_time": 9}', '{"segments": [], "start": 1, "end": 2}'),
    *(
        '{"answer": "B"}',
        '{"segments": []}',
        '{"segments": null}',
        '{"start": "x", "end": 2}',
        '{"start": [1], "end": 2}',
    ),
    *(
        "[[1, 2]] [[3, 4]]",
        '"3 to 7',
        "```",
        "``````",
        "```json```",
        "1 to 2 " + ";" * 100,
        "3 to 7" + " " * 4000,
    ),
]


@pytest.mark.parametrize(("answer", "segments"), [*GOOD_SEGMENTS, *((answer, []) for answer in BAD_SEGMENTS)])
def test_parse_segments(answer, segments):
    assert answers.parse_segments(f"<think>x</think><answer>{answer}</answer>") == segments
    assert answers.parse_segments(answer) == []  # without a block there is no answer
