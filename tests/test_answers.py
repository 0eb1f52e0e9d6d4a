"""Answers as people and models write them: TempCompass' questions with responses to them, and what the reward pays."""

import json
import time

import pytest
from reward_samples import OPTIONS, config, sample, thought

import answers
import convert
import rewards
from metrics import tasks
from records.files import read_samples
from records.tasks import TASKS

# ---- TempCompass ---------------------------------------------------------------------------------------------------

RUN = "The man runs."
WALK = "The man walks."
QUESTIONS = {  # video: {aspect: [question]}, as published
    "1": {
        "action": [
            {"question": f"Which caption fits?\nCaption A: {RUN}\nCaption B: {WALK}", "answer": f"Caption A: {RUN}"},
            {
                "question": "Which caption?\nCaption A: It grows.\nCaption B: It melts.",
                "answer": "Caption B: It melts.",
            },
            {"question": f"Which?\nCaption A: {RUN}\n Caption B: {WALK}", "answer": f"Caption B: {WALK}"},
        ],
        "speed": [
            {"question": f"Which one?\nSentence A: {RUN}\nSentence B: {WALK}", "answer": f"Sentence B: {WALK}"},
            {
                "question": "Which?\nSentence A: Slow motion.\nSentence B: Time-lapse.",
                "answer": "Sentence B: Time-lapse.",
            },
            {"question": f"Which?\n Sentence A: {RUN}\nSentence B: {WALK}", "answer": f"Sentence A: {RUN}"},
        ],
    },
    "2": {
        "order": [
            {"question": f"Which?\nOption 1: {RUN}\nOption 2: {WALK}", "answer": f"Option 2: {WALK}"},
            {
                "question": "Which?\nOption 1: First he eats.\nOption 2: First he sits.",
                "answer": "Option 1: First he eats.",
            },
            {"question": f"Which?\nOption 1: {RUN}\n  Option 2: {WALK}", "answer": f"Option 2: {WALK}"},
        ],
        "direction": [
            {"question": "What moves?\nA. a dog\nB. a cat\nC. a bird", "answer": "B. a cat"},
            {"question": "What moves?\nA. a dog\n B. a cat\nC. a bird\nD. a man", "answer": "C. a bird"},
        ],
        "attribute_change": [
            {"question": "Does the man run?", "answer": "yes"},
            {"question": "Is it raining?", "answer": "no"},
        ],
    },
}
RESPONSES = {  # a question's place, and what a person reads in each response to it
    "1_action_0": {
        "Caption A": "A",
        "Caption B": "B",
        "caption b": "B",
        "The caption a viewer would choose": None,
        "Caption B is right": "B",
        "Caption B is not right.": None,
        "Caption A is wrong. Caption B is right.": "B",
        f"Caption A: {RUN}": "A",
        f"Caption A: {WALK}": None,  # the label of one with the text of the other
        RUN: "A",
        "The man walks": "B",
        "B": "B",
        "Caption A or Caption B": None,
        "Caption A and B": None,
        "Neither caption A nor caption B is correct.": None,
        f"Caption A: {RUN}\nCaption B: {WALK}": None,  # the question again
        "<answer>Caption B</answer>": "B",
    },
    "1_action_1": {
        "The best caption for the video is **Caption B**.": "B",
        "I think Caption A is the better match.": "A",
        "The best caption is:\n\nCaption B:\n\nIt melts, while Caption A is less accurate.": "B",
        "Caption C": None,
        "I cannot tell: Caption A shows more ice.": None,
    },
    "1_action_2": {"Caption B:\n\nHe walks.": "B", "Option B": "B"},
    "1_speed_0": {
        "Sentence A.": "A",
        "Sentence B. The man takes his time.": "B",
        f"Sentence B: {WALK}": "B",
        "Sentence B better captures the essence of the video.": "B",
        "**Sentence A**": "A",
        "Sentence A does not fit.": None,
        "It is impossible to tell": None,
    },
    "1_speed_1": {"The answer is Sentence B.": "B", "Sentence B is a better match than Sentence A.": "B"},
    "1_speed_2": {"Sentence A:": "A", "Sentence A, Sentence B": None, "(A)": "A"},
    "2_order_0": {
        "Option 2": "B",
        "Option 1": "A",
        f"Option 2: {WALK}": "B",
        f"Option 2: {RUN}": None,
        "Option 3": None,
        "option 2.": "B",
        "The best option is Option 2:": "B",
        "I would choose option 1.": "A",
        "Option 1 or 2": None,
        "Option 1 or Option 2": None,
        "Option B": "B",
        "Not Option 2": None,
        f"Option 1: {RUN} This rules out option 2 as the correct option.": "A",
        "<answer>Option 2</answer>": "B",
        "<answer>A</answer> Option 2": "A",
    },
    "2_order_1": {"Option 1:\nHe eats before he sits.": "A", "Neither.": None},
    "2_order_2": {"Option 2:": "B"},
    "2_direction_0": {
        "B": "B",
        "B. a cat": "B",
        "B. a cat\nThe other options are wrong.": "B",
        "Option C": "C",
        "It is impossible to tell": None,
    },
    "2_direction_1": {"B": "B", "a cat": "B", r"The answer is \boxed{C}": "C", "C. a cat": None},
    "2_attribute_change_0": {
        "Yes, the man runs.": "A",
        "yes": "A",
        "Yes.": "A",
        "No. The man walks.": "B",
        "No, the video shows a woman.": "B",
        "**Yes**, he does.": "A",
        "The answer is no.": "B",
        "Yes or no": None,
        "Yes. No.": None,
        "Yes, and no.": None,
        "No one can say": None,
        "It is impossible to tell": None,
        "Not sure.": None,
        "<answer>Yes, the man runs.</answer>": "A",
        "<think>No.</think>Yes, he runs.": "A",
        "<think>Yes, he": None,  # cut off while thinking
    },
    "2_attribute_change_1": {"No - it is dry.": "B", "No\nIt is dry.": "B", "It is impossible to tell.": None},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Samples of the questions above, through convert.py and data.py, by their places."""
    folder = tmp_path_factory.mktemp("tempcompass")
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    for video in QUESTIONS:
        (folder / f"{video}.mp4").touch()
    convert.main(["tempcompass", "--annotations", str(folder / "questions.json"), "--out", str(folder / "out.jsonl")])
    samples = read_samples(str(folder / "out.jsonl"))
    return {one.id.removeprefix("tempcompass/questions/"): one for one in samples}


def test_every_question_of_tempcompass_is_converted(questions):
    """A blank before an option's line made the row one of no known form."""
    assert questions.keys() == RESPONSES.keys() and len(questions) >= 12
    assert "".join(one.answer for one in questions.values()) == "ABBBBABABBCAB"
    assert questions["1_action_2"].options == questions["1_speed_2"].options == questions["2_order_2"].options
    assert questions["2_order_2"].options == (RUN, WALK)
    assert questions["2_direction_1"].options == ("a dog", "a cat", "a bird", "a man")


@pytest.mark.parametrize(
    ("place", "response", "letter"), [(place, *said) for place, each in RESPONSES.items() for said in each.items()]
)
def test_a_response_to_tempcompass_is_read_as_a_person_reads_it(questions, place, response, letter):
    asked = questions[place]
    assert answers.parse_response(response, asked.options, "tagged_or_text")[0] == letter
    row = {"task": "mcqa", "response": response, "options": asked.options, "answer": asked.answer}
    assert tasks.sample_values(row, "tagged_or_text")["accuracy"] == float(letter == asked.answer)


def test_labels_that_are_not_in_order_are_refused(tmp_path):
    """A label is read as a place, so a question that numbers its options otherwise would be scored wrongly."""
    swapped = {"question": "Which?\nOption 2: x\nOption 1: y", "answer": "Option 1: y"}
    (tmp_path / "q.json").write_text(json.dumps({"1": {"action": [swapped]}}))
    with pytest.raises(SystemExit, match="the labels Option 2: Option 1: are not in order"):
        convert.main(["tempcompass", "--annotations", str(tmp_path / "q.json"), "--out", str(tmp_path / "out.jsonl")])


def test_long_texts_of_labels_and_leads_take_little_time():
    for text in (
        "Option 1 ",
        "Option 1: ",
        "is option 2 or ",
        "Yes. ",
        "yes,",
        "the answer ",
        "**B** ",
        '"B" ',
        "'",
        "**",
    ):
        start = time.process_time()
        answers.parse_response(text * (8000 // len(text)), OPTIONS, "tagged_or_text")
        assert time.process_time() - start < 2, text


# ---- the reward ----------------------------------------------------------------------------------------------------

TVG, MCQA, GQA = (
    (1, {"format": 1, "iou": 1}),
    (1, {"format": 1, "answer": 1}),
    (1, {"format": 1, "answer": 1, "iou": 1}),
)
NOTHING = {name: (0, dict.fromkeys(task.parts, 0)) for name, task in TASKS.items()}

# What answers earn, total and parts. Option B of a dog, a cat, two birds and nobody is right, and 4 to 8 s of 20 s.
PAID = {
    "a leading from": ("tvg", TVG, ["from 4 to 8", "From 4.0 to 8.0 seconds.", "from 0:04 - 0:08"]),
    "between and": ("tvg", TVG, ["between 4 and 8", "Between 4s and 8s.", "between 0:04 and 0:08"]),
    "pairs in round brackets": ("tvg", TVG, ["(4, 8)", "(4.0, 8.0)", "[(4, 8)]", "(4s, 8s)", "[4s, 8s]"]),
    "pairs one after the other": ("tvg", TVG, ["(4, 6), (6, 8)", "[4, 6], [6, 8]", "(4, 6) and (6, 8)"]),
    "tilde and two dashes": ("tvg", TVG, ["4~8", "4 ~ 8", "4--8", "4.0 -- 8.0 s"]),
    "one further key": (
        "tvg",
        TVG,
        [
            '{"start_time": 4, "end_time": 8, "label": "x"}',
            '{"start": "4", "end": "8", "confidence": 0.9}',
            '[{"start": 4, "end": 8, "event": "a cat appears"}]',
            '{"segments": [[4, 8]], "unit": "seconds"}',
        ],
    ),
    "single quotes": (
        "tvg",
        TVG,
        ["{'start_time': 4, 'end_time': 8}", "{'start': '4.0', 'end': '8.0'}", "{'segments': [(4, 8)]}", "['4', '8']"],
    ),
    "marks around a span": (
        "tvg",
        TVG,
        ["**4 to 8**", r"\boxed{4 to 8}", '"4 to 8"', "'4 to 8.'", "`4 to 8`", "**4** to **8**", "“4 to 8”"],
    ),
    "marks around an option": (
        "mcqa",
        MCQA,
        ["**B**", r"\boxed{B}", '"B"', "'B'", "**B.** a cat", '"a cat"', r"**\boxed{B}**", "“B.”", "**a cat.**"],
    ),
    "the word option": ("mcqa", MCQA, ["Option B", "option (b)", "Option B.", "Option B: a cat", "**Option B**"]),
    "a letter, a blank and its text": ("mcqa", MCQA, ["B a cat", "(B) a cat", "b A Cat.", "Option B a cat"]),
    "single quotes around an option": ("mcqa", MCQA, ["{'answer': 'B'}", "{'answer': '(B)', 'why': 'it meows'}"]),
    "a letter, a blank and a span": ("gqa", GQA, ["B 4 to 8", "b 4-8", "Option B 4 to 8", "B from 4 to 8"]),
    "a span in brackets after a letter": ("gqa", GQA, ["B (4 to 8)", "B (4, 8)", "B. (4.0 - 8.0)", "(B) (4s to 8s)"]),
    "a letter, its text and a span": (
        "gqa",
        GQA,
        [
            "B. a cat, 4 to 8",
            "B a cat (4 to 8)",
            "(B) A cat. 4 to 8",
            "B: a cat; between 4 and 8",
            "**B. a cat**, 4 to 8",
        ],
    ),
    "a span before a letter": (
        "gqa",
        GQA,
        ["4 to 8, B", "4 to 8 B", "(4, 8), (B)", "4 to 8; B. a cat", "From 4 to 8 seconds, option B"],
    ),
    "both in JSON": (
        "gqa",
        GQA,
        ["{'answer': 'B', 'start': 4, 'end': 8}", '{"answer": "B", "start": 4, "end": 8, "reason": "it meows"}'],
    ),
    "a wrong option": ("mcqa", (0.5, {"format": 1, "answer": 0}), ["Option A", "A a dog", "**C**", "{'answer': 'D'}"]),
    "half the span": ("tvg", (0.75, {"format": 1, "iou": 0.5}), ["from 4 to 6", "(6, 8)", "4~6", "between 4 and 6"]),
    "the right option and half the span": (
        "gqa",
        (0.8, {"format": 1, "answer": 1, "iou": 0.5}),
        ["B (4 to 6)", "6 to 8, B", "B. a cat, from 4 to 6"],
    ),
    "a miss and a wrong option": (
        "gqa",
        (0.2, {"format": 1, "answer": 0, "iou": 0}),
        ["A 9 to 12", "A. a dog, 9 to 12", "9 to 12, option A"],
    ),
}
REFUSED = {
    "a reversed span": (
        "tvg",
        ["from 8 to 4", "between 8 and 4", "(8, 4)", "8~4", "8 -- 4", "{'start': 8, 'end': 4}", "**8 to 4**"],
    ),
    "half a span": ("tvg", ["from 4", "between 4 and", "4~", "(4, 8", "(4)", "4, 8", "4 and 8", "between 4 to 8"]),
    "a span of other numbers": (
        "tvg",
        ["4 - -8", "-4 to 8", "from -4 to 8", "(-4, 8)", "3,5 to 8,5", "(3,5 to 8,5)", "4 to 8**2**", "4---8"],
    ),
    "two spans": ("tvg", ["4 to 8 or 9 to 12", "from 4 to 8 or from 9 to 12", "(4, 8) or (9, 12)", "4~8~12"]),
    "two answers in JSON": (
        "tvg",
        [
            '{"start_time": 4, "end_time": 8, "start": 9, "end": 12}',
            '{"start_time": 4, "end_time": 8, "start": 9}',
            '{"start_time": 4, "end_time": 8, "other": [9, 12]}',
            '{"start_time": 4, "end_time": 8, "other": "9 to 12"}',
            "{'start': 4, 'start': 0, 'end': 8}",
            '{"segments": [[4, 8]], "start": 9}',
        ],
    ),
    "two further keys": ("tvg", ['{"start": 4, "end": 8, "a": 1, "b": 2}', "{'start': 4, 'end': 8, 'a': 1, 'b': 2}"]),
    "words around a span": (
        "tvg",
        ["it is from 4 to 8", "4 to 8, x", "from 4 to 8 maybe", "cat, 4 to 8", "at 4 to 8", '4 to "8" or so'],
    ),
    "two options": (
        "mcqa",
        [
            "Option A or B",
            "A B",
            "**A** **B**",
            '"A", "B"',
            "Options A and B",
            "Option A, option B",
            "B A",
            "B a cat A",
        ],
    ),
    "the letter of one, the text of another": ("mcqa", ["B a dog", "Option B a dog", "**B.** a dog", "B a dog a cat"]),
    "no option": ("mcqa", ["Option", "Option 2", "Option E", "**", r"\boxed{}", '""', "The answer is B", "B because"]),
    "a letter with the text of another and a span": ("gqa", ["B. a dog, 4 to 8", "4 to 8, B. a dog", "B a dog (4, 8)"]),
    "two options and a span": ("gqa", ["A B 4 to 8", "A, B (4 to 8)", "4 to 8, A or B", "A 4 to 8, B", "B, 4 to 8, A"]),
    "an option and a reversed span": (
        "gqa",
        ["B 8 to 4", "B (8, 4)", "B. a cat, 8 to 4", "8 to 4, B", "B a cat (8 to 4)"],
    ),
    "two spans around an option": ("gqa", ["0 to 2, B, 4 to 8", "4 to 8 B 4 to 8", "0 to 2; B. a cat, 4 to 8"]),
    "one half of the answer": ("gqa", ["Option B", "(4, 8)", "B a cat", "a cat, 4 to 8", "{'start': 4, 'end': 8}"]),
    "a further key with another option": (
        "gqa",
        [
            '{"answer": "B", "start": 4, "end": 8, "option": "A"}',
            '{"answer": "B", "start": 4, "end": 8, "text": "a dog"}',
        ],
    ),
}


def test_the_tables_are_large_enough():
    assert sum(len(answers) for _, _, answers in PAID.values()) >= 80
    assert sum(len(answers) for _, answers in REFUSED.values()) >= 60
    assert all(len(row[-1]) >= 2 for table in (PAID, REFUSED) for row in table.values())


@pytest.mark.parametrize(
    ("task", "answer", "paid"),
    [(task, answer, paid) for task, paid, answers in PAID.values() for answer in answers]
    + [(task, answer, NOTHING[task]) for task, answers in REFUSED.values() for answer in answers],
)
def test_what_an_answer_earns(task, answer, paid):
    reward = rewards.score(thought(answer), sample(task, options=None if task == "tvg" else OPTIONS), config())
    assert (pytest.approx(reward.total), reward.parts) == paid
    assert rewards.score(f"<answer>{answer}</answer>", sample(task), config(think=False)).parts == paid[1]


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["cat", "a cat"], "a cat", "B"),  # the text of B, not the letter A with its own text
        (["cat", "a cat"], "A. cat", "A"),
        (['the sign says "go"', "nothing"], 'the sign says "go"', "A"),
        (['the sign says "go"', "nothing"], "**the sign says 'go'**", "A"),
        (["B", "A", "x"], "**B**", None),
        (["B", "A", "x"], "Option B", "B"),
        (["12", "15"], "A. 12, 3 to 7", "A"),
        (["12", "15"], "A. 12,5 to 13", None),
        (["3 to 7", "8 to 9"], "A 3 to 7", "A"),
        (["3 to 7", "8 to 9"], "B 3 to 7", None),
    ],
)
def test_a_letter_and_awkward_options(options, answer, letter):
    assert answers.choice_from(answer, options) == letter


def test_an_options_number_is_no_part_of_a_span():
    """`A. 12,5 to 13` is option 12 and half a number, and not a span from 5 s."""
    assert answers.segments_from("A. 12, 3 to 7", ["12", "15"]) == [(3, 7)]
    assert answers.segments_from("A. 12,5 to 13", ["12", "15"]) == []
    assert answers.segments_from("A. 123 to 7", ["12", "15"]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In the video he walks.\n\nSo Caption A misses it.", None),
        ("The question is:\ndoes Option A describe it? The man walks.", None),
        ("Let me compare.\n\nIn Sentence A he runs.\nSentence B is right.", "B"),
        ("Reason.\nOption B", "B"),
    ],
)
def test_a_label_that_is_only_mentioned_is_no_answer(text, expected):
    """A line end a few words before a label was once taken for the start of an answer."""
    assert answers.parse_response(text, ["the man runs", "the man walks"], "tagged_or_text")[0] == expected
