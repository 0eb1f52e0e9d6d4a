"""Rows of samples.jsonl as one reads them: some of many, texts taken apart, predictions parsed, frames of the clip.

Not a page (report.py), and it scores nothing: rewards and advantages are those of the run. Nothing to run.
"""

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from answers import parse_choice, parse_segments
from config import VideoConfig
from rewards import PARTS
from video.readers import VideoError

MAX_ROWS_TEXT = MAX_IMAGES = 4_000_000  # characters of all rows, and of all frames, that go into one page
MAX_COMPLETION, MAX_QUESTION, MAX_NAME = 10_000, 2000, 200  # characters of one text
MAX_VISITS = 12  # of a sample, that are listed beside the one that is shown
NUM_FRAMES = 8
THUMBNAIL = VideoConfig(
    fps=1, min_frames=NUM_FRAMES, max_frames=NUM_FRAMES, min_pixels=1, max_pixels=160 * 90, total_pixels=10**9
)


class Visit(NamedTuple):
    """One row of samples.jsonl: a sample whose completions were sampled at a step."""

    place: int  # of the row in the file, bytes
    step: int
    id: str
    mean: float  # of the rewards


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Place in the file (bytes) and content of each row of a .jsonl; a row that is still being written is no row."""
    place = 0
    with open(path, "rb") as lines:
        for line in lines:
            row = _parse(line)
            if row is not None:
                yield place, row
            place += len(line)


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_visits(path: Path) -> list[Visit]:
    """All of a samples.jsonl; none where it is not there."""
    rows = read_rows(path) if path.is_file() else ()
    return [Visit(place, row["step"], str(row["id"]), fmean(row["rewards"])) for place, row in rows]


def choose(visits: Sequence[Visit], num: int, steps: Sequence[int] = (), ids: Sequence[str] = ()) -> list[Visit]:
    """At most `num` visits, the most wanted first: the newest of those asked for.

    Nothing asked for: by turns one of the newest, the first of the same sample, and one of an even spread over the run.
    """
    if steps or ids:
        return [v for v in visits[::-1] if (not steps or v.step in steps) and (not ids or v.id in ids)][:num]
    first = {visit.id: visit for visit in visits[::-1]}
    newest = visits[: -num // 3 - 1 : -1]
    spread = visits[:: max(1, len(visits) // num)]
    turns = chain(*zip_longest(newest, [first[visit.id] for visit in newest], spread, visits[::-1]))
    return list(dict.fromkeys(visit for visit in turns if visit))[:num]


def views_of(path: Path, num: int, steps: Sequence[int], ids: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The chosen rows of a samples.jsonl as `view` has them, and how many rows there are."""
    visits, found = read_visits(path), []
    of_id: dict[str, list[Visit]] = defaultdict(list)
    for visit in visits:
        of_id[visit.id].append(visit)
    for visit in choose(visits, num, steps, ids):
        with open(path, "rb") as file:
            file.seek(visit.place)
            row = _parse(file.readline())
        if row is not None and (row.get("step"), str(row.get("id"))) == (visit.step, visit.id):  # else cut back by now
            found.append(view(row, of_id[visit.id]) | {"place": visit.place})
    return found, len(visits)


def view(row: dict[str, Any], visits: Sequence[Visit]) -> dict[str, Any]:
    """What is shown of a row, and of the other `visits` of its sample; numbers that are not finite are None."""
    parts_of, options, clip = PARTS.get(row.get("task"), ()), row.get("options"), row.get("clip")
    columns = (row["completions"], row["rewards"], row.get("parts", ()), row.get("advantages", ()))
    completions = [
        {
            "pieces": pieces(text),
            "reward": _finite(reward),
            "advantage": _finite(advantage),
            "parts": {name: _finite(value) for name, value in (parts or {}).items()},
            "segments": parse_segments(text, options) if "iou" in parts_of else [],
            "choice": parse_choice(text, options) if "answer" in parts_of else None,
        }
        for text, reward, parts, advantage in zip_longest(*columns)
    ]
    mean, first, every = fmean(row["rewards"]), visits[0], len(visits) // MAX_VISITS + 1
    listed = [visit for i, visit in enumerate(visits) if i % every == 0 or visit.step == row["step"]]
    return {
        "step": row["step"],
        "id": cut(str(row["id"]), MAX_NAME),
        "task": row.get("task"),
        "question": cut(row.get("question", ""), MAX_QUESTION),
        "options": [cut(option, MAX_NAME) for option in options or ()],
        "answer": row.get("answer"),
        "truth": row.get("segments") or [],
        "duration": row.get("duration") or (clip[1] - clip[0] if clip else None),
        "start": clip[0] if clip else 0.0,
        "fps": row.get("fps"),
        "video": row.get("video", ""),
        "mean": _finite(mean),
        "std": _finite(pstdev(row["rewards"])) if math.isfinite(mean) else None,
        "change": _finite(mean - first.mean) if first.step != row["step"] else None,
        "since": first.step,
        "visits": [(visit.step, _finite(visit.mean)) for visit in listed],
        "completions": completions,
    }


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end and how much was between them.

    >>> cut("abcdefghij", 6)
    'abcd [4 characters left out] ij'
    """
    head, tail = limit * 2 // 3, limit // 3
    return (
        text
        if len(text) <= limit
        else f"{text[:head]} [{len(text) - head - tail:,} characters left out] {text[-tail:]}"
    )


def pieces(text: str) -> list[tuple[str, str]]:
    """A completion as the parser sees it, tags included: `think`, then `text` around the `answer` that counts.

    >>> pieces("<think>so</think> <answer>B</answer>")
    [('think', '<think>so</think>'), ('text', ' '), ('answer', '<answer>B</answer>')]
    """
    thought, end, rest = text.rpartition("</think>")
    start = rest.rfind("<answer>", 0, max(rest.rfind("</answer>"), 0))
    stop = rest.index("</answer>", start) + len("</answer>") if start >= 0 else 0
    start = max(start, 0)
    found = [("think", thought + end), ("text", rest[:start]), ("answer", rest[start:stop]), ("text", rest[stop:])]
    return [(kind, cut(part, MAX_COMPLETION)) for kind, part in found if part]


def size_of(one: dict[str, Any]) -> int:
    """Characters of a view as JSON in HTML, where `<`, `>`, `&` and `'` take six."""
    text = json.dumps(one)
    return len(text) + 5 * sum(map(text.count, "<>&'"))


def within_budget(views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first views, as many as MAX_ROWS_TEXT takes."""
    totals = accumulate(map(size_of, views))
    return [one for one, total in zip(views, totals) if total <= MAX_ROWS_TEXT]


def frames_for(views: Sequence[dict[str, Any]]) -> list[list[tuple[float, str]]]:
    """The frames of every video of these views, as `frames_of` has them; `view["frames"]` becomes the place of its own.

    -1 for a video that cannot be read, and for those after MAX_IMAGES is reached.
    """
    places: dict[tuple, int] = {}
    found, total = [], 0
    for one in tqdm(views, "frames", unit="sample", disable=None, leave=False):
        file = (one["video"], one["start"], one["duration"], one["fps"])
        if file not in places and total < MAX_IMAGES:
            frames = frames_of(*file)
            total += sum(len(image) for _, image in frames)
            places[file] = len(found) if frames else -1
            found += [frames] if frames else []
        one["frames"] = places.get(file, -1)
    return found


@lru_cache(maxsize=1000)
def frames_of(path: str, start: float, duration: float | None, fps: float | None) -> list[tuple[float, str]]:
    """Seconds from `start` and a small image (data URI) of the middle of each eighth of a clip; [] if unreadable.

    With `duration` None, of the whole file from end to end.
    """
    from video.budget import Geometry
    from video.frames import decode_video  # here, so that arguments are read without torch

    even_sides = Geometry(2, 1, 1, (0.0,) * 3, (1.0,) * 3)
    inset = duration / NUM_FRAMES / 2 if duration else 0.0
    clip = (start + inset, start + duration - inset) if duration else None
    try:
        frames = decode_video(path, THUMBNAIL, even_sides, clip, fps)
    except VideoError:
        return []
    found = []
    for time_s, pixels in zip(frames.times.tolist(), frames.frames):
        file = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "WEBP", quality=55)
        found.append((round(time_s + inset, 2), "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()))
    return found
