"""Reports in a headless browser: what a reader sees and does, and what does not run. Needs Chromium or Chrome."""

import os
import shutil

import pytest
from run_folders import CONFIG, HOSTILE, metrics_row, prediction, sample_row, write_evaluation, write_training

import report

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements/dev.txt)")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        path = next(filter(None, map(shutil.which, NAMES)), engine.chromium.executable_path)
        if not os.path.exists(path):
            pytest.skip(f"no browser: none of {', '.join(NAMES)}, nor that of `playwright install chromium`")
        browser = engine.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a report; in the end nothing may have been said, asked for or opened that a page of text would not."""
    contexts, said = [], []

    def opened(path, hash: str = "", **options):
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(path.as_uri() + hash)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def written(*folders):
    report.main([str(folder) for folder in folders])
    return folders[0] / "report.html"


TRUTH = [[2.0, 5.0], [12.5, 20.0]]
SAMPLES = [  # step, id, task, rewards: of means 0.75, 0.25, 0.5, 0.9 and spreads 0.25, 0.25, 0.5, 0
    sample_row(1, "a/1", rewards=[1.0, 0.5]),
    sample_row(2, "b&=#?/2", rewards=[0.5, 0.0], question="The other one?", segments=TRUTH),
    sample_row(
        3, "a/1", rewards=[0.0, 1.0], completions=["<answer>3 to 6 and 8 to 30</answer>", "<answer>no</answer>"]
    ),
    sample_row(3, "c", rewards=[0.9, 0.9], task="mcqa", segments=None, duration=None, options=["x", "y"], answer="B")
    | {"completions": ["<think>why</think><answer>B</answer>", "<think>so</think> <answer>A</answer>"]},
]


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    rows = [metrics_row(step, 5) for step in range(1, 6)]
    return written(write_training(tmp_path_factory.mktemp("simple") / "run", rows, SAMPLES))


def listed(page) -> list[str]:
    return page.eval_on_selector_all(
        "#list a", "all => all.map(a => a.querySelector('bdi').textContent + ' ' + a.hash.match(/step=(\\d+)/)[1])"
    )


def test_sorting_and_filtering(simple, visit):
    page = visit(simple)
    assert listed(page) == ["a/1 3", "c 3", "b&=#?/2 2", "a/1 1"] and page.inner_text("#count") == "4 of 4"
    orders = {
        "reward, high first": ["c 3", "a/1 1", "a/1 3", "b&=#?/2 2"],
        "reward, low first": ["b&=#?/2 2", "a/1 3", "a/1 1", "c 3"],
        "spread of rewards": ["a/1 3", "b&=#?/2 2", "a/1 1", "c 3"],
        "change, down first": ["a/1 3", "c 3", "b&=#?/2 2", "a/1 1"],  # the only one that was seen before
    }
    for order, expected in orders.items():
        page.select_option("#sort", order)
        assert listed(page) == expected, order
    page.select_option("#sort", "newest first")
    page.select_option("#task", "mcqa")
    assert listed(page) == ["c 3"] and page.inner_text("#count") == "1 of 4"
    page.select_option("#task", "")
    page.fill("#search", "OTHER ONE")
    assert listed(page) == ["b&=#?/2 2"]
    assert not page.is_visible("#run")


def test_the_bars_are_where_the_segments_are(simple, visit):
    """Of 20 s: truths 2 to 5 and 12.5 to 20, and predictions, one of which goes on past the end of the clip."""
    page = visit(simple, "#sample=b%26%3D%23%3F%2F2")
    bars = "lane => [...lane.querySelectorAll('b')].map(bar => [bar.style.left, bar.style.width])"
    assert page.eval_on_selector(".lane.truth", bars) == [["10%", "15%"], ["62.5%", "37.5%"]]
    assert page.eval_on_selector(".lane.truth ~ .lane", bars) == [["25%", "50%"]]
    page.click("#list a:first-child")
    assert page.inner_text("#detail h3 bdi") == "a/1"
    lanes = page.query_selector_all(".lane:not(.truth)")
    assert [lane.evaluate(bars) for lane in lanes] == [[], [["15%", "15%"], ["40%", "110%"]]]  # by reward
    whole, bar = lanes[1].bounding_box(), lanes[1].query_selector("b").bounding_box()
    assert bar["x"] - whole["x"] == pytest.approx(0.15 * whole["width"], abs=0.5)
    assert bar["width"] == pytest.approx(0.15 * whole["width"], abs=0.5)
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_choice_and_its_votes(simple, visit):
    page = visit(simple, "#sample=c&step=3")
    assert page.eval_on_selector_all(".options li", "all => all.map(li => li.innerText.split(/\\s+/).join(' '))") == [
        "A x 1 of 2", "B y ✓ 1 of 2"
    ]  # fmt: skip
    kinds = page.eval_on_selector_all(
        ".completion:first-of-type pre span", "all => all.map(e => [e.className, e.textContent])"
    )
    assert kinds == [["think", "<think>why</think>"], ["answer", "<answer>B</answer>"]]
    assert "read as B" in page.inner_text(".completion:first-of-type") and page.query_selector(".stage") is None


def test_links_to_a_sample(simple, visit):
    page = visit(simple, "#sample=a%2F1&step=1")
    assert (
        "step 1" in page.inner_text("#detail h3")
        and page.get_attribute("#list a:last-child", "aria-current") is not None
    )
    page.click(".visit a")
    assert "step=3" in page.url and "step 3" in page.inner_text("#detail h3")
    page.go_back()
    assert "step 1" in page.inner_text("#detail h3")
    page.click("text=Previous")
    assert page.inner_text("#detail h3 bdi") == "b&=#?/2" and "b%26%3D%23%3F%2F2" in page.url
    page.evaluate("location.hash = '#sample=gone&step=1'")
    page.wait_for_function("document.querySelector('#detail').innerText.includes('No such sample')")
    page.click("nav.page >> text=Curves")
    assert page.url.endswith("#curves")


def test_a_report_opens_at_its_top_and_a_link_at_its_sample(tmp_path, visit):
    """Marking the newest sample in the list once scrolled the whole page down to it."""
    rows = [sample_row(step, f"id{step}") for step in range(1, 101)]
    path = written(write_training(tmp_path / "run", [metrics_row(step, 100) for step in range(1, 101)], rows))
    page = visit(path)
    assert page.get_attribute("#list a:first-child", "aria-current") is not None
    assert page.evaluate("document.documentElement.scrollHeight") > 2 * 900 and page.evaluate("scrollY") == 0
    page = visit(path, "#sample=id50")
    assert "id50" in page.inner_text("#detail h3")
    assert page.evaluate("document.querySelector('#samples').getBoundingClientRect().top") == pytest.approx(0, abs=1)
    box, entry = (page.locator(name).bounding_box() for name in ("#list", "#list [aria-current]"))
    assert box["y"] - 1 <= entry["y"] and entry["y"] + entry["height"] <= box["y"] + box["height"] + 1
    page.click("text=Previous")
    assert "id51" in page.inner_text("#detail h3")
    page.click("nav.page >> text=Curves")
    assert page.evaluate("document.querySelector('#curves').getBoundingClientRect().top") == pytest.approx(0, abs=1)


def test_curves_have_the_colours_of_the_page_and_say_their_values(simple, visit):
    light, dark = visit(simple), visit(simple, color_scheme="dark", viewport={"width": 390, "height": 844})
    strokes = []
    for page in (light, dark):
        plot = page.locator("figure", has_text="reward/iou").first
        assert plot.locator(".legend").inner_text().strip() == "last 1, from 0.04 (step 1) to 1 (step 5)"
        line = "svg => getComputedStyle(svg.querySelector('path[stroke=\"var(--c0)\"]')).stroke"
        strokes.append(plot.locator("svg").evaluate(line))
        labels = plot.locator("svg text")
        assert "step" in labels.all_text_contents()
        assert all(labels.nth(i).bounding_box()["height"] >= 9 for i in range(labels.count()))
    assert strokes[0] == "rgb(0, 114, 178)" and strokes[1] not in (strokes[0], "none")
    assert dark.locator("figure svg").first.bounding_box()["width"] > 300


def test_light_dark_and_a_phone(simple, visit):
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(simple), visit(simple, color_scheme="dark", viewport={"width": 390, "height": 844})
    colours = [page.evaluate(colour) for page in (light, dark)]
    assert colours[0] == "rgb(255, 255, 255)" and colours[1] != colours[0]
    for page in (light, dark):
        page.click("#theme")
    assert [page.evaluate(colour) for page in (light, dark)] == colours[::-1]
    assert dark.evaluate("document.documentElement.scrollWidth") == 390
    light.emulate_media(media="print")
    assert not light.is_visible("#list") and light.is_visible("#detail")


def test_nothing_that_data_or_a_model_wrote_runs(tmp_path, visit):
    rows = []
    for i, text in enumerate(HOSTILE):
        row = sample_row(1, f"{i}{text}", question=text, options=[text, "b"], answer="A", task="gqa", video=f"/{text}")
        rows.append(
            row
            | {
                "completions": [text, f"<think>{text}</think><answer>A, 5 to 15{text}</answer>"],
                "parts": [{text: 1.0}] * 2,
            }
        )
    config = CONFIG | {"model": {"path": "".join(HOSTILE)}, "my": {"".join(HOSTILE): "".join(HOSTILE)}}
    metrics = [metrics_row(step, 3, **{f"reward/{text}": step for text in HOSTILE}) for step in (1, 2, 3)]
    run = write_training(tmp_path / HOSTILE[1], metrics, rows, config)
    answers = [prediction(f"{i}{text}", 5.0 + i, type=text.replace("/", "")) for i, text in enumerate(HOSTILE)]
    results = [write_evaluation(tmp_path / name, answers, model=HOSTILE[0]) for name in ("b", "c")]
    page = visit(written(run, *results))
    seen = set()
    for _ in HOSTILE:
        seen.add(page.text_content(".question"))
        if page.is_enabled("text=Next"):
            page.click("text=Next")
    assert seen == set(HOSTILE) and page.evaluate("window.__pwned") is None
    isolated = "[...document.querySelectorAll('bdi, .data')].every(e => getComputedStyle(e).unicodeBidi === 'isolate')"
    assert page.evaluate(isolated)


def test_a_script_that_got_in_would_not_run(simple, browser):
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(simple.as_uri())
    script = "const s = document.createElement('script'); s.textContent = 'window.__pwned = 1'; document.body.append(s)"
    page.evaluate(script)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.__pwned=1>')")
    assert page.evaluate("window.__pwned") is None
    assert len(said) >= 2 and all("Content Security Policy" in text for text in said)
    page.close()


def test_a_long_run_makes_a_page_of_less_than_10_mb(tmp_path, visit):
    """100,000 steps, 50,000 groups of 8 completions, thoughts of 200 characters."""
    metrics = (metrics_row(step, 100_000) for step in range(1, 100_001))
    thought = "<think>" + "because " * 25 + "</think><answer>5 to 15</answer>"
    more = {"completions": [thought] * 8, "rewards": [0.1 * i for i in range(8)], "parts": [{"iou": 1.0}] * 8}
    rows = (sample_row(2 * i, f"id{i % 5000}", advantages=[0.0] * 8, **more) for i in range(1, 50_001))
    path = written(write_training(tmp_path / "long", metrics, rows))
    assert path.stat().st_size < 10e6
    page = visit(path)
    assert page.inner_text("#count") == "200 of 200" and "200 of 50,000 sampled groups" in page.inner_text("main")
