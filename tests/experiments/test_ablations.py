"""The ablations: one knob per file, shared arms run once, what an arm takes from others, intervals, the whole of it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, metrics_of
from matplotlib.figure import Figure
from run_folders import write_evaluation

import config
from config import flat
from experiments import ablations, arms, jobs, seeds
from experiments.ablations import QUESTIONS, Question, Row
from experiments.arms import ARMS
from metrics import intervals
from records.files import read_samples
from reward_functions import load_functions
from rewards import score

FILES = sorted(path.name for path in (REPO / "configs/ablations").glob("*.yaml"))
LENGTH = {"run.steps", "run.save_every", "eval.every"}
MODE = {"prompt.think", "prompt.system_think", "prompt.tvg", "prompt.mcqa", "prompt.gqa"}
FUNCTION = "rewards.functions.configs/ablations/threshold_iou.py:threshold_iou"
WHOLE_KNOBS = {  # knobs of several keys, none of which can be turned without the others; all other files have one key
    "grpo.yaml": LENGTH | {"optim.schedule"},  # a default arm: how long, and without a choice of step
    "sft.yaml": LENGTH | {"optim.schedule", "optim.lr"},
    "both.yaml": LENGTH,
    "select.yaml": {"data.train", "select.budget"},  # the default of the choices of data
    "group_2.yaml": {"data.batch_size", "rollout.group_size"},  # at equal completions
    "group_4.yaml": {"data.batch_size", "rollout.group_size"},
    "group_16.yaml": {"data.batch_size", "rollout.group_size"},
    "threshold.yaml": {"rewards.tvg.iou", FUNCTION},  # one in the place of the other
    "think.yaml": MODE | {"rollout.max_new_tokens"},  # the mode, its cue and the room it takes
    "answer_think.yaml": MODE | {"eval.max_new_tokens"},
}


def effective(files: list[str]) -> dict:
    kind = jobs.PROGRAMS[ablations.STARTS[Path(files[0]).name]]
    return flat(dataclasses.asdict(config.load(kind, [str(REPO / file) for file in files])))


# Configurations and arms.


@pytest.mark.parametrize("name", FILES)
def test_a_file_turns_one_knob_of_its_parent(name):
    path = REPO / "configs/ablations" / name
    assert path.read_text().startswith("# parent: ")
    files = ablations.chain(path)
    ours, parents = effective(files), effective(files[:-1])
    changed = {key for key in ours.keys() | parents.keys() if ours.get(key) != parents.get(key)}
    assert changed == WHOLE_KNOBS.get(name, changed)
    assert len(changed) == 1 or name in WHOLE_KNOBS


def test_a_chain_goes_up_to_a_configuration_of_its_own():
    files = ablations.chain(REPO / "configs/ablations/gqa_format.yaml")
    assert [Path(file).name for file in files] == [
        "tiny.yaml",
        "grpo.yaml",
        "gqa.yaml",
        "gqa_answer.yaml",
        "gqa_format.yaml",
    ]
    weights = config.load(config.GrpoConfig, [str(REPO / file) for file in files]).rewards.gqa
    assert (weights.format, weights.answer, weights.iou) == (0.2, 0.0, 0.0)


def test_every_file_is_used_and_every_arm_has_one():
    ends = [*(arm.config for arm in ARMS.values()), *ablations.ANSWERS.values()]
    used = {file for end in ends for file in ablations.chain(ablations.CONFIGS / end)}
    assert {f"configs/ablations/{name}" for name in FILES} <= used


def test_group_sizes_sample_equally_many_completions():
    for name in ("grpo", "group_2", "group_4", "group_16"):
        cfg = effective(ablations.chain(REPO / f"configs/ablations/{name}.yaml"))
        assert cfg["data.batch_size"] * cfg["rollout.group_size"] == 128


def test_the_two_modes_are_asked_for_alike_in_training_and_answering():
    train, test = (effective(ablations.chain(REPO / f"configs/ablations/{f}.yaml")) for f in ("think", "answer_think"))
    assert {key: train[key] for key in MODE} == {key: test[key] for key in MODE}
    assert train["rollout.max_new_tokens"] == test["eval.max_new_tokens"]
    assert train["prompt.tvg"] == arms.THINK + "{question}"


def test_rows_name_arms_and_rows_that_there_are():
    for question in QUESTIONS.values():
        assert set(question.columns) <= ablations.COLUMNS.keys()
        for row in question.rows.values():
            assert row.arm in ARMS and row.answer in ARMS[row.arm].answers
            assert set(row.against) <= question.rows.keys()


def test_arms_that_questions_share_run_once(tmp_path):
    found = ablations.jobs_of(["data", "sft", "group"], [0, 1], tmp_path)
    names, programs = [job.name for job in found], {job.name: job.program for job in found}
    assert programs["base/seed_0/run"] == "train_sft.py" and programs["base/seed_0/test"] == "eval.py run"
    assert len(set(names)) == len(names)
    assert names.count("grpo/seed_0/run") == names.count("base/seed_1/run") == names.count("grpo/seed_1/ood") == 1
    assert not [name for name in names if name.startswith("gqa")]
    for i, job in enumerate(found):
        assert set(job.needs) <= set(names[:i])
    assert "selected/seed_0/run" in next(job for job in found if job.name == "selected_tokens/seed_0/run").needs


def test_words_of_an_arm(tmp_path):
    words = ablations.words_of_run(tmp_path, "group_2", 1, None)
    files = ["configs/tiny.yaml", "configs/ablations/grpo.yaml", "configs/ablations/group_2.yaml"]
    model = f"model.path={tmp_path}/base/seed_1/run/final"
    assert words == [*files, "run.seed=1", "run.tracker=none", model]
    words = ablations.words_of_test(tmp_path, "think", 0, "ood", "think", tmp_path / "w")
    assert words[:2] == ["configs/tiny_eval.yaml", "configs/ablations/answer_think.yaml"]
    assert f"data.test={tmp_path}/w/tvg_ood_test.yaml" == [word for word in words if "data.test" in word][-1]
    assert f"data.cache_dir={tmp_path}/w/cache" in words


# What an arm takes from the results of others.


def test_equal_tokens_count_the_selection(tmp_path):
    for arm, steps in {"grpo": [100, 100, 100, 100], "selected": [90, 110, 90, 90]}.items():
        path = arms.folder(tmp_path, arm, 0) / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"tokens/completion": num}) + "\n" for num in steps))
    summary = arms.folder(tmp_path, "select", 0) / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"responses": {"sampled_tokens": 110}}))
    assert arms.same_tokens(tmp_path, 0)[-1] == "run.steps=3"  # 290 of the 290 that are left
    summary.write_text(json.dumps({"responses": {"sampled_tokens": 111}}))
    assert arms.same_tokens(tmp_path, 0)[-1] == "run.steps=2"


def test_the_rejected_are_those_that_were_not_kept(world, tmp_path):
    select = arms.folder(tmp_path, "select", 0)
    select.mkdir(parents=True)
    (select / "config.yaml").write_text(f"data: {{train: {world}/tvg_train.yaml}}\n")
    samples = read_samples(f"{world}/tvg_train.yaml")
    (select / "rejected.jsonl").write_text("".join(json.dumps({"id": sample.id}) + "\n" for sample in samples[1:3]))
    (override,) = arms.rejected(tmp_path, 0)
    assert read_samples(override.removeprefix("data.train=")) == [
        dataclasses.replace(sample, video=str(Path(sample.video).resolve())) for sample in samples[1:3]
    ]


def test_records_of_both_modes_earn_the_format_of_their_mode(world, tmp_path):
    base = arms.folder(tmp_path, "base", 0)
    base.mkdir(parents=True)
    (base / "config.yaml").write_text(f"data: {{train: {world}/base_train.yaml}}\n")
    (override,) = arms.both_modes(tmp_path, 0)
    samples = read_samples(override.removeprefix("data.train="))
    plain, thinking = samples[::2], samples[1::2]
    assert [sample.id for sample in plain] == [s.id for s in read_samples(f"{world}/base_train.yaml")]
    cfg = SimpleNamespace(prompt=config.PromptConfig(think=True), rewards=config.RewardsConfig())
    for sample, other in zip(plain, thinking, strict=True):
        assert sample.response is None and other.question == f"Think first. {sample.question}"
        assert score(other.response, other, cfg).total == pytest.approx(1.0)
    texts = {sample.task: sample.response.partition("<answer>")[0] for sample in thinking[::-1]}
    start, end = thinking[0].segments[0]
    assert texts["tvg"] == f"<think>{plain[0].question[12:-9]} at {(start + end) // 2:.0f}</think>"
    assert texts["mcqa"] == f"<think>{thinking[1].options['ABCD'.index(thinking[1].answer)]}</think>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>2 to 6</answer>", 1.0),
        ("<answer>4 to 8</answer>", 0.0),  # 2 s of 6 s
        ("<answer>2 to 4</answer>", 1.0),  # one half
        ("<answer>2 to 99</answer>", 0.0),
        ("so <answer>2 to 6</answer>", 0.0),
        ("2 to 6", 0.0),
    ],
)
def test_threshold_iou(text, value):
    path = str(REPO / "configs/ablations/threshold_iou.py:threshold_iou")
    (function,) = load_functions({path: 1.0})
    assert function.call(completions=[text], segments=[((2.0, 6.0),)], duration=[20.0], task=["tvg"]) == [value]
    assert function.call(completions=[text], segments=[None], duration=[None]) == [None]


# Results.


def test_an_interval_over_seeds_and_questions():
    assert intervals.crossed_interval(np.full((3, 50), 7.0)) == pytest.approx((7.0, 7.0, 7.0))
    by_seed = np.repeat([[0.0], [10.0]], 40, axis=1)  # resamples of two seeds: 0, 5 or 10
    assert intervals.crossed_interval(by_seed) == pytest.approx((5.0, 0.0, 10.0))
    rng = np.random.default_rng(0)
    by_question = np.repeat(rng.permutation([0.0, 100.0] * 200)[None], 3, axis=0)
    mean, low, high = intervals.crossed_interval(by_question)  # the same questions for all seeds: 1.96 x 50 / sqrt(400)
    assert mean == 50.0 and high - low == pytest.approx(9.8, rel=0.1)
    both = by_question + 20 * np.array([[-1.0], [0.0], [1.0]])
    assert intervals.crossed_interval(both)[2] - intervals.crossed_interval(both)[1] > 1.5 * (high - low)


def test_differences_are_paired_by_seed_and_question():
    ours = {0: {"x": {"a": 3.0, "b": 5.0}}, 1: {"x": {"b": 7.0, "a": 1.0}}, 2: {"x": {"a": 0.0, "b": 0.0}}}
    theirs = {0: {"x": {"b": 4.0, "a": 2.0}}, 1: {"x": {"a": 0.0, "b": 6.0}}}
    found = seeds.differences(ours, theirs)["x"]  # 1 everywhere, of the seeds that both have
    assert (found["mean"], found["ci95"], found["seeds"]) == (1.0, [1.0, 1.0], {"0": 1.0, "1": 1.0})
    assert seeds.differences(ours, {}) == {}
    with pytest.raises(ValueError, match="different questions"):
        seeds.statistics({0: {"x": {"a": 1.0}}, 1: {"x": {"b": 1.0}}})
    with pytest.raises(ValueError, match="different questions"):
        seeds.differences({0: {"x": {"a": 1.0}}}, {0: {"x": {"b": 1.0}}})


def write_test(root: Path, arm: str, seed: int, right: int) -> None:
    """Tests of an arm, in which the first `right` of four spans are right."""
    for test in ablations.TESTS:
        spans = ["2 to 6" if i < right else "10 to 12" for i in range(4)]
        rows = [
            {
                "id": f"{test}/{i}",
                "task": "tvg",
                "response": f"<answer>{s}</answer>",
                "segments": [[2, 6]],
                "duration": 20,
            }
            for i, s in enumerate(spans)
        ]
        rows += [{"id": "m", "task": "mcqa", "response": "<answer>A</answer>", "options": ["x", "y"], "answer": "A"}]
        rows += [
            rows[0]
            | {"id": "g", "task": "gqa", "response": "<answer>A, 2 to 6</answer>", "options": ["x", "y"], "answer": "A"}
        ]
        write_evaluation(arms.folder(root, arm, seed, test), rows)
    run = arms.folder(root, arm, seed)
    run.mkdir()
    for name in ("run", *ablations.TESTS):
        run.with_name(f"{name}.log").touch()
    step = {"reward/total": right / 4, "tokens/completion": 500, "length/mean": 7.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for _ in range(2)))


def test_tables_and_figures_of_what_there_is(tmp_path):
    """Means, differences of the seeds that both rows have; a row without results is left out."""
    for arm, seed, right in (("grpo", 0, 2), ("grpo", 1, 3), ("group_2", 0, 3)):
        write_test(tmp_path, arm, seed, right)
    rows = {"G = 8": Row("grpo"), "G = 2": Row("group_2", ("G = 8",)), "G = 4": Row("group_4", ("G = 8",))}
    rows["plain words"] = Row("grpo", ("G = 2",), column="tvg/parse_fail")
    question = Question("Title", ("tvg/miou", "mcqa/accuracy"), rows)
    entry = ablations.summarise(question, tmp_path, [0, 1])
    assert list(entry["rows"]) == ["G = 8", "G = 2", "plain words"]
    cell = entry["rows"]["G = 8"]["values"]["tvg/miou"]
    assert (cell["mean"], cell["seeds"]) == (62.5, {"0": 50.0, "1": 75.0})
    minus = entry["rows"]["G = 2"]["minus"]["G = 8"]["tvg/miou"]
    assert (minus["mean"], minus["seeds"]) == (25.0, {"0": 25.0})
    results = {"seeds": [0, 1], "quick": False, "questions": {"group": entry}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    results = ablations.load_results(tmp_path)
    text = "\n".join(ablations.lines_of(results["questions"]["group"]))
    assert "| G = 8 | 62.5 ± 17.7 | 100.0 ± 0.0 |" in text and "| (G = 2) - (G = 8) | +25.0 [" in text
    assert "* G = 8: 2 steps, 1k tokens sampled, reward 0.625 and 7.5 tokens an answer" in text
    figure = ablations.draw("group", results)
    assert [len(ax.get_yticks()) for ax in figure.axes] == [3, 3] and "seeds 0, 1" in figure.get_suptitle()
    ax = Figure().subplots()
    ablations.plot("group", results, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["G = 8", "G = 2", "plain words"]
    (ax,) = ablations.draw_differences(results).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "G = 2 minus G = 8",
        "plain words minus G = 2 (tvg/parse_fail)",
    ]
    texts = [text.get_text() for text in ax.texts]
    assert texts[0].startswith("+25.0 [") and texts[1].startswith("+0.0 [")


def test_a_figure_of_no_difference_is_empty():
    question = {"title": "Title", "columns": ["x"], "rows": {"a": {"column": "", "minus": {}}}}
    assert ablations.draw_differences({"seeds": [0], "quick": False, "questions": {"group": question}}).axes == []


def test_a_failed_run_is_reported_and_the_rest_is_shown(tmp_path, monkeypatch, capsys):
    write_test(tmp_path, "grpo", 0, 2)
    monkeypatch.setattr(ablations.tiny, "main", lambda argv: None)
    monkeypatch.setattr(ablations, "run_all", lambda jobs, root, parallel: {"group_2/seed_0/run": "exit code 1; boom"})
    with pytest.raises(SystemExit, match=r"FAILED group_2/seed_0/run: exit code 1; boom\n\n(\d+) of \1 runs are not"):
        ablations.main(["--dir", str(tmp_path), "--questions", "group", "--seeds", "0"])
    assert "| G = 8, no KL | 50.0 |" in capsys.readouterr().out
    assert list(ablations.load_results(tmp_path)["questions"]["group"]["rows"]) == ["G = 8, no KL"]


@pytest.mark.slow
def test_quick_goes_from_end_to_end_and_not_twice(tmp_path):
    """Also: what stands finished is not run again."""
    command = [sys.executable, "-m", "experiments.ablations", "--quick", "--dir", str(tmp_path / "quick")]
    first = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "say nothing" in first.stdout
    results = ablations.load_results(tmp_path / "quick")
    for name, question in QUESTIONS.items():
        assert list(results["questions"][name]["rows"]) == list(question.rows)
        assert (tmp_path / "quick" / f"{name}.png").is_file()
    assert (tmp_path / "quick" / "differences.png").is_file()
    shorter, longer = (metrics_of(arms.folder(tmp_path / "quick", arm, 0)) for arm in ("selected_tokens", "selected"))
    assert shorter == longer[: len(shorter)], "the first steps of the same training"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "quick").rglob("config.yaml")}
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert again.returncode == 0 and f"0 of {len(before)} runs to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "quick").rglob("config.yaml")} == before
