"""The published annotation formats of benchmarks and training sets: what record one row of each becomes.

convert.py lists the rows, repairs, checks and counts. A function here gives a record (records/record.py) whose `id`
is only its last part (default: the row's number from 0), with spans as they were published, and under `rules` what had
to be decided. It raises BadRecord for a row that cannot be used, and Excluded for a sound row that no task can hold.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from records.record import CHAT, LETTERS, BadRecord, from_temporal_r1

NUMBER = (int, float)
KINDS = {
    str: "a text",
    list: "a list",
    dict: "an object",
    int: "a whole number",
    NUMBER: "a number",
    (int, str): "a name",
}


class Excluded(Exception):
    """A sound row that no task of ours can hold, with its reason."""


@dataclass(frozen=True)
class File:
    """Where a row stands, and what stands in the files beside it."""

    stem: str  # name without endings
    row: int = 0  # number of the row, from 1
    durations: dict[str, Any] = field(default_factory=dict)  # by video: seconds, or an object with `duration`
    spans: dict[str, Any] = field(default_factory=dict)  # NExT-GQA's, by video


# ---- shared --------------------------------------------------------------------------------------------------------
def get(raw: Any, key: str, kind: Any) -> Any:
    """The value of a key, which must be there and of its kind."""
    if not isinstance(raw, dict):
        raise BadRecord(f"expected an object, got {type(raw).__name__}")
    if key not in raw:
        raise BadRecord(f"missing key {key}")
    value = raw[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, NUMBER) and not abs(value) < 1e15):
        raise BadRecord(f"{key} must be {KINDS[kind]}, got {str(value)[:60]!r}")
    return value


def name_of(raw: Any, key: str) -> str:
    """A published id or name, which may be a whole number."""
    return str(get(raw, key, (int, str)))


def type_path(*names: str) -> str:
    """Types from general to special.

    >>> type_path("short", "Audio/Video Quality")
    'short/Audio-Video Quality'
    """
    return "/".join(name.replace("/", "-") for name in names)


def without_letters(options: list) -> list:
    """Options without the letters in front of them, where all of them have theirs.

    >>> without_letters(["A. a dog", "(B) a cat"]), without_letters(["A. Smith", "a cat"])
    (['a dog', 'a cat'], ['A. Smith', 'a cat'])
    """
    heads = [re.match(rf"\s*\(?{letter}[.):]\s*", str(option)) for letter, option in zip(LETTERS, options)]
    return [option[head.end() :] for head, option in zip(heads, options)] if all(heads) else options


def choice(video: str, question: str, options: list, answer: str | int, **more: Any) -> dict:
    """A multiple-choice record; `answer` is the index of the right option or its text.

    Of several options with the text of the answer it is the first, as in the official scripts.
    """
    record = {"task": "mcqa", "video": video, "question": question, "options": without_letters(options)}
    if isinstance(answer, str):
        same = [i for i, option in enumerate(options) if option == answer]
        same = same or [i for i, option in enumerate(record["options"]) if option == answer]
        if not same:
            raise BadRecord(f"answer {answer!r} is none of the options")
        record |= {"rules": ["first_of_equal_options"]} if len(same) > 1 else {}
        answer = same[0]
    return record | {"answer": LETTERS[answer : answer + 1]} | more


def lettered(raw: Any, key: str, num_options: int) -> int:
    """The index of the option whose letter stands in a key."""
    letter = get(raw, key, str).strip()
    if len(letter) != 1 or letter not in LETTERS[:num_options]:
        raise BadRecord(f"{key} must be one of {', '.join(LETTERS[:num_options])}, got {letter[:60]!r}")
    return LETTERS.index(letter)


def grounding(video: str, duration: Any, question: str, segments: list, **more: Any) -> dict:
    return {"task": "tvg", "video": video, "duration": duration, "question": question, "segments": segments} | more


# ---- temporal grounding --------------------------------------------------------------------------------------------
def charades_sta(line: str, file: File) -> dict:
    """`VID start end##sentence`; the durations stand elsewhere."""
    match = re.fullmatch(r"(\S+) (\d+\.?\d*) (\d+\.?\d*)##(.*)", line)
    if not match:
        raise BadRecord(f"expected VID START END##SENTENCE, got {line[:60]!r}")
    video, start, end, sentence = match.groups()
    return grounding(f"{video}.mp4", known_duration(video, file), sentence, [[float(start), float(end)]])


def known_duration(video: str, file: File) -> float:
    entry = file.durations.get(video)
    if entry is None:
        raise BadRecord(f"no duration of video {video!r} in --durations")
    return get(entry if isinstance(entry, dict) else {"duration": entry}, "duration", NUMBER)


def activitynet(row: tuple[str, dict, int], file: File) -> dict:
    """{"v_...": {"duration", "timestamps", "sentences"}}: one record per sentence."""
    video, entry, i = row
    return grounding(f"{video}.mp4", get(entry, "duration", NUMBER), *_sentence(entry, i))


def tacos(row: tuple[str, dict, int], file: File) -> dict:
    """The form of 2D-TAN and VSLNet: as ActivityNet's, but in frames, with `fps` and `num_frames`."""
    video, entry, i = row
    fps, num_frames = get(entry, "fps", NUMBER), get(entry, "num_frames", NUMBER)
    if fps <= 0:
        raise BadRecord(f"fps must be above 0, got {fps!r}")
    sentence, spans = _sentence(entry, i)
    span = [get({"a timestamp": time}, "a timestamp", NUMBER) / fps for time in spans[0]]
    return grounding(video, num_frames / fps, sentence, [span])


def _sentence(entry: dict, i: int) -> tuple[str, list]:
    sentences, times = get(entry, "sentences", list), get(entry, "timestamps", list)
    if not i < len(sentences) == len(times) or not isinstance(sentences[i], str) or not isinstance(times[i], list):
        raise BadRecord("sentences and timestamps do not go together")
    return sentences[i], [times[i]]


def anet_rtl(raw: dict, file: File) -> dict:
    """LITA's questions; the span is the first two `<seconds>` of the answer, as its scorer reads them."""
    times = [float(time) for time in re.findall(r"<(\d+\.?\d*)>", get(raw, "answer", str))[:2]]
    if len(times) < 2:
        raise BadRecord("answer has no <start> <end>")
    video, duration = f"v_{get(raw, 'vid', str)}.mp4", get(raw, "duration", NUMBER)
    return grounding(video, duration, get(raw, "question", str), [times], id=name_of(raw, "question_id"))


def qvhighlights(raw: dict, file: File) -> dict:
    """Moment-DETR's JSON lines: every window is kept. The test release has none."""
    video, windows = f"{get(raw, 'vid', str)}.mp4", get(raw, "relevant_windows", list)
    return grounding(video, get(raw, "duration", NUMBER), get(raw, "query", str), windows, id=name_of(raw, "qid"))


def didemo(raw: dict, file: File) -> dict:
    """Chunks of 5 s, several annotators each with first and last chunk; only the first 30 s were annotated.

    The truth is the span that most annotators gave, the first in a tie: the official score, a mean over the three
    annotators nearest to the prediction, asks for it; the union of all, which a reward would take, is a moment nobody
    marked. All stand under `extra`. The last chunk ends with the video: without `--durations` it counts as 5 s.
    """
    name, num_chunks, times = get(raw, "video", str), get(raw, "num_segments", int), get(raw, "times", list)
    chunks = range(num_chunks)
    if not times or not all(isinstance(t, list) and len(t) == 2 and t[0] in chunks and t[1] in chunks for t in times):
        raise BadRecord(f"times must be [first, last] of {num_chunks} chunks, got {str(times)[:60]!r}")
    spans = [[5.0 * first, 5.0 * (last + 1)] for first, last in times]
    length = 5.0 * num_chunks
    duration = min(length, known_duration(name, file)) if file.durations else length
    ((span, _),) = Counter(map(tuple, spans)).most_common(1)
    more = {"clip": [0.0, duration], "extra": {"annotators": spans}, "id": name_of(raw, "annotation_id")}
    return grounding(name, duration, get(raw, "description", str), [list(span)], **more)


def time_r1(raw: dict, file: File) -> dict:
    """Time-R1's train_2k5.json, with the prediction and difficulty (100 x IoU) that it publishes, as they are.

    `video_start`, `video_end` are bounds in the original video. Of a file whose name carries them
    (ID_00:00:39:000_00:01:24:700.mp4) it is already cut; of any other it is to be used within them.
    """
    name, names = get(raw, "video", str).rsplit("/", 1)[-1], str(raw.get("qid")).split("|")
    more = {"extra": {key: raw[key] for key in ("pred", "difficulty") if key in raw}}
    more |= {"type": type_path(names[1])} if len(names) > 3 else {}
    more |= _clip_of(name, [raw.get("video_start"), raw.get("video_end")])
    duration, question = get(raw, "duration", NUMBER), get(raw, "sentence", str)
    return grounding(name, duration, question, [get(raw, "timestamp", list)], **more)


def _clip_of(name: str, bounds: list) -> dict:
    return {} if None in bounds or re.search(r"(_\d\d:\d\d:\d\d:\d{3}){2}", name) else {"clip": bounds}


def tvgbench(raw: dict, file: File) -> dict:
    """Time-R1's tvgbench.json: the answer is `start-end` in seconds, counted from the row's `start`."""
    name, answer = get(raw, "path", str).rsplit("/", 1)[-1], get(raw, "answer", str)
    span = re.fullmatch(r"(\d+\.?\d*)-(\d+\.?\d*)", answer.replace(" ", ""))
    if not span:
        raise BadRecord(f"answer must be start-end in seconds, got {answer[:60]!r}")
    more = {"type": type_path(get(raw, "qsemtype", str))} | _clip_of(name, [raw.get("start"), raw.get("end")])
    segments = [[float(time) for time in span.groups()]]
    return grounding(name, get(raw, "duration", NUMBER), get(raw, "question", str), segments, **more)


def temporal_r1(raw: dict, file: File) -> dict:
    """Temporal-R1's own rows, which data.py reads too; here their spans are repaired and counted."""
    get(raw, "problem", str), get(raw, "video_length", NUMBER)
    record = from_temporal_r1(raw, file.stem, file.row)
    return record | {"id": name_of(raw, "id") if "id" in raw else str(file.row - 1)}


# ---- grounded question answering -----------------------------------------------------------------------------------
NEXT_TYPES = {"C": "causal", "T": "temporal", "D": "descriptive"}


def nextgqa(raw: dict, file: File) -> dict:
    """The answer is the right option's text; duration and spans stand in gsub_*.json, by video and question."""
    video, qid = get(raw, "video_id", str), get(raw, "qid", str)
    entry = file.spans.get(video)
    if not isinstance(entry, dict) or qid not in get(entry, "location", dict):
        raise BadRecord(f"no spans of video {video!r}, question {qid!r} in --spans")
    record = _next(raw, video, get(raw, "answer", str))
    more = {"task": "gqa", "duration": get(entry, "duration", NUMBER), "segments": entry["location"][qid]}
    return record | more


def nextqa(raw: dict, file: File) -> dict:
    """The answer is an index."""
    answer = get(raw, "answer", str)
    if answer not in list("01234"):
        raise BadRecord(f"answer must be an index from 0 to 4, got {answer[:60]!r}")
    return _next(raw, get(raw, "video", str), int(answer))


def _next(raw: dict, video: str, answer: str | int) -> dict:
    kind, options = get(raw, "type", str), [get(raw, f"a{i}", str) for i in range(5)]
    if kind[:1] not in NEXT_TYPES:
        raise BadRecord(f"type must start with C, T or D, got {kind[:60]!r}")
    more = {"type": type_path(NEXT_TYPES[kind[0]], kind), "id": f"{video}_{get(raw, 'qid', str)}"}
    return choice(f"{video}.mp4", get(raw, "question", str), options, answer, **more)


def rextime(raw: dict, file: File) -> dict:
    """rextime_val.json; the test release has neither answers nor spans."""
    options, spans = get(raw, "options", list), [get(raw, "span", list)]
    more = {"task": "gqa", "duration": get(raw, "duration", NUMBER), "segments": spans, "id": name_of(raw, "qid")}
    more |= {"type": type_path(get(raw, "category", str))}
    video, answer = f"{get(raw, 'vid', str)}.mp4", lettered(raw, "ans", len(options))
    return choice(video, get(raw, "question", str), options, answer) | more


# ---- multiple choice -----------------------------------------------------------------------------------------------
MVBENCH = {  # folders of the published `video` folder, and whose videos are in them
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute "
    "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "sta/sta_video": "action_localization",
    "scene_qa/video": "scene_transition",
    "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
}
MVBENCH_FOLDERS = {task: folder for folder, tasks in MVBENCH.items() for task in tasks.split()}
# The official script uses start and end of these five tasks, and of no other.
MVBENCH_BOUNDS = {"action_localization", "episodic_reasoning", *MVBENCH["star/Charades_v1_480"].split()}


def mvbench(raw: dict, file: File) -> dict:
    """One JSON file per task, answers as text; the episodes of Episodic Reasoning are folders of frames at 3 fps."""
    if file.stem not in MVBENCH_FOLDERS:
        raise BadRecord(f"{file.stem}.json is none of MVBench's files")
    video = f"{MVBENCH_FOLDERS[file.stem]}/{get(raw, 'video', str)}"
    more: dict = {"type": file.stem.replace("_", " ").title().replace("Fine Grained", "Fine-grained")}
    if file.stem in MVBENCH_BOUNDS:
        more["clip"] = [get(raw, "start", NUMBER), get(raw, "end", NUMBER)]
    if file.stem == "episodic_reasoning":
        more["fps"] = 3
    return choice(video, get(raw, "question", str), get(raw, "candidates", list), get(raw, "answer", str), **more)


def videomme(raw: dict, file: File) -> dict:
    """`duration` is a group (short, medium, long), not seconds."""
    options, kind = get(raw, "options", list), type_path(get(raw, "duration", str), get(raw, "task_type", str))
    more = {"type": kind, "id": name_of(raw, "question_id")}
    video, answer = f"{get(raw, 'videoID', str)}.mp4", lettered(raw, "answer", len(options))
    return choice(video, get(raw, "question", str), options, answer, **more)


def tempcompass(row: tuple[str, str, int, Any], file: File) -> dict:
    """{video: {aspect: [question]}}, with the options in the question's lines; the four task forms tell by those."""
    video, aspect, i, raw = row
    question, *lines = map(str.strip, get(raw, "question", str).strip().split("\n"))
    answer, name, file_name = get(raw, "answer", str).strip(), f"{video}_{aspect}_{i}", f"{video}.mp4"
    if lines and lines[-1] == "Generated Caption:":
        raise Excluded("captioning needs a judge")
    if not lines and answer.lower() in ("yes", "no"):
        kind = type_path("yes_no", aspect)
        return choice(file_name, question, ["yes", "no"], answer.lower(), type=kind, id=name)
    kind = type_path("multi-choice" if answer[1:2] == "." else "caption_matching", aspect)
    heads = [re.match(r"[A-Z]\.|(Caption|Sentence|Option) \w+:", line) for line in (answer, *lines)]
    labels = [head[0] for head in heads if head]
    if len(labels) < 3 or len(labels) < len(heads) or labels[0] not in labels[1:]:
        raise BadRecord("question and answer are of none of the four task forms")
    marks = "".join(label[-2] for label in labels[1:])
    if marks not in (LETTERS[: len(marks)], "123456789"[: len(marks)]):  # a reader takes them for places (answers.py)
        raise BadRecord(f"the labels {' '.join(labels[1:])} are not in order")
    options = [line[len(label) :].strip() for label, line in zip(labels[1:], lines)]
    return choice(file_name, question, options, labels[1:].index(labels[0]), type=kind, id=name)


MMVU = {
    "Science": "Astronomy, Biology, Chemistry, Electromagnetism, Geography, Materials Science, Mechanics, "
    "Modern Physics, Neurobiology, Thermodynamics",
    "Healthcare": "Basic Medicine, Clinical Medicine, Dentistry, Pharmacy, Preventive Medicine",
    "Humanities & Social Sciences": "Art, Economics, History, Law, Literature, Management",
    "Engineering": "Biomedical Engineering, Civil Engineering, Computer Science, Electrical Engineering, "
    "Electronics and Communication, Mechanical Engineering",
}
MMVU_DISCIPLINES = {subject: discipline for discipline, names in MMVU.items() for subject in names.split(", ")}


def mmvu(raw: dict, file: File) -> dict:
    """The multiple-choice questions; `video` is a link whose end is the path in the published `videos` folder."""
    if get(raw, "question_type", str) != "multiple-choice":
        raise Excluded("open-ended needs a judge")
    subject = get(get(raw, "metadata", dict), "subject", str).replace("_", " ")
    discipline = next((d for name, d in MMVU_DISCIPLINES.items() if name.lower() == subject.lower()), "other")
    choices = get(raw, "choices", dict)
    options = [choices[letter] for letter in LETTERS if choices.get(letter)]
    video, answer = get(raw, "video", str).rpartition("/videos/")[2], lettered(raw, "answer", len(options))
    more = {"type": type_path(discipline, subject), "id": name_of(raw, "id")}
    return choice(video, get(raw, "question", str), options, answer, **more)


def mlvu(raw: dict, file: File) -> dict:
    """json/1_plotQA.json ... with videos in video/1_plotQA (dev), or the multiple-choice file of the test set."""
    if isinstance(raw, dict) and "candidates" not in raw and "question" in raw:
        raise Excluded("generation needs a judge")
    video = (f"{file.stem}/" if re.match(r"\d_", file.stem) else "") + get(raw, "video", str)
    more = {"type": type_path(get(raw, "question_type", str))}
    more |= {"duration": raw["duration"]} if "duration" in raw else {}
    more |= {"id": name_of(raw, "question_id")} if "question_id" in raw else {}
    return choice(video, get(raw, "question", str), get(raw, "candidates", list), get(raw, "answer", str), **more)


def video_r1(raw: dict, file: File) -> dict:
    """Video-R1's rows, of evaluation and training; `process` (a think block), where there is one, is imitated."""
    kind = get(raw, "problem_type", str)
    if get(raw, "data_type", str) != "video":
        raise Excluded(f"{raw['data_type']!r}, not a video")
    if kind != "multiple choice":
        raise Excluded(f"{kind!r}, not multiple choice")
    options, solution = get(raw, "options", list), get(raw, "solution", str).strip()
    video, more = get(raw, "path", str).removeprefix("./"), {"id": name_of(raw, "problem_id")}
    more |= {"type": type_path(raw["data_source"])} if isinstance(raw.get("data_source"), str) else {}
    more |= {"response": f"{get(raw, 'process', str).strip()}\n{solution}"} if raw.get("process") else {}
    answer = lettered({"solution": re.sub(r"</?answer>", "", solution)}, "solution", len(options))
    return choice(video, get(raw, "problem", str), options, answer, **more)


def llamafactory(raw: dict, file: File) -> dict:
    """LLaMA-Factory's chat rows, one turn about one video: a response to imitate, for supervised tuning alone."""
    turns, videos = get(raw, "messages", list), get(raw, "videos", list)
    if len(videos) != 1 or raw.get("images"):
        raise BadRecord(f"expected one video, got {len(videos)} videos{' and images' if raw.get('images') else ''}")
    roles = [get(turn, "role", str) for turn in turns]
    if roles != ["user", "assistant"]:
        raise BadRecord(f"expected a turn of the user and one of the assistant, got {', '.join(roles)[:60]!r}")
    question, response = (get(turn, "content", str) for turn in turns)
    if question.count("<video>") != 1:
        raise BadRecord(f"the question has {question.count('<video>')} <video> tags, not one")
    more = {"question": question.replace("<video>", "").strip(), "response": response.strip()}
    return {"task": CHAT, "video": get({"video": videos[0]}, "video", str)} | more
