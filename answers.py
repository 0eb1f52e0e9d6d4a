"""A raw response becomes an answer, an option and spans, or none where it is ambiguous.

The reward takes answer blocks alone (`parse_answer`, `parse_choice`, `parse_segments`). Evaluation may also take the
plain words of a model that was not tuned to write such a block (`parse_response`, `eval.answer`).
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import chain, islice
from string import ascii_uppercase
from typing import Any

Segment = tuple[float, float]  # (start, end) in seconds, start <= end
MAX_ANSWER_CHARS = 4000  # a longer answer block is malformed; bounds the number of segments as well

# ---- the answer blocks of a tuned model ------------------------------------------------------------------------------

_FLAGS = re.ASCII | re.IGNORECASE
_TIME_KEYS = (("start_time", "end_time"), ("start", "end"))
_UNIT = r"(?: ?s(?:econds?|ecs?)?)?"
_TO = r"(?:to|--|[-–—~])"  # between two times
_TIME = rf"[0-9:.]+{_UNIT}"
_SPAN = re.compile(
    rf"(?:from )?({_TIME}) ?{_TO} ?({_TIME})|between ({_TIME}) and ({_TIME})"
    rf"|[\[(] ?({_TIME}) ?(?:,|{_TO}) ?({_TIME}) ?[\])]",
    _FLAGS,
)
_SEPARATOR = re.compile(r" ?[,;] ?(?:and )?| and ", _FLAGS)
_SECONDS = re.compile(  # `3.5`, `10s`, `mm:ss` or `hh:mm:ss`
    rf"(?:([0-9]{{1,3}}):([0-5][0-9])|([0-9]{{1,3}})):([0-5][0-9](?:\.[0-9]+)?)|([0-9]+(?:\.[0-9]+)?){_UNIT}", _FLAGS
)
_LETTER_HEAD = re.compile(  # the last kind, a letter and white space, may also be the first word of an option's text
    r"(?:option )?(?:\(([A-Z])\)|([A-Z])(?=[.,:;)]|$)|([A-Z])(?= ))[.,:;)]? ?(.*)", _FLAGS
)
_JOINT = re.compile(r"\.?[,:;]? (?:and )?|[,;](?=[A-Za-z])|(?=[(\[])")  # of an option and segments; `12,5` is a number
_MARKUP = re.compile(  # each alternative ends at the next mark of its kind: linear in the text's length
    r"(?<!\w)(?:\\boxed ?\{([^{}]+)\}|\*\*([^*]+)\*\*|`([^`]+)`|[\"“]([^\"“”]+)[\"”]|'([^']+)')(?!\w)"
)


def parse_answer(text: str) -> str | None:
    """Content of the last closed answer block after the thinking, or None.

    >>> parse_answer("<think><answer>A</answer></think><answer>B</answer><answer>C")
    'B'
    """
    text = text.rpartition("</think>")[2]
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.index("</answer>", start)]


def parse_choice(text: str, options: Sequence[str] | None) -> str | None:
    """`choice_from` of the last answer block; None without one."""
    return choice_from(parse_answer(text) or "", options)


def parse_segments(text: str, options: Sequence[str] | None = None) -> list[Segment]:
    """`segments_from` of the last answer block; [] without one."""
    return segments_from(parse_answer(text) or "", options)


def choice_from(answer: str, options: Sequence[str] | None) -> str | None:
    """The chosen option as an upper-case letter, or None when absent or ambiguous.

    Takes a letter (`b`, `(B)`, `B.`, `Option B`), a letter with its own option's text (`B. a cat`, `B a cat`), with
    segments before or after it (`B, 3 to 7`, `3 to 7, B`) or with both, an option's text (up to white space, case and
    a final full stop), any of these within `**`, `\\boxed{}` or quotes, or JSON with one of these as "answer". With
    `options` None any letter is an option. A text that names two options is ambiguous: that of a duplicated option, or
    a letter that is also another option's text.

    >>> choice_from("(b) 3 to 7", ["a dog", "a cat"]), choice_from("B. a dog", ["a dog", "a cat"])
    ('B', None)
    """
    text = _clean(answer)
    value = _load_json(text)
    if isinstance(value, dict):
        text = _clean(str(value.get("answer") or ""))
    letters = ascii_uppercase[: len(options) if options else None]
    found = {*_options_with_text(text, options), _letter_and_segments(bare(text), options)[0]}
    found = {index for index in found if index is not None and index < len(letters)}
    return letters[found.pop()] if len(found) == 1 else None


def segments_from(answer: str, options: Sequence[str] | None = None) -> list[Segment]:
    """Segments in seconds, in the order given; [] when there is none or anything in the answer is malformed.

    Takes `3 to 7`, `from 3 to 7`, `between 3 and 7`, `3 - 7` (also with `--` or `~`), `(3, 7)`, several separated by
    `,` `;` or `and`, times as `3.5`, `10s`, `mm:ss` or `hh:mm:ss`, the same before or after an option letter
    (`B, 3 to 7`, `B (3 to 7)`) that may have its option's text, any of these within `**`, `\\boxed{}` or quotes, and
    JSON: {"start_time": 3, "end_time": "7"} or start / end, lists of those or of pairs, {"segments": [[3, 7]]}, each
    with an optional "answer" and one further key. Malformed: a reversed, negative or non-finite span, a repeated key, a
    further key with an answer of its own. A span without length is taken.

    >>> segments_from("0:03 to 0:07 and 9s - 12s"), segments_from("7 to 3")
    ([(3.0, 7.0), (9.0, 12.0)], [])
    >>> segments_from("B. a cat, 3 to 7", ["a dog", "a cat"]), segments_from("B. a dog, 3 to 7", ["a dog", "a cat"])
    ([(3.0, 7.0)], [])
    """
    text = _clean(answer)
    value = _load_json(text)
    return _letter_and_segments(bare(text), options)[1] if value is None else _json_segments(value, options)


def bare(text: str) -> str:
    """A text without `**`, backticks, quotes and `\\boxed{}` around its parts, and without a final full stop in them.

    >>> bare('**B**, "3 to 7."'), bare("the man's dog's"), bare(r"\\boxed{**B**}")
    ('B, 3 to 7', "the man's dog's", 'B')
    """
    inner = text
    for _ in range(3):  # marks within marks
        inner = _MARKUP.sub(lambda match: match[match.lastindex].strip(), inner)
    return text if inner == text else inner.strip().removesuffix(".")


def layout_ok(text: str, think: bool) -> bool:
    """Exactly one answer block, after exactly one think block with a letter or digit when thinking, nothing else."""
    text = text.strip()
    num_tags = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if num_tags != [think, think, 1, 1] or not text.endswith("</answer>"):
        return False
    thought = text[: text.index("<answer>")].rstrip()
    if not think:
        return not thought
    return bool(thought.startswith("<think>") and thought.endswith("</think>") and re.search(r"[^\W_]", thought[7:-8]))


def _clean(answer: str) -> str:
    """Single spaces, no code fence, no final full stop; empty when too long."""
    text = " ".join(answer.split()) if len(answer) <= MAX_ANSWER_CHARS else ""
    if len(text) >= 6 and text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json").strip()
    return text.removesuffix(".").rstrip()


def _load_json(text: str) -> Any:
    """Parsed JSON object or list, every number a float; None for anything else. Takes Python's quotes and pairs too."""
    if not text.startswith(("{", "[")):
        return None
    for form in (text, re.sub(r"\(([0-9., ]+)\)", r"[\1]", text).replace("'", '"')):
        try:
            return json.loads(form, parse_int=float, parse_float=float, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _options_with_text(text: str, options: Sequence[str] | None) -> list[int]:
    """Indices of the options with this text; case and marks count only where they decide."""
    for form in (str, str.casefold, lambda part: bare(part).casefold()):
        same = [index for index, option in enumerate(options or ()) if form(_clean(option)) == form(text) != ""]
        if same:
            return same
    return []


def _letter_and_segments(text: str, options: Sequence[str] | None) -> tuple[int | None, list[Segment]]:
    """The index of the letter in an answer and its segments, either of which may be missing.

    (None, []) when anything else stands there but the text of the letter's own option, right after the letter.
    """
    segments, rest = _leading_segments(text)
    joint = _JOINT.match(rest) if segments else None
    head = _LETTER_HEAD.fullmatch(rest[joint.end() :] if joint else text)
    if not head or (head[3] and _options_with_text(text, options)):
        return None, [] if rest else segments
    letter, rest = head[1] or head[2] or head[3], head[4]
    index = ascii_uppercase.index(letter.upper())
    if segments and letter.islower() and index >= len(options or ()):
        return None, []  # `3 to 7, x`: a word
    owners = _options_with_text(rest, options)
    if not rest or index in owners:
        return index, segments or _text_segments(rest)
    own = _clean(options[index]) if options and index < len(options) else ""
    joint = _JOINT.match(rest, len(own)) if own and rest[: len(own)].casefold() == own.casefold() else None
    found = [] if segments or owners else _text_segments(rest) or _text_segments(rest[joint.end() :] if joint else "")
    return (index, found) if found else (None, [])


def _text_segments(text: str) -> list[Segment]:
    """The segments of a text that holds nothing else."""
    segments, rest = _leading_segments(text)
    return [] if rest else segments


def _leading_segments(text: str) -> tuple[list[Segment], str]:
    """The segments that a text begins with, and the text after them. One malformed segment spoils them all."""
    segments, end, span = [], 0, _SPAN.match(text)
    while span:
        segments.append(_segment(*(time for time in span.groups() if time)))
        end = span.end()
        separator = _SEPARATOR.match(text, end)
        span = _SPAN.match(text, separator.end()) if separator else None
    return ([], text) if None in segments else (segments, text[end:])


def _json_segments(value: Any, options: Sequence[str] | None) -> list[Segment]:
    if isinstance(value, dict):
        fields = {key: item for key, item in value.items() if key != "answer"}
        (value,) = _values(fields, ("segments",), options) or [[fields]]
    if not isinstance(value, list):
        return []
    is_pair = len(value) == 2 and not any(isinstance(item, list | dict) for item in value)
    segments = []
    for item in [value] if is_pair else value:
        if isinstance(item, dict):
            item = next((times for keys in _TIME_KEYS if (times := _values(item, keys, options))), None)
        segments.append(_segment(*item) if isinstance(item, list) and len(item) == 2 else None)
    return [] if None in segments else segments


def _values(item: dict[str, Any], keys: Sequence[str], options: Sequence[str] | None) -> list[Any] | None:
    """The values of these keys; None when one is missing, or there is more than one other key or a second answer."""
    others = item.keys() - set(keys)
    if len(item) - len(others) < len(keys) or len(others) > 1 or others & {"segments", *_TIME_KEYS[0], *_TIME_KEYS[1]}:
        return None
    for other in map(item.get, others):
        if isinstance(other, list | dict):
            return None
        if isinstance(other, str) and (segments_from(other, options) or (options and choice_from(other, options))):
            return None  # without options a letter names nothing
    return [item[key] for key in keys]


def _segment(start: Any, end: Any) -> Segment | None:
    start_s, end_s = _seconds(start), _seconds(end)
    return None if start_s is None or end_s is None or start_s > end_s else (start_s, end_s)


def _seconds(value: Any) -> float | None:
    """A finite, non-negative time in seconds from a float or a text."""
    if isinstance(value, str):
        time = _SECONDS.fullmatch(value.strip())
        value = time and 3600 * int(time[1] or 0) + 60 * int(time[2] or time[3] or 0) + float(time[4] or time[5])
    return value if isinstance(value, float) and 0 <= value < math.inf else None


# ---- the plain words of any model ------------------------------------------------------------------------------------

MOST_LEADS = 20  # a text that says "the answer is" more often goes round in circles
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
_SAID_TIME = r"([0-9][0-9.:]*)\s*(s\b|secs?\b|seconds?\b)?"
_AFTER = r"(?![\w:%]|[.,]\d|\s*(?:%|min|hour|people|times))"
_SAID_SPANS = (
    rf"(?<![\w.:,%-]){_SAID_TIME}\s*(?:until|{_TO})\s*{_SAID_TIME}{_AFTER}",
    rf"\bbetween\s+{_SAID_TIME}\s*and\s*{_SAID_TIME}{_AFTER}",
    rf"[\[(]\s*{_SAID_TIME}\s*,\s*{_SAID_TIME}\s*[\])]",
    rf"\bstart[a-z_]*[^0-9\n]{{0,20}}{_SAID_TIME}[^0-9\n]{{0,20}}\bend[a-z_]*[^0-9\n]{{0,20}}{_SAID_TIME}{_AFTER}",
)
_DENIED = re.compile(r"\b(?:not|isn't|doesn't)\s+(?:occur |happen )?(?:from |between |at )?$", _FLAGS)


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
    text = parse_answer(response)
    if answer == "tagged":
        return (None, []) if text is None else (choice_from(text, options), segments_from(text, options))
    if text is None:
        text = response.rpartition("</think>")[2]
        if "<think>" in text:  # a thought that does not end
            return None, []
    plain = bare(text.strip())
    return choice_from(text, options) or _said_choice(plain, options), segments_from(text, options) or _said_span(plain)


def _said_choice(text: str, options: Sequence[str] | None) -> str | None:
    """The one option that a text names: at its start, or after words such as "the correct answer is".

    By its letter, upper case and set off (`B.`, `(B)`, `B` and a line end), by its text, by Yes or No where that is an
    option and begins the text, or by the label that a question may have given it (`Option 2`, `Sentence B`): a label
    counts places. None for a letter or a label with another option's text.

    >>> [_said_choice(text, ["a dog", "a cat"]) for text in ("B\\nIt meows.", "Answer: a cat", "A or B", "B. a dog")]
    ['B', 'B', None, None]
    >>> [_said_choice(text, ["a dog", "a cat"]) for text in ("Option 2: a cat", "Caption B is right", "Option 1 or 2")]
    ['B', 'B', None]
    """
    ends = [lead.end() for lead in islice(_LEAD.finditer(text), MOST_LEADS)]
    found = {_named(text[end : end + MAX_ANSWER_CHARS], options) for end in ends or [0]} | _labelled(text, options)
    if options and _YES_NO.match(text):
        found |= {choice_from(word, options) for word in _YES_NO.findall(text)}
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _named(text: str, options: Sequence[str] | None) -> str | None:
    head, line = _HEAD.match(text), text.partition("\n")[0].strip()
    if head:
        return _letter(ascii_uppercase.index(head[1]), head[2], options)
    return None if len(line.rstrip(".")) == 1 else choice_from(line, options)


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


def _letter(index: int, rest: str, options: Sequence[str] | None) -> str | None:
    """The letter of an option that is named, unless the text after it is that of another one."""
    rest = rest.partition("\n")[0].strip(" .").lower()
    others = [option.strip(" .").lower() for i, option in enumerate(options or ()) if i != index]
    decided = rest not in others and len(rest) != 1
    return ascii_uppercase[index] if decided and index < len(options or ascii_uppercase) else None


def _said_span(text: str) -> list[Segment]:
    """The one span that a text names; those with a unit of seconds go before those without. [] for none or several.

    >>> _said_span("5 to 8 things: between 3 and 7 seconds"), _said_span("3 to 7, or 4 to 8"), _said_span("[3, 7]")
    ([(3.0, 7.0)], [], [(3.0, 7.0)])
    """
    found: dict[Segment, bool] = {}  # span: whether it has a unit
    for match in chain.from_iterable(re.finditer(pattern, text, _FLAGS) for pattern in _SAID_SPANS):
        start, unit, end, end_unit = match.groups()
        span = _segment(start.rstrip(".:"), end.rstrip(".:"))
        if span and not _DENIED.search(text[max(0, match.start() - 40) : match.start()]):
            found[span] = found.get(span, False) or bool(unit or end_unit)
    spans = [span for span, has_unit in found.items() if has_unit] or list(found)
    return spans if len(spans) == 1 else []
