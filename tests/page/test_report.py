"""Reports of run folders: numbers of the curves and tables, what the page holds, and what must not get out of it."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from clips import grey, write_clip
from hypothesis import given
from hypothesis import strategies as st
from jinja2.utils import htmlsafe_json_dumps
from PIL import Image
from run_folders import CONFIG, HOSTILE, metrics_row, prediction, sample_row, write_evaluation, write_training

import report
from answers import parse_answer
from metrics.compare import read_result
from metrics.intervals import paired_interval
from page import samples
from page.curves import downsample, panel, sections
from page.runs import Evaluation, read_run
from page.samples import Visit, browse, choose, cut, frames_of, pieces, read_rows, view
from page.tables import by_questions, scatter, task_table
from report import csp_hash

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), its visible text, and the content of style and script elements."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.elements, self.text, self.raw, self._open = html, [], "", {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs).get("id")) if tag in ("style", "script") else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.raw[self._open] = self.raw.get(self._open, "") + data
        else:
            self.text += data

    def rows(self, name: str) -> list[list[str]]:
        """The texts of the cells of each row of the table of this class."""
        table = re.search(f'<table class="{name}">(.*?)</table>', self.html, re.DOTALL)[1]
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr")[1:]]
        return [[re.sub("<.*?>", "", cell) for cell in row] for row in cells]

    @property
    def data(self) -> dict:
        return json.loads(self.raw["script", "data"], parse_constant=pytest.fail)  # NaN is no JSON


def brightness(image: str) -> float:
    """Of a data URI."""
    kind, _, content = image.partition(";base64,")
    assert kind == "data:image/webp"
    return float(np.array(Image.open(io.BytesIO(base64.b64decode(content)))).mean())


def written(*arguments) -> Page:
    report.main([str(argument) for argument in arguments])
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else arguments[0] / "report.html"
    return Page(out.read_text(encoding="utf-8"))


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_mean_and_its_extremes():
    values = np.random.default_rng(0).normal(size=12_000)
    values[[17, 9000]] = -9, 9
    line = downsample(np.arange(12_000), values)
    assert len(line) == 80 and line[:, 1].mean() == pytest.approx(values.mean())
    assert line[:, 2].min() == -9 and line[:, 3].max() == 9


def drawn(curve, last: float = 5.0, title: str = "kl") -> ET.Element:
    """The SVG of a plot with one curve."""
    return ET.fromstring(panel(title, {"a": curve}, last, "")["svg"])


def points_of(svg: ET.Element, colour: str = "var(--c0)") -> list[list[tuple[float, float]]]:
    """The stretches of the line of a colour, in points of the plot with y downwards."""
    (path,) = (path.get("d") for path in svg.iter(f"{SVG}path") if path.get("stroke") == colour and path.get("fill"))
    stretches = [re.findall(r"([\d.-]+) ([\d.-]+)", part) for part in path.split("M")[1:]]
    return [[(float(x), float(y)) for x, y in stretch] for stretch in stretches]


def test_a_line_is_where_its_values_are():
    """Values 0 to 4 at steps 1 to 5 with a gap at step 3; y goes down."""
    curve = (np.arange(1.0, 6.0), np.array([0.0, 1.0, np.nan, 3.0, 4.0]))
    stretches = points_of(drawn(curve))
    (left, bottom), *_, (right, top) = points = [point for stretch in stretches for point in stretch]
    assert [len(stretch) for stretch in stretches] == [2, 2] and left < right and top < bottom
    assert [x for x, _ in points] == pytest.approx(
        [left + share * (right - left) for share in (0, 0.25, 0.75, 1)], abs=0.2
    )
    assert [y for _, y in points] == pytest.approx(
        [bottom + share * (top - bottom) for share in (0, 0.25, 0.75, 1)], abs=0.2
    )
    assert panel("kl", {"a": curve}, 5.0, "")["legend"] == [
        (0, "a: last 4, from 0 (step 1) to 4 (step 5), 1 not finite")
    ]


def test_runs_keep_their_colours_and_are_told_apart():
    """The second of two runs has the second colour, in plots that the first is missing from as well."""
    curve = (np.arange(1.0, 3.0), np.array([1.0, 2.0]))
    plot = panel("kl", {"a": None, "b": curve}, 5.0, "nats per token")
    assert plot["legend"] == [(1, "b: last 2, from 1 (step 1) to 2 (step 2)")]
    svg = ET.fromstring(plot["svg"])
    assert points_of(svg, "var(--c1)") and {"step", "nats per token"} <= {text.text for text in svg.iter(f"{SVG}text")}
    plot = panel("kl", dict.fromkeys("abcdefghij", curve), 5.0, "")
    assert plot["legend"][9][0] == 9
    paths = [path for path in ET.fromstring(plot["svg"]).iter(f"{SVG}path") if path.get("fill") == "none"]
    looks = {(path.get("stroke"), path.get("stroke-dasharray")) for path in paths} - {(None, None), ("var(--cd)", None)}
    assert len(looks) == 10 and len({look for look in looks if look[1] is None}) == 4


def test_a_long_curve_has_a_band_and_a_short_one_dots():
    short, long = ((np.arange(1.0, num + 1), np.sin(np.arange(num))) for num in (10, 1000))
    assert "fill-opacity" in panel("kl", {"a": long}, 1000, "")["svg"]
    assert "fill-opacity" not in panel("kl", {"a": short}, 10, "")["svg"]
    assert [panel("kl", {"a": curve}, 1000, "")["svg"].count("<use") for curve in (short, long)] == [10, 1]
    assert len(points_of(drawn(long, 1000))[0]) <= 80


def test_a_drawing_is_the_same_each_time_and_needs_no_style_or_id():
    series = {name: (np.arange(1.0, 4.0), np.arange(3.0)) for name in ("kl", "reward/total", "time/step")}
    first, second = (sections({"a": series, "b": series}) for _ in range(2))
    assert first == second
    for plot in (plot for section in first for plot in section["panels"]):
        elements = list(ET.fromstring(plot["svg"]).iter())
        assert not any(element.get("style") or element.tag.endswith("style") for element in elements)
        assert all(element.get("id", "m").startswith(("m", "p")) for element in elements) and "20" not in plot["title"]


@pytest.mark.parametrize(
    "values", [[1e300, -1e300, 1.0], [1e-300, 2e-300, 0.0], [5.0, 5.0, np.nan], [np.nan, np.inf, np.nan]]
)
def test_values_of_any_size_are_drawn(values):
    plot = panel("kl", {"a": (np.arange(1.0, 4.0), np.array(values))}, 3.0, "")
    assert "nan" not in plot["svg"] and "inf" not in plot["svg"] and plot["legend"]


def test_phases_of_a_step_share_a_plot():
    rows = [metrics_row(step, 3) for step in (1, 2, 3)]
    series = {name: (np.arange(1.0, 4.0), np.array([row[name] for row in rows])) for name in rows[0] if name != "step"}
    found = {section["title"]: section for section in sections({"a": series})}
    phases, whole = found["Speed"]["panels"]
    assert (phases["title"], whole["title"]) == ("time by phase", "time/step")
    assert [text.partition(":")[0] for _, text in phases["legend"]] == ["data", "data_wait", "rollout", "update"]
    shares = found["Groups"]["panels"][0]["legend"]
    assert (2, "mixed: always 0.75") in shares and len(shares) == 3
    both = [plot["title"] for plot in sections({"a": series, "b": series})[-1]["panels"]]
    assert both[:2] == ["time by phase, a", "time by phase, b"]


def test_every_metric_is_shown_once():
    rows = [metrics_row(step, 5, **{"my/own": step, "loss": 0.0}) for step in range(1, 6)]
    series = {name: (np.arange(1.0, 6.0), np.array([row[name] for row in rows])) for name in rows[0] if name != "step"}
    shown = []
    for section in sections({"a": series, "b": {"loss": series["loss"]}}):
        shown += [plot["title"] for plot in section["panels"]] + list(section["constant"])
    together = {name for name in series if name.startswith(("time/", "group/frac_"))} - {"time/step"}
    assert sorted(shown) == sorted({"time by phase, a", "shares of groups, a"} | series.keys() - together)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_row_being_written_is_no_row_yet(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [json.dumps({"text": "\u2028é"}, ensure_ascii=False), "[1]", '{"a": 1}']
    path.write_bytes(("\n".join(rows) + "\n").encode() + '{"b": "é'.encode()[:-1])
    found = list(read_rows(path))
    assert [row for _, row in found] == [{"text": "\u2028é"}, {"a": 1}]
    for place, row in found:
        assert json.loads(path.read_bytes()[place:].partition(b"\n")[0]) == row


def visits_of(num_steps: int, num_ids: int) -> list[Visit]:
    return [Visit(10 * step, step, f"id{step % num_ids}", step / num_steps) for step in range(1, num_steps + 1)]


def test_the_newest_groups_come_with_the_first_of_the_same_samples():
    visits = visits_of(1000, 50)
    chosen = choose(visits, 30)
    assert len(set(chosen)) == len(chosen) == 30
    newest = [visit for visit in chosen if visit.step > 1000 - 10]
    assert len(newest) >= 9 and {visit.id for visit in newest} <= {visit.id for visit in chosen if visit.step <= 50}
    assert any(300 < visit.step < 700 for visit in choose(visits, 60))
    assert sorted(choose(visits, 2000)) == visits and choose([], 30) == []


def test_groups_that_are_asked_for_are_the_ones_shown():
    visits = visits_of(1000, 50)
    assert [visit.step for visit in choose(visits, 3, ids=["id7"])] == [957, 907, 857]
    assert [visit.step for visit in choose(visits, 30, steps=[7, 8, 2000])] == [8, 7]
    assert [visit.step for visit in choose(visits, 30, steps=[7, 8], ids=["id7"])] == [7]


TAGS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "so ", "B"])


@given(st.lists(TAGS, max_size=12).map("".join))
def test_the_answer_that_is_set_apart_is_the_one_that_is_parsed(text):
    found = pieces(text)
    assert "".join(part for _, part in found) == text
    answers = [part.removeprefix("<answer>").removesuffix("</answer>") for kind, part in found if kind == "answer"]
    assert answers == [answer for answer in [parse_answer(text)] if answer is not None]


def test_a_view_of_a_row():
    """Sampled at step 1 with mean reward 0.25, now 0.75."""
    row = sample_row(step=9, task="gqa", options=["cat", "dog"], answer="B", clip=[30.0, 50.0], duration=None)
    row["completions"][0] = "<think>5 to 6</think><answer>B, 5 to 15</answer>"
    found = view(row | {"rewards": [1.0, 0.5]}, [Visit(0, 1, "a", 0.25), Visit(9, 9, "a", 0.75)])
    assert (found["duration"], found["start"], found["mean"], found["std"]) == (20.0, 30.0, 0.75, 0.25)
    assert (found["change"], found["since"], found["visits"]) == (0.5, 1, [(1, 0.25), (9, 0.75)])
    first, second = found["completions"]
    assert (first["choice"], first["segments"], first["advantage"]) == ("B", [(5.0, 15.0)], 0.7071)
    assert (second["choice"], second["segments"], second["parts"]) == (None, [(0.0, 4.0)], {"format": 1.0, "iou": 0.0})


def test_of_many_visits_some_are_listed_and_always_the_one_that_is_shown():
    found = view(sample_row(step=500), [Visit(0, step, "a", 0.5) for step in range(1, 1001)])
    steps = [step for step, _ in found["visits"]]
    assert len(steps) <= 13 and steps[0] == 1 and steps[-1] > 900 and 500 in steps


def test_rows_of_older_runs_and_numbers_that_are_none():
    row = {
        "step": 1,
        "id": "a",
        "task": "tvg",
        "completions": ["x"],
        "rewards": [math.nan],
        "parts": [{"iou": math.inf}],
    }
    found = view(row, [Visit(0, 1, "a", math.nan)])
    assert found["mean"] is found["std"] is found["change"] is found["duration"] is None and found["truth"] == []
    assert found["completions"][0] | {"pieces": []} == {
        "pieces": [], "reward": None, "advantage": None, "parts": {"iou": None}, "segments": [], "choice": None
    }  # fmt: skip


def test_a_long_completion_is_cut_and_says_so():
    found = view(sample_row(completions=["x" * 1_000_000 + "<answer>5 to 15</answer>", ""]), [Visit(0, 1, "a", 0.75)])
    (_, text), (kind, answer) = found["completions"][0]["pieces"]
    assert len(text) < 11_000 and "990,001 characters left out" in text
    assert (kind, answer) == ("answer", "<answer>5 to 15</answer>")
    assert found["completions"][0]["segments"] == [(5.0, 15.0)]
    assert cut("abc", 3) == "abc"


def test_frames_are_those_of_the_middle_of_each_eighth(tmp_path):
    """A clip of 18 s in a file: after a second of white, 16 s of one grey each 2 s, then white again."""
    greys = [255] * 10 + [20 + 25 * (i // 20) for i in range(160)] + [255] * 10
    path = write_clip(tmp_path / "a.mp4", grey(greys), fps=10)
    frames = frames_of(str(path), 1.0, 16.0, None)
    assert [time for time, _ in frames] == pytest.approx([1, 3, 5, 7, 9, 11, 13, 15], abs=0.11)
    assert [brightness(image) for _, image in frames] == pytest.approx([20 + 25 * i for i in range(8)], abs=6)
    assert len(frames_of(str(path), 0.0, None, None)) == 8
    assert frames_of(str(tmp_path / "missing.mp4"), 0.0, 16.0, None) == []


def test_a_page_takes_as_many_texts_and_frames_as_it_has_room_for(tmp_path, monkeypatch):
    run = write_training(tmp_path, samples=[sample_row(step, "a", video="") for step in range(11, 31)])
    files, size = (
        {"run": run / "samples.jsonl"},
        len(htmlsafe_json_dumps(view(sample_row(11, video=""), [Visit(0, 1, "a", 0)]))),
    )
    monkeypatch.setattr(samples, "MAX_ROWS_TEXT", 5 * size)
    found = browse(files, 100, [], [])
    assert 2 <= len(found["samples"]) <= 5 and found["total"] == 20 and found["samples"][0]["step"] == 30
    monkeypatch.setattr(samples, "MAX_IMAGES", 250)
    monkeypatch.setattr(samples, "frames_of", lambda path, *_: [] if path == "bad" else [(1.0, "x" * 100)])
    views = [
        {"video": path, "start": 0.0, "duration": 1.0, "fps": None} for path in ("a", "bad", "a", "b", "c", "d", "a")
    ]
    assert len(samples.frames_for(views)) == 3
    assert [one["frames"] for one in views] == [0, -1, 0, 1, 2, -1, 0]


# ---- evaluation ------------------------------------------------------------------------------------------------------

BEFORE = [prediction(f"q{i}", 5 + i) for i in range(8)]  # IoU 1, 9/11, 8/12, ...
AFTER = [prediction(f"q{i}", 5 + i // 2) for i in range(8)]


def evaluations(tmp_path, *results) -> list[Evaluation]:
    paths = [write_evaluation(tmp_path / f"eval_{i}", rows) for i, rows in enumerate(results)]
    return [read_run(path, path.name) for path in paths]


def test_the_table_has_the_stored_intervals_and_the_paired_difference(tmp_path):
    a, b = evaluations(tmp_path, BEFORE, AFTER)
    table = task_table("tvg", [a, b])
    name, cells, (gain,) = table["rows"][0]
    stored = b.content["tasks"]["tvg"]
    assert (name, table["n"]) == ("miou", 8) and cells[1] == [stored["miou"], *stored["miou_ci95"]]
    ious = [
        [100 * (10 - shift) / (10 + shift) for shift in shifts] for shifts in (range(8), [i // 2 for i in range(8)])
    ]
    assert cells[0][0] == pytest.approx(np.mean(ious[0])) and gain[0] == pytest.approx(
        np.mean(ious[1]) - np.mean(ious[0])
    )
    clusters = [f"q{i}.mp4 None" for i in range(8)]
    assert gain == pytest.approx(paired_interval(*ious, clusters=clusters))
    assert table["ends"][0] <= min(cell[1] for cell in cells) and max(cell[2] for cell in cells) <= table["ends"][1]


def test_the_floor_is_a_row_and_r1_a_column(tmp_path):
    """IoUs are 10/10, 9/11, 8/12 and less, where the third is no longer close. The floor of one result is shown once.
    Multiple choice has no such column."""
    choices = [prediction(f"m{i}", 5, task="mcqa", answer="B", pred_choice="B", response=None) for i in range(2)]
    folders = [write_evaluation(tmp_path / name, rows + choices) for name, rows in (("a", BEFORE), ("b", AFTER))]
    content = json.loads((folders[0] / "metrics.json").read_text())
    constant = {"data": "tiny_world/mix_train.yaml", "span": [0.15, 0.85]}
    floor = {"n": 8, "miou": 36.9, "miou_ci95": [33.0, 41.0], "r1@0.7": 4.5, "r1@0.7_ci95": [2.0, 7.0]}
    (folders[0] / "metrics.json").write_text(json.dumps(content | {"floor": {"tvg": floor | {"constant": constant}}}))
    a, b = (read_run(folder, folder.name) for folder in folders)
    table = task_table("tvg", [a, b])
    assert [cell[0] for cell in table["close"]] == [25.0, 50.0]  # 10/10, 9/11; 10/10, 10/10, 9/11, 9/11
    assert table["floor"]["main"] == [36.9, 33.0, 41.0] and table["floor"]["close"] == [4.5, 2.0, 7.0]
    assert table["ends"][0] <= 33
    assert task_table("mcqa", [a, b])["close"] is None and task_table("mcqa", [a, b])["floor"] is None
    page = written(*folders)
    assert page.text.count("R1@0.7") == 1 and page.text.count("The best constant answer is") == 1
    titles = [attributes.get("title") for _, attributes in page.elements]
    assert "15% to 85% of the clip: the best on tiny_world/mix_train.yaml" in titles
    for row in page.rows("results"):
        assert len(row) == len(page.rows("results")[0]), row
    assert [row[0] for row in page.rows("results") if row[1].startswith("36.9")] == ["best constant answer"]


def test_answers_with_another_clip_are_a_row_of_their_model(tmp_path):
    """The second result was asked with other clips too. Its row is drawn on the same axis, and names it."""
    folders = [write_evaluation(tmp_path / name, rows) for name, rows in (("a", BEFORE), ("b", AFTER))]
    content = json.loads((folders[1] / "metrics.json").read_text())
    values = {"n": 8, "miou": 12.5, "miou_ci95": [9.0, 16.0], "r1@0.7": 3.5, "r1@0.7_ci95": [1.0, 6.0]}
    blind = {"predictions": "predictions_blind.jsonl", "tasks": {"tvg": values}}
    (folders[1] / "metrics.json").write_text(json.dumps(content | {"blind": blind}))
    a, b = (report.read_run(folder, folder.name) for folder in folders)
    table = task_table("tvg", [a, b])
    assert table["blind"] == [{"name": "b", "main": [12.5, 9.0, 16.0], "close": [3.5, 1.0, 6.0]}]
    assert table["ends"][0] <= 9 and task_table("tvg", [a])["blind"] == []
    page = written(*folders)
    assert page.text.count("With another clip: ") == 1
    for row in page.rows("results"):
        assert len(row) == len(page.rows("results")[0]), row
    assert [row[:2] for row in page.rows("results")][-1] == ["b with another clip", "12.5 [9.0, 16.0]"]
    alone = written(folders[1])
    assert [row[0] for row in alone.rows("results")][-1] == "with another clip"
    assert "With another clip" not in written(folders[0]).text


def test_the_scatter_counts_what_got_better(tmp_path):
    a, b = evaluations(tmp_path, BEFORE, AFTER)
    plot = scatter("tvg", a, b)
    assert plot["signs"] == {1: 7, 0: 1} and plot["num"] == len(plot["dots"]) == 8
    assert plot["dots"][2] == ("q2", pytest.approx(100 * 8 / 12), pytest.approx(100 * 9 / 11))


def test_results_on_other_questions_stand_apart(tmp_path):
    other = [row | {"id": f"{row['id']}_ood"} for row in BEFORE]
    first, ood, second = evaluations(tmp_path, BEFORE, other, AFTER)
    sets = by_questions([first, ood, second])
    assert [[name for name, _ in one["runs"]] for one in sets] == [["eval_0", "eval_2"], ["eval_1"]]
    assert not sets[0]["differing"] and not sets[1]["scatters"]


def test_results_that_were_not_made_alike_are_said_to_be(tmp_path):
    paths = (
        write_evaluation(tmp_path / "a", BEFORE, dtype="float32"),
        write_evaluation(tmp_path / "b", AFTER, dtype="bfloat16"),
    )
    page = written(*paths)
    assert "they differ in dtype." in page.text and f"{read_result(str(paths[0])).spec['model']}" == "m"


# ---- the page --------------------------------------------------------------------------------------------------------


def training(folder, num_steps: int = 3, **more):
    rows = [metrics_row(step, num_steps) for step in range(1, num_steps + 1)]
    return write_training(folder, rows, [sample_row(step, f"id{step % 2}") for step in range(1, num_steps + 1)], **more)


def test_one_page_of_two_trainings_and_two_results(tmp_path):
    a, b = training(tmp_path / "a"), training(tmp_path / "b", 9)
    results = [write_evaluation(tmp_path / f"eval_{i}", rows) for i, rows in enumerate((BEFORE, AFTER))]
    page = written(a, b, *results)
    assert {tag for tag, _ in page.elements} >= {"table", "path", "circle"}
    assert page.data["runs"] == ["a", "b"] and {one["run"] for one in page.data["samples"]} == {0, 1}
    for text in (
        "finished, 3 of 3 steps",
        "0123456789ab",
        "cpu, 1 threads",
        "rollout.group_size",
        "0.0005",
    ):
        assert text in page.text
    assert "12 of 12 sampled groups" in page.text and "0 with frames of their videos" in page.text
    assert "Better 7, equal 1, worse 0" in page.text and "temporal grounding: miou, n = 8" in page.text


def test_the_page_needs_nothing_else_and_lets_only_its_own_script_run(tmp_path):
    page = written(training(tmp_path / "a"), write_evaluation(tmp_path / "b", BEFORE))
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    style, script = csp_hash(page.raw["style", None]), csp_hash(page.raw["script", None])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["style-src"] == style and rules["script-src"] == script
    for _, attributes in page.elements:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,")) and "src" not in attributes


def test_what_data_and_models_wrote_is_text(tmp_path):
    """Every hostile text in every place that is not ours; the page has the elements that it has without them."""
    pages = []
    for folder, texts in (("harmless", ["x"] * len(HOSTILE)), ("hostile", HOSTILE)):
        rows = []
        for i, text in enumerate(texts):
            row = sample_row(
                1, f"{i}{text}", question=text, options=[text, "b"], answer="A", task="gqa", video=f"/a/{text}"
            )
            rows.append(row | {"completions": [text, f"<answer>{text}</answer>"], "parts": [{text: 1.0}] * 2})
        config = CONFIG | {"model": {"path": "".join(texts)}, "my": {"".join(texts): "".join(texts)}}
        metrics = [metrics_row(step, 3, **{f"reward/{text}": step for text in texts[::3]}) for step in (1, 2, 3)]
        run = write_training(tmp_path / folder / f"run {texts[1]}", metrics, rows, config)
        answers = [
            row | {"id": f"{row['id']} {texts[i]}", "type": texts[i].replace("/", "")} for i, row in enumerate(BEFORE)
        ]
        results = [write_evaluation(tmp_path / folder / name, answers, model=texts[0]) for name in ("b", "c")]
        pages.append(written(run, *results))
    hostile = pages[1]
    tags = [[tag for tag, _ in page.elements if tag not in ("figure", "svg")] for page in pages]
    assert set(tags[0]) == set(tags[1]) and tags[1].count("script") == 2
    assert not any(
        name.startswith("on") or "javascript:" in str(a.get("href")) for _, a in hostile.elements for name in a
    )
    assert {one["question"] for one in hostile.data["samples"]} == set(HOSTILE)
    assert {one["video"] for one in hostile.data["samples"]} == {text.rpartition("/")[2] for text in HOSTILE}
    assert HOSTILE[0] in hostile.text and "{{ 7 * 7 }}" in hostile.text


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun(tmp_path, num_steps):
    run = training(tmp_path / "a", num_steps, finished=False)
    if not num_steps:
        (run / "metrics.jsonl").unlink()
        (run / "samples.jsonl").unlink()
    page = written(run)
    assert f"not finished, {num_steps} of 3 steps" in page.text and len(page.data["samples"]) == num_steps
    assert ("Curves" in page.text) == (num_steps > 0)


def test_numbers_that_are_none_are_counted_and_left_out(tmp_path):
    rows = [metrics_row(step, 6, kl=[math.nan, 1.0, 2.0, math.inf, -math.inf, 3.0][step - 1]) for step in range(1, 7)]
    rows += [metrics_row(7, 6, **{name: math.nan for name in rows[0] if name != "step"})]
    page = written(write_training(tmp_path / "a", rows, [sample_row(rewards=[math.nan, 1.0])]))
    assert "to 3 (step 6), 4 not finite" in page.text and page.data["samples"][0]["mean"] is None
    for _, attributes in page.elements:
        assert "nan" not in str(attributes.get("d")) and "inf" not in str(attributes.get("d"))


def test_a_live_run_is_read_only_and_a_torn_line_is_left_out(tmp_path):
    run = training(tmp_path / "a", finished=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 4, "re')
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
    page = written(run)
    assert "not finished, 3 of 3 steps" in page.text and len(page.data["samples"]) == 3
    (run / "report.html").unlink()
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == before


def test_watching_ends_with_the_run(tmp_path, monkeypatch):
    run, pauses = training(tmp_path / "a", 2, finished=False), []

    def sleep(seconds):
        pauses.append(seconds)
        training(run, len(pauses) + 2, finished=len(pauses) == 2)

    monkeypatch.setattr(report.time, "sleep", sleep)
    page = written(run, "--watch", 7, "--out", tmp_path / "out.html")
    assert len(pauses) == 2 and min(pauses) >= 7 and "finished, 4 of 3 steps" in page.text


def test_the_command_line_chooses_groups(tmp_path):
    run = training(tmp_path / "a", 9)
    assert {one["step"] for one in written(run, "--step", 2, 5).data["samples"]} == {2, 5}
    page = written(run, "--samples", 2, "--id", "id1")
    assert [(one["step"], one["id"]) for one in page.data["samples"]] == [(9, "id1"), (7, "id1")]
    assert "2 of 9 sampled groups" in page.text


def test_what_is_no_run_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = write_evaluation(tmp_path / "broken", BEFORE)
    (broken / "metrics.json").write_text("{")
    for path, message in ((tmp_path / "empty", "neither a training nor a finished"), (broken, "not a metrics.json")):
        with pytest.raises(SystemExit, match=message) as error:
            report.main([str(path)])
        assert str(path) in str(error.value) and "\n" not in str(error.value)
