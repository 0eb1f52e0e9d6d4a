"""Reward functions in TRL's form: they run unchanged, add to the built-in reward, and fail as one error."""

import dataclasses
import re

import pytest
import yaml
from reward_samples import config, sample, thought

import rewards
from config import GrpoConfig, load
from records.record import Sample
from reward_functions import COLUMNS, RewardFunction, RewardFunctionError, load_functions, score_all

FUNCTIONS = '''
import asyncio

calls = []


def brief(completions, completion_ids, **kwargs):
    """Fewer tokens are better, one point each."""
    calls.append((completions, completion_ids, kwargs))
    return [10.0 - len(ids) for ids in completion_ids]


def polite(prompts, completions, **kwargs):
    """Conversational: every prompt and completion is a list of messages."""
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    return [1.0 if "please" in completion[0]["content"] else 0.0 for completion in completions]


def choices_only(completions, task, answer, **kwargs):
    """A batch of mixed tasks: None where there is nothing to say."""
    return [float(letter in text) if t == "mcqa" else None for text, t, letter in zip(completions, task, answer)]


def reference(completions, ground_truth, **kwargs):
    """A column of the data set; rows without it have None."""
    return [None if truth is None else truth in text for text, truth in zip(completions, ground_truth)]


def curriculum(completions, trainer_state, log_metric=None, **kwargs):
    share = trainer_state.global_step / trainer_state.max_steps
    if log_metric:
        log_metric("share", share)
    return [share] * len(completions)


loops = []


async def judged(completions, **kwargs):
    await asyncio.sleep(0)
    loops.append(asyncio.get_running_loop())
    return await asyncio.gather(*(asyncio.sleep(0, float(len(text))) for text in completions))
'''
BATCH = [
    sample("tvg", id="t", extra={"ground_truth": "dog"}),
    sample("mcqa", id="m", question="Which?", extra={"level": 3}),
    sample("gqa", id="g", type="causal"),
]
TEXTS = [thought("4 to 8"), thought("please B"), thought("B, 4 to 8")]
IDS = [[1, 2], [3], [4, 5, 6]]


@pytest.fixture
def trl(tmp_path):
    """A reward file under a folder and a name with dots, and the configuration that names functions of it."""
    path = tmp_path / "my.rewards" / "v1.2.py"
    path.parent.mkdir()
    path.write_text(FUNCTIONS)

    def cfg_of(*names: str, **more) -> GrpoConfig:
        weights = ", ".join(f"{path}:{name}: 0.5" for name in names)
        overrides = [f"rewards.{key}={str(value).lower()}" for key, value in more.items()]
        return load(GrpoConfig, [], [f"rewards.functions={{{weights}}}", "run.steps=40", *overrides])

    return path, cfg_of


def run_all(cfg: GrpoConfig, texts=TEXTS, batch=BATCH, ids=IDS, step=10) -> list[rewards.Reward]:
    return score_all(texts, batch, cfg, load_functions(cfg.rewards.functions), ids, step)


def test_without_functions_score_all_is_score():
    assert run_all(config()) == [rewards.score(text, row, config()) for text, row in zip(TEXTS, BATCH)]
    assert score_all([], [], config(), []) == []


def test_the_columns_are_the_fields_of_a_sample():
    assert {*COLUMNS, "extra"} == {field.name for field in dataclasses.fields(Sample)}


def test_a_function_adds_weight_times_value_and_is_called_once_for_the_batch(trl):
    _, cfg_of = trl
    functions = load_functions(cfg_of("brief").rewards.functions)
    assert functions == [RewardFunction("brief", functions[0].call, 0.5)]
    scored = score_all(TEXTS, BATCH, cfg_of("brief"), functions, IDS, step=10)
    for reward, text, row, value in zip(scored, TEXTS, BATCH, (8.0, 9.0, 7.0)):
        alone = rewards.score(text, row, config())
        assert reward == rewards.Reward(pytest.approx(alone.total + 0.5 * value), alone.parts | {"brief": value})
    ((completions, completion_ids, kwargs),) = functions[0].call.__globals__["calls"]
    assert (completions, completion_ids, kwargs["prompts"]) == (TEXTS, IDS, ["When?", "Which?", "When?"])
    assert (kwargs["trainer_state"].global_step, kwargs["trainer_state"].max_steps) == (10, 40)
    assert kwargs["id"] == ["t", "m", "g"] and kwargs["segments"] == [[(4.0, 8.0)]] * 3
    assert kwargs["ground_truth"] == ["dog", None, None] and kwargs["level"] == [None, 3, None]
    assert set(kwargs) == {*COLUMNS, "prompts", "trainer_state", "ground_truth", "level"}


def test_messages_none_columns_state_and_async(trl):
    _, cfg_of = trl
    polite = run_all(cfg_of("polite", conversational=True))
    assert [reward.parts["polite"] for reward in polite] == [0, 1, 0]
    mixed = run_all(cfg_of("choices_only"))
    assert [reward.parts.get("choices_only") for reward in mixed] == [None, 1, None]
    assert [mixed[i] for i in (0, 2)] == [rewards.score(TEXTS[i], BATCH[i], config()) for i in (0, 2)]
    assert [reward.parts.get("reference") for reward in run_all(cfg_of("reference"))] == [0, None, None]
    assert [reward.parts["curriculum"] for reward in run_all(cfg_of("curriculum"))] == [0.25] * 3
    both = run_all(cfg_of("judged", "brief"))
    assert [reward.parts["judged"] for reward in both] == [len(text) for text in TEXTS]
    assert [reward.parts["brief"] for reward in both] == [8, 9, 7]


def test_async_functions_keep_their_event_loop(trl):
    """As in TRL: a client that a function opened at one step is bound to that step's loop."""
    _, cfg_of = trl
    functions = load_functions(cfg_of("judged").rewards.functions)
    for step in range(2):
        score_all(TEXTS, BATCH, cfg_of("judged"), functions, IDS, step)
    first, second = functions[0].call.__globals__["loops"]
    assert first is second


def test_only_functions_count_when_the_built_in_weights_are_zero(trl):
    _, cfg_of = trl
    scored = run_all(cfg_of("brief", tvg="{format: 0, iou: 0}"))
    assert scored[0] == rewards.Reward(4.0, {"format": 1, "iou": 1, "brief": 8})


def test_functions_from_a_yaml_file(trl, tmp_path):
    path, _ = trl
    content = {"rewards": {"functions": {f"{path}:brief": 2, f"{path}:polite": -0.25}, "conversational": True}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    cfg = load(GrpoConfig, [str(tmp_path / "a.yaml")])
    loaded = load_functions(cfg.rewards.functions)
    assert [(function.name, function.weight) for function in loaded] == [("brief", 2.0), ("polite", -0.25)]
    assert run_all(cfg)[1].total == pytest.approx(0.5 * 0 + 2 * 9 - 0.25)


def test_a_file_is_imported_once(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("open(__file__ + '.log', 'a').write('x')\nf = g = lambda completions, **_: [1] * len(completions)")
    loaded = load_functions({f"{path}:f": 1, f"{tmp_path}/../{tmp_path.name}/a.py:g": 1})
    assert (tmp_path / "a.py.log").read_text() == "x" and loaded[0].call is loaded[1].call


def test_a_name_that_is_taken_becomes_the_whole_key(tmp_path):
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    x: int\n"
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(
            source + "def f(completions, **_): return [C(1).x] * len(completions)\niou = total = f\n"
        )
    keys = [f"{tmp_path}/{key}" for key in ("a.py:f", "b.py:f", "a.py:iou", "b.py:total", "a.py:C")]
    names = [function.name for function in load_functions(dict.fromkeys(keys, 1))]
    assert names == [*keys[:4], "C"]
    cfg = load(GrpoConfig, [], [f"rewards.functions={{{keys[0]}: 1, {keys[2]}: 1}}"])
    assert run_all(cfg)[0].parts == {"format": 1, "iou": 1, "f": 1, keys[2]: 1}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("a.py", "'a.py' is not of the form path/to/file.py:function"),
        ("missing.py:f", "missing.py:f: file not found"),
        (":f", ":f: file not found"),
        ("a.py:", "a.py:: the file has no function ''"),
        ("a.py:absent", "a.py:absent: the file has no function 'absent'"),
        ("a.py:number", "a.py:number: the file has no function 'number'"),
        ("syntax.py:f", "syntax.py:f: the file does not import: SyntaxError: "),
        (
            "imports.py:f",
            "imports.py:f: the file does not import: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raises.py:f", "raises.py:f: the file does not import: ZeroDivisionError: division by zero"),
        ("exits.py:f", "exits.py:f: the file does not import: SystemExit: usage"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_in_one_line(tmp_path, monkeypatch, key, reason):
    monkeypatch.chdir(tmp_path)  # paths count from the working directory
    (tmp_path / "a.py").write_text("number = 3\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "imports.py").write_text("import no_such_module\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit('usage')\n")
    with pytest.raises(ValueError) as raised:
        load_functions({key: 1.0})
    assert str(raised.value).startswith(f"rewards.functions: {reason}") and "\n" not in str(raised.value)


BATCH_OF_3 = "the batch of 3 completions that begins with sample 't'"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise OSError('two\\nlines')", f"step 11: OSError: two lines, on {BATCH_OF_3}"),
        ("assert False", f"step 11: AssertionError, on {BATCH_OF_3}"),
        ("return None", f"step 11: returned NoneType, not a list, for {BATCH_OF_3}"),
        ("return 1.0", f"step 11: returned float, not a list, for {BATCH_OF_3}"),
        ("return 'abc'", f"step 11: returned str, not a list, for {BATCH_OF_3}"),
        ("return {1: 1, 2: 2, 3: 3}", f"step 11: returned dict, not a list, for {BATCH_OF_3}"),
        ("return (1.0 for _ in completions)", f"step 11: returned generator, not a list, for {BATCH_OF_3}"),
        ("return numpy.ones((3, 1))", f"step 11: returned ndarray, not a list, for {BATCH_OF_3}"),
        ("return numpy.float64(1)", f"step 11: returned float64, not a list, for {BATCH_OF_3}"),
        ("return [1.0]", f"step 11: returned 1 values for {BATCH_OF_3}"),
        ("return []", f"step 11: returned 0 values for {BATCH_OF_3}"),
        ("return torch.ones(4)", f"step 11: returned 4 values for {BATCH_OF_3}"),
        ("return [1.0, 'x', 'y']", "step 11, sample 'm': returned 'x', not a finite number"),
        ("return [1.0, None, '1']", "step 11, sample 'g': returned '1', not a finite number"),
        ("return [1.0, [1], 1.0]", "step 11, sample 'm': list is not a number"),
        ("return [1j, 1.0, 1.0]", "step 11, sample 't': complex is not a number"),
        ("return [torch.ones(2), 1.0, 1.0]", "step 11, sample 't': Tensor is not a number"),
        ("return [10**400, 1.0, 1.0]", "step 11, sample 't': int is not a number"),
        ("return [1.0, 1.0, float('nan')]", "step 11, sample 'g': returned 'nan', not a finite number"),
        ("return numpy.array([1.0, numpy.inf, 1.0])", "step 11, sample 'm': returned 'inf', not a finite number"),
    ],
)
def test_a_function_that_fails_is_one_error_that_says_where(tmp_path, body, reason):
    path = tmp_path / "a.py"
    path.write_text(f"import numpy, torch\ndef f(completions, **kwargs):\n    {body}\n")
    with pytest.raises(RewardFunctionError) as raised:
        run_all(load(GrpoConfig, [], [f"rewards.functions={{{path}:f: 1}}"]))
    assert str(raised.value) == f"reward function f, {reason}"
    if body.startswith(("raise", "assert")):
        assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_filename == str(path)


def test_a_signature_that_does_not_fit_and_a_coroutine_that_raises_are_such_errors(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def f(completions): return [1.0] * 3\nasync def g(**kwargs): raise OSError('no answer')\n")
    for name, reason in (("f", "TypeError: f() got an unexpected keyword argument"), ("g", "OSError: no answer")):
        with pytest.raises(RewardFunctionError, match=re.escape(reason)):
            run_all(load(GrpoConfig, [], [f"rewards.functions={{{path}:{name}: 1}}"]))


def test_a_function_that_changes_its_arguments_disturbs_nobody(tmp_path):
    path = tmp_path / "a.py"
    body = (
        "    num = len(completions)\n    completions.clear()\n    completion_ids[0].clear()\n    return [num] * num\n"
    )
    path.write_text("".join(f"def {name}(completions, completion_ids, **kwargs):\n{body}" for name in "fg"))
    texts, ids = list(TEXTS), [list(row) for row in IDS]
    scored = run_all(load(GrpoConfig, [], [f"rewards.functions={{{path}:f: 1, {path}:g: 1}}"]), texts, BATCH, ids)
    assert [reward.parts["g"] for reward in scored] == [3, 3, 3] and (texts, ids) == (TEXTS, IDS)


@pytest.mark.parametrize("values", ["[True, False, None]", "numpy.array([1, 0, 1])", "torch.tensor([1.0, 0.0, 1.0])"])
def test_what_counts_as_numbers(tmp_path, values):
    path = tmp_path / "a.py"
    path.write_text(f"import numpy, torch\ndef f(completions, **kwargs):\n    return {values}\n")
    cfg = load(GrpoConfig, [], [f"rewards.functions={{{path}:f: 1}}"])
    parts = [reward.parts.get("f") for reward in run_all(cfg)]
    assert parts[:2] == [1.0, 0.0] and all(type(value) is float for value in parts[:2])
    mixed = "[numpy.float32(0.5), torch.tensor(0.25), numpy.bool_(True)]"
    path.with_name("b.py").write_text(f"import numpy, torch\ndef f(completions, **kwargs): return {mixed}\n")
    cfg = load(GrpoConfig, [], [f"rewards.functions={{{path.with_name('b.py')}:f: 1}}"])
    assert [reward.parts["f"] for reward in run_all(cfg)] == [0.5, 0.25, 1.0]
