"""Rows of samples.jsonl to read: some of many, with texts taken apart, answers parsed and frames of the clip.

Rewards and advantages are those of the run.
"""

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from jinja2.utils import htmlsafe_json_dumps
from PIL import Image
from tqdm import tqdm

from answers import parse_answer, parse_choice, parse_segments
from config import VideoConfig
from records.tasks import TASKS
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


def browse(files: Mapping[str, Path], num: int, steps: Sequence[int], ids: Sequence[str]) -> dict[str, Any]:
    """What the sample browser shows of the samples.jsonl of each run, by its name; `total` rows are there."""
    found, total = [], 0
    for index, path in enumerate(files.values()):
        views, num_rows = views_of(path, num // len(files), steps, ids)
        found.append([one | {"run": index} for one in views])
        total += num_rows
    views = [one for turn in zip_longest(*found) for one in turn if one]
    sizes = accumulate(len(htmlsafe_json_dumps(one)) for one in views)
    views = [one for one, size in zip(views, sizes) if size <= MAX_ROWS_TEXT]
    frames = frames_for(views)
    views = [one | {"video": cut(Path(one["video"]).name)} for one in views]
    views.sort(key=lambda one: (-one["step"], one["run"], one["place"]))
    return {"runs": list(files), "samples": views, "frames": frames, "total": total}


def read_rows(path: Path, place: int = 0) -> Iterator[tuple[int, dict]]:
    """Place in the file (bytes) and content of each row of a .jsonl from `place` on.

    A row that is still being written is no row, and a file that is not there has no rows.
    """
    with open(path, "rb") if path.is_file() else io.BytesIO() as lines:
        lines.seek(place)
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield place, row
            place += len(line)


def choose(visits: Sequence[Visit], num: int, steps: Sequence[int] = (), ids: Sequence[str] = ()) -> list[Visit]:
    """At most `num` visits, the most wanted first: the newest of those asked for.

    If no steps or ids are asked for, by turns one of the newest, the first of the same sample, and one of an even
    spread over the run.
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
    visits = [Visit(place, row["step"], str(row["id"]), fmean(row["rewards"])) for place, row in read_rows(path)]
    found, of_id = [], defaultdict(list)
    for visit in visits:
        of_id[visit.id].append(visit)
    for visit in choose(visits, num, steps, ids):
        _, row = next(read_rows(path, visit.place), (0, {}))
        if (row.get("step"), str(row.get("id"))) == (visit.step, visit.id):  # else the file was cut back by now
            found.append(view(row, of_id[visit.id]) | {"place": visit.place})
    return found, len(visits)


def view(row: dict[str, Any], visits: Sequence[Visit]) -> dict[str, Any]:
    """What is shown of a row, and of the other `visits` of its sample; numbers that are not finite are None."""
    task, options, clip = TASKS.get(row.get("task")), row.get("options"), row.get("clip")
    columns = (row["completions"], row["rewards"], row.get("parts", ()), row.get("advantages", ()))
    completions = [
        {
            "pieces": pieces(text),
            "reward": _finite(reward),
            "advantage": _finite(advantage),
            "parts": {name: _finite(value) for name, value in (parts or {}).items()},
            "segments": parse_segments(text, options) if task and task.has_segments else [],
            "choice": parse_choice(text, options) if task and task.has_options else None,
        }
        for text, reward, parts, advantage in zip_longest(*columns)
    ]
    mean, first, every = fmean(row["rewards"]), visits[0], len(visits) // MAX_VISITS + 1
    listed = [visit for i, visit in enumerate(visits) if i % every == 0 or visit.step == row["step"]]
    return {key: row.get(key) for key in ("step", "task", "answer", "fps")} | {
        "id": cut(str(row["id"])),
        "question": cut(row.get("question", ""), MAX_QUESTION),
        "options": [cut(option) for option in options or ()],
        "truth": row.get("segments") or [],
        "duration": row.get("duration") or (clip[1] - clip[0] if clip else None),
        "start": clip[0] if clip else 0.0,
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


def cut(text: str, limit: int = MAX_NAME) -> str:
    """The text, or its beginning and end and how much was between them.

    >>> cut("abcdefghij", 6)
    'abcd [4 characters left out] ij'
    """
    head, tail = limit * 2 // 3, limit // 3
    left_out = f" [{len(text) - head - tail:,} characters left out] "
    return text if len(text) <= limit else text[:head] + left_out + text[-tail:]


def pieces(text: str) -> list[tuple[str, str]]:
    """A completion as the parser sees it, tags included: `think`, then `text` around the `answer` that counts.

    >>> pieces("<think>so</think> <answer>B</answer>")
    [('think', '<think>so</think>'), ('text', ' '), ('answer', '<answer>B</answer>')]
    """
    thought, end, rest = text.rpartition("</think>")
    before, answer, after = rest.rpartition(f"<answer>{parse_answer(text)}</answer>")
    found = [("think", thought + end), ("text", before), ("answer", answer), ("text", after)]
    return [(kind, cut(part, MAX_COMPLETION)) for kind, part in found if part]


def frames_for(views: Sequence[dict[str, Any]]) -> list[list[tuple[float, str]]]:
    """The frames of every video of these views, as `frames_of` has them; `view["frames"]` becomes the place of its own.

    It is -1 for a video that cannot be read, and for the videos after MAX_IMAGES is reached.
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

    If `duration` is None, the frames are spread over the whole file from end to end.
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
