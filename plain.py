"""What a raw response answers: in an answer block, or in the plain words of a model that was not tuned to write one.

For evaluation (`eval.answer`); the reward takes answer blocks alone (rewards.py).
"""

import re
from collections.abc import Sequence
from itertools import islice
from string import ascii_uppercase

from rewards import MAX_ANSWER_CHARS, TO, Segment, bare, choice_from, final_text, parse_answer, segments_from

ANSWER_MODES = ("tagged", "tagged_or_text")
MOST_LEADS = 20  # a text that says "the answer is" more often goes round in circles
_FLAGS = re.ASCII | re.IGNORECASE
_LEAD = re.compile(  # of an answer in plain words
    r"\b(?:answer|option|choice)\b(?: is| would be| to the question is)?(?: option)?\s*:?\s*(?=\S)", _FLAGS
)
_HEAD = re.compile(r"\(?([A-Z])(?:\)|(?=[.:,\n])|(?=\s*$))[.:),]*\s*(.*)", re.ASCII | re.DOTALL)
_YES_NO = re.compile(r"(?:^|[.!?\n]\s{0,3})(yes|no)\b(?=\s?(?:[.,;:!\n–—-]|$))(?!\W{1,3}(?:and|or)\b)", _FLAGS)
_NOUN = r"\b(?i:option|choice|caption|sentence|description|statement)\s+"
_LABEL = re.compile(rf"{_NOUN}\(?(?:([A-Z]|[a-z](?=[.:)\n]|$))|([1-9]\d?))\b", re.ASCII)
# A label is an answer where the words before it choose it or those after it praise it. Mentioning it is not enough.
_CHOSEN = re.compile(r"(?:^|\b(?:is|be|choose|select|pick|answer))\W{0,5}(?:the )?\Z", _FLAGS | re.MULTILINE)
_PRAISED = re.compile(
    r"\)?\s(?:(?!as )\w+ )?(?:the |a )?"
    r"(?:right|correct|better|best|(?:more|most) (?:accurate|suitable|appropriate))",
    _FLAGS,
)
_REFUSED = re.compile(
    r"\)?\s(?:\w+n't|cannot|(?:is|was|does|do|did|has) (?:not|wrong|incorrect|false|inaccurate|less|worse))\b", _FLAGS
)
_NEGATED = re.compile(r"\b(?:neither|nor|not|than|if|whether)\s(?:the )?$", _FLAGS)
_OR_ANOTHER = re.compile(
    rf"\)?\s*(?:(?:[/&]|or\b|and\b)\s*(?:{_NOUN})?\(?(?:[A-Z]|\d)\b|,\s*(?:{_NOUN}|(?:[A-Z]|\d)\b(?!\s[a-z])))",
    re.ASCII,
)
_TIME = r"([0-9][0-9.:]*)\s*(s\b|secs?\b|seconds?\b)?"
_BEFORE, _AFTER = r"(?<![\w.:,%-])", r"(?![\w:%]|[.,]\d|\s*(?:%|min|hour|people|times))"
_SPANS = tuple(
    re.compile(pattern, _FLAGS)
    for pattern in (
        rf"{_BEFORE}{_TIME}\s*(?:until|{TO})\s*{_TIME}{_AFTER}",
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

    The reward's own parser reads the answer first. With `tagged_or_text` it may be a sentence as well, in an answer
    block or without one; where it names two options, or two spans, it has decided on neither.

    >>> parse_response("The answer is (B) a cat.", ["a dog", "a cat"], "tagged_or_text")[0]
    'B'
    >>> parse_response("<answer>It happens from 24.3 to 30.4 seconds.</answer>", None, "tagged_or_text")[1]
    [(24.3, 30.4)]
    """
    text = answer_of(response, answer)
    if text is None:
        return None, []
    choice, segments = choice_from(text, options), segments_from(text, options)
    if answer == "tagged_or_text":
        text = bare(text.strip())
        choice = choice or choice_in(text, options)
        segments = segments or segments_in(text)
    return choice, segments


def choice_in(text: str, options: Sequence[str] | None) -> str | None:
    """The one option that a text names: at its start, or after words such as "the correct answer is".

    By its letter, upper case and set off (`B.`, `(B)`, `B` and a line end), by its text, by Yes or No where that is an
    option, or by the label that a question may have given it (`Option 2`, `Sentence B`): a label counts places. None
    for a letter or a label with another option's text.

    >>> [choice_in(text, ["a dog", "a cat"]) for text in ("B\\nIt meows.", "Answer: a cat", "A or B", "B. a dog")]
    ['B', 'B', None, None]
    >>> [choice_in(text, ["a dog", "a cat"]) for text in ("Option 2: a cat", "Caption B is right", "Option 1 or 2")]
    ['B', 'B', None]
    """
    ends = [lead.end() for lead in islice(_LEAD.finditer(text), MOST_LEADS)]
    found = {_named(text[end : end + MAX_ANSWER_CHARS], options) for end in ends or [0]}
    found |= _labelled(text, options) | _yes_or_no(text, options)
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _named(text: str, options: Sequence[str] | None) -> str | None:
    line = text.partition("\n")[0].strip()
    head = _HEAD.match(text)
    if head:
        return _letter(ascii_uppercase.index(head[1]), head[2], options)
    return None if len(line.rstrip(".")) == 1 else choice_from(line, options)


def _letter(index: int, rest: str, options: Sequence[str] | None) -> str | None:
    """The letter of an option that is named, unless the text after it is that of another one."""
    rest = rest.partition("\n")[0].strip(" .").lower()
    others = [option.strip(" .").lower() for i, option in enumerate(options or ()) if i != index]
    decided = rest not in others and len(rest) != 1
    return ascii_uppercase[index] if decided and index < len(options or ascii_uppercase) else None


def _labelled(text: str, options: Sequence[str] | None) -> set[str | None]:
    """The letters of the options that a text decides on by a label; "Option 1 or 2" decides on two."""
    found: set[str | None] = set()
    for label in _LABEL.finditer(text):
        start, end = label.span()
        index = ascii_uppercase.index(label[1].upper()) if label[1] else int(label[2]) - 1
        praised = _PRAISED.match(text, end) and not _NEGATED.search(text, max(0, start - 20), start)
        chosen = praised or _CHOSEN.search(text, max(0, start - 20), start)
        if chosen and not _REFUSED.match(text, end):
            rest = text[end : end + MAX_ANSWER_CHARS].lstrip(").: ")
            found |= {"A", "B"} if _OR_ANOTHER.match(text, end) else {_letter(index, rest, options)}
    return found


def _yes_or_no(text: str, options: Sequence[str] | None) -> set[str | None]:
    """The letters of the options Yes and No that a text begins a sentence with, where it begins with one."""
    words = _YES_NO.findall(text) if _YES_NO.match(text) else []
    return {choice_from(word, options) for word in words} if options else set()


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
