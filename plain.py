"""What a raw response answers: in an answer block, or in the plain words of a model that was not tuned to write one.

For evaluation (`eval.answer`); the reward takes answer blocks alone (rewards.py).
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from rewards import Segment, choice_from, final_text, parse_answer, segments_from

ANSWER_MODES = ("tagged", "tagged_or_text")
_FLAGS = re.ASCII | re.IGNORECASE
_LEAD = re.compile(  # of an answer in plain words
    r"\b(?:answer|option|choice)(?: is| would be| to the question is)?(?: option)?\s*:?\s*(?=\S)", _FLAGS
)
_HEAD = re.compile(r"\(?([A-Z])(?:\)|(?=[.:,\n])|(?=\s*$))[.:),]*\s*(.*)", re.ASCII | re.DOTALL)
_MARKUP = re.compile(r"\*+|\\boxed\{([^{}]*)\}|`+(?:json)?")
_TIME = r"([0-9][0-9.:]*)\s*(s\b|secs?\b|seconds?\b)?"
_BEFORE, _AFTER = r"(?<![\w.:,%-])", r"(?![\w:%]|[.,]\d|\s*(?:%|min|hour|people|times))"
_SPANS = tuple(
    re.compile(pattern, _FLAGS)
    for pattern in (
        rf"{_BEFORE}{_TIME}\s*(?:to|until|[-–—])\s*{_TIME}{_AFTER}",
        rf"\bbetween\s+{_TIME}\s*and\s*{_TIME}{_AFTER}",
        rf"[\[(]\s*{_TIME}\s*,\s*{_TIME}\s*[\])]",
        rf"\bstart[a-z_]*[^0-9\n]{{0,20}}{_TIME}[^0-9\n]{{0,20}}\bend[a-z_]*[^0-9\n]{{0,20}}{_TIME}{_AFTER}",
    )
)
_DENIED = re.compile(r"\b(?:not|isn't|doesn't)\s+(?:occur |happen )?(?:from |between |at )?$", _FLAGS)


def answer_of(response: str, answer: str = "tagged") -> str | None:
    """The answer in a raw response: the last answer block, or None.

    With `tagged_or_text`, the text after the last think block counts when there is no block; a thought that does not
    end is none.
    """
    tagged = parse_answer(response)
    if tagged is not None or answer == "tagged":
        return tagged
    text = final_text(response)
    return None if "<think>" in text else text


def parse_response(
    response: str, options: Sequence[str] | None, answer: str = "tagged"
) -> tuple[str | None, list[Segment]]:
    """Option letter (None: absent or ambiguous) and segments in seconds ([]: none) of a raw response.

    Within an answer block this is the reward's own parser. A text without one (`tagged_or_text`) may be a sentence;
    where it names two options, or two spans, it has decided on neither.

    >>> parse_response("The answer is (B) a cat.", ["a dog", "a cat"], "tagged_or_text")[0]
    'B'
    >>> parse_response("It happens from 24.3 to 30.4 seconds.", None, "tagged_or_text")[1]
    [(24.3, 30.4)]
    """
    text = answer_of(response, answer)
    if text is None:
        return None, []
    choice, segments = choice_from(text, options), segments_from(text)
    if parse_answer(response) is None:
        text = _MARKUP.sub(lambda match: match[1] or "", text).strip()
        choice = choice or choice_in(text, options)
        segments = segments or segments_in(text)
    return choice, segments


def choice_in(text: str, options: Sequence[str] | None) -> str | None:
    """The one option that a text names: at its start, or after words such as "the correct answer is".

    By its letter, upper case and set off (`B.`, `(B)`, `B` and a line end), or by its text. None for a letter with
    another option's text.

    >>> [choice_in(text, ["a dog", "a cat"]) for text in ("B\\nIt meows.", "Answer: a cat", "A or B", "B. a dog")]
    ['B', 'B', None, None]
    """
    leads = list(_LEAD.finditer(text))
    found = {_named(text[lead.end() :], options) for lead in leads} if leads else {_named(text, options)}
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _named(text: str, options: Sequence[str] | None) -> str | None:
    line = text.partition("\n")[0].strip()
    head = _HEAD.match(text)
    if not head:
        return None if len(line.rstrip(".")) == 1 else choice_from(line, options)
    index, rest = ascii_uppercase.index(head[1]), head[2].partition("\n")[0].strip(" .").lower()
    others = [option.strip(" .").lower() for i, option in enumerate(options or ()) if i != index]
    decided = rest not in others and len(rest) != 1
    return head[1] if decided and index < len(options or ascii_uppercase) else None


def segments_in(text: str) -> list[Segment]:
    """The one span that a text names; those with a unit of seconds go before those without. [] for none or several.

    >>> segments_in("5 to 8 things: between 3 and 7 seconds"), segments_in("3 to 7, or 4 to 8"), segments_in("[3, 7]")
    ([(3.0, 7.0)], [], [(3.0, 7.0)])
    """
    found: dict[tuple[Segment, ...], bool] = {}  # span: whether it has a unit
    for pattern in _SPANS:
        for match in pattern.finditer(text):
            start, unit, end, end_unit = match.groups()
            span = tuple(segments_from(f"{start.rstrip('.:')} to {end.rstrip('.:')}"))
            if span and not _DENIED.search(text[max(0, match.start() - 40) : match.start()]):
                found[span] = found.get(span, False) or bool(unit or end_unit)
    spans = [span for span, has_unit in found.items() if has_unit] or list(found)
    return list(spans[0]) if len(spans) == 1 else []
