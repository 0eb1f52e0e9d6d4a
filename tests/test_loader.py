"""Prompts of coming steps: bad samples are replaced alike however a run is cut or shared; it says why it stops."""

import json
from collections import Counter
from types import SimpleNamespace

import failing_readers
import numpy as np
import pytest
import torch
from conftest import make_cfg, metrics_of, read_jsonl, sft_cfg, weights_of, write_data
from hypothesis import given
from hypothesis import strategies as st

import config
import data as data_room
import eval as evaluation
import train_grpo
import train_sft
from data import Loader, Order, PromptReader, batch_indices, spare_indices
from records.record import Sample
from video.readers import VideoError
from video.workers import Call, CallFailed

CUT, TEXT = b"", b"not a video"  # files of no bytes and of text


# ---- which samples stand in ----------------------------------------------------------------------------------------


@given(num=st.integers(2, 40), batch=st.integers(1, 8), step=st.integers(0, 5), seed=st.integers(0, 3))
def test_spares_are_what_is_not_taken(num, batch, step, seed):
    taken = batch_indices(num, min(batch, num), step, seed)
    spares = spare_indices(num, taken, step, 0, seed)
    assert sorted([*spares, *set(taken)]) == list(range(num)) and spares == spare_indices(num, taken, step, 0, seed)


def test_spares_differ_by_step_refill_and_seed():
    draws = [spare_indices(50, [1, 2], *numbers) for numbers in ((4, 0, 0), (5, 0, 0), (4, 1, 0), (4, 0, 1))]
    assert len(set(map(tuple, draws))) == 4


# ---- a loader without videos ---------------------------------------------------------------------------------------


class FakeWorkers:
    """Calls that are done at once; the samples `bad` fail, those `dead` kill their process."""

    def __init__(self, num=2, bad=(), dead=()):
        self.num, self.bad, self.dead, self.started, self.waiting = num, set(bad), set(dead), [], 0

    def start(self, sample):
        self.started.append(sample.id)
        self.waiting += 1
        return Call((sample,))

    def result(self, call):
        (sample,) = call.args
        self.waiting -= 1
        if sample.id in self.bad:
            raise VideoError(sample.video, "damaged")
        if sample.id in self.dead:
            raise CallFailed("died")
        return sample.id


class FakeReader(PromptReader):
    def prompt(self, sample, frames):
        return sample.id, frames


class FakeRun:
    """One of several processes, as far as a loader asks."""

    def __init__(self, folder, rank=0, world=1, state=None, rows=()):
        self.engine = SimpleNamespace(rank=rank, world_size=world, sums=lambda values: values, gather_rows=list)
        self.dir, self.state, self.is_main, self.listed = folder, state or {}, rank == 0, list(rows)

    def rows(self, name):
        return list(self.listed)

    def append(self, name, rows):
        self.listed += rows


def make_loader(tmp_path, workers, num=20, batch_size=4, steps=10, run=None, **data) -> Loader:
    samples = [Sample(f"r{i}", "tvg", f"{i}.mp4", "when?") for i in range(num)]
    cfg = config.GrpoConfig(run=config.RunConfig(steps=steps), data=config.DataConfig(batch_size=batch_size, **data))
    reader = FakeReader(None, workers, None, "exact", "cpu")
    return Loader(samples, reader, cfg, run or FakeRun(tmp_path), train_grpo.Clock())


def names(indices) -> list[str]:
    return [f"r{i}" for i in indices]


@pytest.fixture
def permuted(monkeypatch) -> list[int]:
    """The number of elements of every permutation that is drawn."""
    sizes, make = [], np.random.default_rng

    def counting(*args):
        def permutation(what):
            drawn = make(*args).permutation(what)
            sizes.append(len(drawn))
            return drawn

        return SimpleNamespace(permutation=permutation)

    monkeypatch.setattr(np.random, "default_rng", counting)
    return sizes


@pytest.mark.parametrize("batch_size", [40, 300, 700])
def test_an_epoch_is_permuted_once(tmp_path, permuted, batch_size):
    """Every step asked for its order anew, for those of the steps to come, and for spares that nothing needed."""
    loader = make_loader(tmp_path, FakeWorkers(16), num=300, batch_size=batch_size, steps=24)
    for step in range(24):
        loader.batch(step)
    assert permuted == [300] * -(-24 * batch_size // 300)


def test_a_curriculum_is_sorted_once_an_epoch(permuted):
    order = make_order(means=[0.5] * 300, batch_size=40, order="curriculum")
    for step in range(15):
        assert order.indices(step) == order.indices(step)
    assert permuted == [300, 300]


def test_spares_are_drawn_once_where_a_sample_fails(tmp_path, permuted):
    wanted = batch_indices(300, 4, 1, 0)
    bad = names([*wanted[:2], spare_indices(300, wanted, 1, 0, 0)[0]])
    permuted.clear()
    loader = make_loader(tmp_path, FakeWorkers(bad=bad), num=300)
    loader.batch(0)
    assert permuted == [300]
    loader.batch(1)
    assert loader.num_replaced == 3 and permuted == [300, 296]


def test_a_run_permutes_its_records_once_an_epoch(world, tmp_path, permuted):
    """All groups are dead, and yet no refill was asked for: group.max_refills is 0."""
    good = [json.loads(line) for line in (world / "tvg_train.jsonl").read_text().splitlines()]
    rows = [good[i % len(good)] | {"id": f"r{i}"} for i in range(300)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "videos").symlink_to(world / "videos")
    run = train_grpo.train(make_cfg(world, tmp_path, f"data.train={tmp_path}/data.jsonl", "run.steps=4"))
    assert permuted == [300] and all(row["group/frac_mixed"] == 0 for row in metrics_of(run.dir))


def test_the_steps_to_come_are_started_and_not_more(tmp_path):
    """Two processes and four videos a step: one step ahead; 16 processes: eight. Nothing past the last step."""
    for num, ahead in ((2, 1), (16, 8)):
        workers = FakeWorkers(num)
        loader = make_loader(tmp_path, workers)
        for step in range(10):
            batch = loader.batch(step)
            assert [name for name, _ in batch.prompts] == names(batch_indices(20, 4, step, 0))
            assert len(workers.started) == 4 * min(10, step + 1 + ahead) and batch.places == [0, 1, 2, 3]
        assert workers.waiting == 0


def test_each_process_starts_its_own(tmp_path):
    for rank in range(2):
        workers = FakeWorkers(0)
        batch = make_loader(tmp_path, workers, run=FakeRun(tmp_path, rank, world=2)).batch(0)
        wanted = names(batch_indices(20, 4, 0, 0))
        assert [name for name, _ in batch.prompts] == wanted[2 * rank : 2 * rank + 2] == workers.started[:2]
        assert (batch.places, batch.num_places) == ([2 * rank, 2 * rank + 1], 4)


def test_peeking_starts_and_counts_nothing_and_leaves_out_what_is_bad(tmp_path):
    workers, wanted = FakeWorkers(), names(batch_indices(20, 4, 2, 0))
    row = {"id": wanted[1], "step": 1, "path": "x", "reason": "damaged"}
    loader = make_loader(tmp_path, workers, run=FakeRun(tmp_path, rows=[row]))
    peeked = [sample.id for sample in loader.peek(2)]
    assert peeked == [name for name in wanted + names(range(20)) if name != wanted[1]]
    assert not workers.started and loader.state == {"num_asked": 0, "num_bad": 0}


def test_a_round_that_does_not_divide_repeats_its_last_place(tmp_path):
    """Three places on two processes: the second has one of its own, and the last one once more to be busy."""
    for rank, places in ((0, [0, 1]), (1, [2])):
        loader = make_loader(tmp_path, FakeWorkers(bad=["r7"]), run=FakeRun(tmp_path, rank, world=2))
        batch = loader.refill(3, 1, [4, 5, 7], [0, 1, 2, 3])
        assert (batch.places, batch.num_places, len(batch.prompts)) == (places, 3, 2)
        spare = spare_indices(20, [0, 1, 2, 3, 4, 5, 7], 3, 1, 0)[0]
        assert [name for name, _ in batch.prompts] == names([[4, 5], [spare, spare]][rank])
        assert loader.state == {"num_asked": 3 + rank, "num_bad": rank}  # the fake run gathers nothing


def test_what_fails_is_replaced_and_the_replacement_too(tmp_path):
    wanted = batch_indices(20, 4, 0, 0)
    spares = spare_indices(20, wanted, 0, 0, 0)
    bad, dead = names([wanted[1], wanted[2]]), names(spares[:1])
    run = FakeRun(tmp_path)
    loader = make_loader(tmp_path, FakeWorkers(bad=bad, dead=dead), run=run)
    batch = loader.batch(0)
    expected = names([wanted[0], spares[2], spares[1], wanted[3]])
    assert batch.prompts == [(name, name) for name in expected]
    assert (loader.num_replaced, loader.state) == (3, {"num_asked": 7, "num_bad": 3})
    listed = [(row["step"], row["id"], row["reason"]) for row in run.listed]
    assert listed == [(1, bad[0], "damaged"), (1, bad[1], "damaged"), (1, dead[0], "died")]
    assert batch.taken == [*wanted, *spares[:3]]
    loader.batch(1)
    assert loader.num_replaced == len({*bad, *dead} & set(names(batch_indices(20, 4, 1, 0)))) < 3


def test_the_memory_of_bad_samples_changes_nothing_but_their_decoding(tmp_path):
    """With it (of the steps before, or of a run that was resumed) and with every sample decoded again: the same."""
    bad = names([3, 8, 11])
    fresh, batches = FakeRun(tmp_path), []
    workers = FakeWorkers(bad=bad)
    whole = make_loader(tmp_path, workers, run=fresh)
    for step in range(10):
        batches.append((whole.batch(step), whole.num_replaced, dict(whole.state)))
        if step == 4:
            state, rows = dict(whole.state), list(fresh.listed)
    assert {row["id"] for row in fresh.listed} == set(bad) and len(fresh.listed) == 3
    assert all(workers.started.count(name) <= 2 for name in bad)  # the next step's may have been started before
    assert whole.state["num_bad"] > 4

    resumed = make_loader(tmp_path, FakeWorkers(bad=bad), run=FakeRun(tmp_path, state=state, rows=rows))
    assert [(resumed.batch(s), resumed.num_replaced, dict(resumed.state)) for s in range(5, 10)] == batches[5:]
    healed = make_loader(tmp_path, FakeWorkers(num=0), run=FakeRun(tmp_path, state=state, rows=rows))
    for (batch, *_), step in zip(batches[5:], range(5, 10)):  # a sample that once took too long, and would not now
        known = {row["id"] for row in rows}
        assert not known & {name for name, _ in healed.batch(step).prompts}
        assert not known & {name for name, _ in batch.prompts}


def test_a_share_of_bad_samples_ends_the_run_with_their_list(tmp_path):
    """A tenth of the first hundred, and then of all."""
    loader = make_loader(tmp_path, FakeWorkers(bad=names(range(0, 200, 8))), num=200, steps=100)
    with pytest.raises(SystemExit) as raised:
        for step in range(100):
            loader.batch(step)
    asked, bad = loader.state["num_asked"], loader.state["num_bad"]
    assert bad > 0.1 * asked and bad == 11 and asked < 110
    message = str(raised.value)
    assert message.startswith(f"error: {bad} of the {asked} samples asked for could not be read, more than data.m")
    assert str(tmp_path / "bad_samples.jsonl") in message and ".mp4: damaged; " in message and "\n" not in message
    loader = make_loader(tmp_path, FakeWorkers(bad=names(range(0, 200, 8))), num=200, steps=60, max_bad_share=0.2)
    for step in range(60):
        loader.batch(step)


def test_a_place_that_nothing_can_fill_ends_the_run(tmp_path):
    loader = make_loader(tmp_path, FakeWorkers(bad=names(range(200))), num=200, max_bad_share=1.0)
    with pytest.raises(SystemExit, match=r"error: 80 of the 80 samples .* nothing was left to stand in .*20 samples"):
        loader.batch(0)
    loader = make_loader(tmp_path, FakeWorkers(bad=["r2"]), num=4, max_bad_share=1.0)
    with pytest.raises(SystemExit, match=r"error: 1 of the 4 samples asked for .* nothing was left"):
        loader.batch(0)


# ---- dropping, and from easy to hard -------------------------------------------------------------------------------


def make_order(state=None, num=12, batch_size=4, steps=30, means=None, **data) -> Order:
    extras = [{"reward_mean": mean} for mean in means] if means else [None] * num
    samples = [Sample(f"r{i}", "tvg", f"{i}.mp4", "when?", extra=extra) for i, extra in enumerate(extras)]
    data = config.DataConfig(batch_size=batch_size, **data)
    return Order(samples, config.GrpoConfig(run=config.RunConfig(steps=steps), data=data), state)


def run_order(order: Order, steps, alive) -> list[list[str]]:
    """The ids of each step; groups of the samples `alive` are."""
    asked = []
    for step in steps:
        order.refilter(step)
        indices = order.indices(step)
        asked.append([order.samples[i].id for i in indices])
        order.visited(indices, [name in alive for name in asked[-1]])
    return asked


def test_without_refilter_nothing_is_dropped_or_stored():
    order = make_order()
    asked = run_order(order, range(9), alive=())
    assert asked == [names(batch_indices(12, 4, step, 0)) for step in range(9)]
    assert order.state == {} and order.end == 30


def test_what_was_dead_is_dropped_after_so_many_epochs():
    """Of 12 samples 2 are dead: two epochs of three steps, then two of ten samples, which are five steps."""
    alive = set(names(range(12))) - {"r3", "r8"}
    order = make_order(refilter_every=2)
    first = run_order(order, range(6), alive)
    assert Counter(name for step in first for name in step) == dict.fromkeys(names(range(12)), 2)
    assert order.end == 6 and len(order.samples) == 12
    second = run_order(order, range(6, 11), alive)
    assert Counter(name for step in second for name in step) == dict.fromkeys(alive, 2)
    assert (order.dropped, order.start, order.end) == (["r3", "r8"], 6, 11)
    third = run_order(order, range(11, 16), alive)
    assert len(order.samples) == 10 and third != second


def test_the_last_visit_counts():
    order = make_order(refilter_every=2)
    run_order(order, range(3), alive=())
    run_order(order, range(3, 6), alive=set(names(range(11))))
    assert order.refilter(6) == 1 and order.dropped == ["r11"]


def test_two_batches_are_left_whatever_is_dead():
    order = make_order(refilter_every=1)
    run_order(order, range(3), alive=set(names(range(7))))
    assert order.refilter(3) == 0 and len(order.samples) == 12 and len(order.dead) == 5
    run_order(order, range(3, 6), alive=set(names(range(8))))
    assert order.refilter(6) == 4


@pytest.mark.parametrize("stop", range(1, 12))
def test_an_order_goes_on_from_its_state(stop):
    """Which has been through JSON, as in a checkpoint."""
    alive = set(names(range(12))) - {"r0", "r5"}
    whole, parts = make_order(refilter_every=1), make_order(refilter_every=1)
    asked = run_order(whole, range(12), alive)
    before = run_order(parts, range(stop), alive)
    resumed = make_order(json.loads(json.dumps(parts.state))["order"], refilter_every=1)
    assert before + run_order(resumed, range(stop, 12), alive) == asked and resumed.state == whole.state


def test_epochs_do_not_repeat_each_other_across_droppings():
    """Nothing is dropped, and yet each phase has permutations of its own."""
    asked = run_order(make_order(refilter_every=1), range(9), alive=set(names(range(12))))
    assert len({tuple(name for step in asked[i : i + 3] for name in step) for i in (0, 3, 6)}) == 3


def test_nothing_is_started_ahead_past_a_dropping(tmp_path):
    workers = FakeWorkers(16)
    loader = make_loader(tmp_path, workers, num=12, refilter_every=1)
    for step in range(6):
        loader.batch(step)
        loader.order.visited(range(len(loader.samples)), [i != 3 for i in range(len(loader.samples))])
        assert len(workers.started) == (12 if step < 3 else 12 + 12)
    assert [sample.id for sample in loader.samples] == names([0, 1, 2, *range(4, 12)])


def test_a_curriculum_goes_from_easy_to_hard_in_every_epoch():
    means = [0.2, 0.9, 0.5, 0.9, 0.0, 0.5, 0.7, 0.1, 0.5, 0.3, 0.9, 0.5]
    order = make_order(means=means, order="curriculum")
    easy = sorted(means, reverse=True)
    asked = [order.indices(step) for step in range(6)]
    for epoch in (asked[:3], asked[3:]):
        places = [i for step in epoch for i in step]
        assert [means[i] for i in places] == easy and sorted(places) == list(range(12))
    assert asked[:3] != asked[3:]  # equals change places


def test_a_curriculum_names_the_record_without_a_statistic():
    with pytest.raises(ValueError, match=r"^data\.order=curriculum: record 'r0' has no number extra\.reward_mean"):
        make_order(order="curriculum")


# ---- runs ----------------------------------------------------------------------------------------------------------


def total_replaced(run_dir) -> int:
    return sum(row["data/num_replaced"] for row in metrics_of(run_dir))


@pytest.mark.parametrize("loop", ["grpo", "sft"])
def test_broken_files_change_nothing_in_how_a_run_resumes(world, taught, tmp_path, loop):
    """5% of the files are broken: the run goes through, lists them, and neither a stop after step 6 nor the number of
    worker processes changes a number."""
    make, train = (make_cfg, train_grpo.train) if loop == "grpo" else (sft_cfg, train_sft.train)
    data = write_data(world, tmp_path / "data", 40, {7: CUT, 23: TEXT})
    names = (*taught, f"data.train={data}", "data.batch_size=8", "run.save_every=6", "rollout.group_size=4")
    names += ("group.max_refills=1", "loss.beta=0.1", "data.cache_dir=''")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make(world, tmp_path, *names, "run.steps=12", f"run.dir={whole}", "data.workers=2"))
    train(make(world, tmp_path, *names, "run.steps=6", f"run.dir={parts}"))
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        with open(parts / name, "a") as file:
            file.write('{"step": 7, "id": "r1", "path": "x", "reason": "y"}\n{"step": 8, "torn')
    train(make(world, tmp_path, *names, "run.steps=12", f"run.dir={parts}"), resume=True)

    assert metrics_of(parts) == metrics_of(whole) and len(metrics_of(whole)) == 12
    listed = read_jsonl(whole / "bad_samples.jsonl")
    assert listed == read_jsonl(parts / "bad_samples.jsonl")
    assert {(row["id"], row["path"].rpartition("/")[2]) for row in listed} == {("r7", "7.mp4"), ("r23", "23.mp4")}
    assert all(0 < row["step"] <= 6 and row["reason"] for row in listed)
    assert total_replaced(whole) >= 4  # 12 steps of 8 are over two epochs
    states = [json.loads((run / "checkpoints/step_000012/run.json").read_text())["state"] for run in (whole, parts)]
    assert states[0] == states[1] and states[0]["num_bad"] == total_replaced(whole)
    if loop == "grpo":
        samples = read_jsonl(whole / "samples.jsonl")
        assert samples == read_jsonl(parts / "samples.jsonl")
        assert states[0]["num_asked"] == len(samples) + states[0]["num_bad"]
        times = Counter((row["step"], row["id"]) for row in samples)
        assert max(times.values()) == 1 and not {"r7", "r23"} & {name for _, name in times}
    ours, theirs = weights_of(parts), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = metrics_of(whole, machine=True)
    assert all(row["time/data"] >= row["time/data_wait"] >= 0 and row["tokens/video"] > 0 for row in rows)


@pytest.mark.parametrize("ending", ["killed", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_run_goes_on_when_a_reader_kills_its_process(world, tmp_path, monkeypatch, capfd, ending):
    monkeypatch.setattr(data_room, "decode_sample", failing_readers.decode_sample)
    data = write_data(world, tmp_path / "data", 12, {2: ending, 9: ending})
    names = (f"data.train={data}", "data.workers=2", "data.decode_timeout=3", "run.steps=6", "data.max_bad_share=0.5")
    train_sft.train(sft_cfg(world, tmp_path, *names))
    reason = {"killed": "the process that read it died (signal 9)", "hangs": "took more than 3 s"}[ending]
    listed = read_jsonl(tmp_path / "run" / "bad_samples.jsonl")
    assert {(row["id"], row["reason"]) for row in listed} == {("r2", reason), ("r9", reason)}
    assert total_replaced(tmp_path / "run") == 4 and len(metrics_of(tmp_path / "run")) == 6
    assert f"r2 replaced; {tmp_path}/data/videos/2_{ending}.mp4: {reason}" in capfd.readouterr().err


def test_a_bug_in_a_reader_is_no_bad_sample(world, tmp_path, monkeypatch):
    monkeypatch.setattr(data_room, "decode_sample", failing_readers.decode_sample)
    data = write_data(world, tmp_path / "data", 4, {1: "raises"})
    with pytest.raises(KeyError):
        train_sft.train(sft_cfg(world, tmp_path, f"data.train={data}", "data.batch_size=4", "run.steps=1"))


def test_a_run_that_cannot_read_its_data_stops_with_the_list(world, tmp_path):
    data = write_data(world, tmp_path / "data", 16, dict.fromkeys(range(6), TEXT))
    names = (f"data.train={data}", "data.max_bad_share=0", "data.batch_size=4", "run.steps=3")
    with pytest.raises(SystemExit, match=r"^error: \d+ of the \d+ samples .* more than data\.max_bad_share=0 of them"):
        train_grpo.train(make_cfg(world, tmp_path, *names))
    listed = read_jsonl(tmp_path / "run" / "bad_samples.jsonl")
    assert listed and all(row["step"] == 1 and int(row["id"][1:]) < 6 for row in listed)


def test_files_that_vanish_while_a_run_goes_are_replaced(world, tmp_path, monkeypatch):
    data = write_data(world, tmp_path / "data", 16, {})
    start = train_sft.update

    def update(*args):
        for i in (3, 4):
            (tmp_path / "data" / "videos" / f"{i}.mp4").unlink(missing_ok=True)
        return start(*args)

    monkeypatch.setattr(train_sft, "update", update)
    train_sft.train(sft_cfg(world, tmp_path, f"data.train={data}", "run.steps=9", "data.cache_dir=''"))
    listed = read_jsonl(tmp_path / "run" / "bad_samples.jsonl")
    assert {row["id"] for row in listed} == {"r3", "r4"} and "No such file" in listed[0]["reason"]


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_video_is_a_wrong_answer(world, tmp_path, capsys, workers):
    data = write_data(world, tmp_path / "data", 7, {1: TEXT, 2: TEXT, 6: CUT})
    names = [f"model.path={world}/model", f"data.test={data}", "data.cache_dir=", f"run.dir={tmp_path}/eval"]
    names += ["prompt.think=false", "eval.max_new_tokens=2", "eval.batch_size=2", f"data.workers={workers}"]
    evaluation.main(["run", *names])
    rows = read_jsonl(tmp_path / "eval" / "predictions.jsonl")
    bad = [row for row in rows if "error" in row]
    assert {row["id"] for row in rows} == {f"r{i}" for i in range(7)}
    assert {row["id"] for row in bad} == {"r1", "r2", "r6"} and {row["response"] for row in bad} == {""}
    assert all("mp4: " in row["error"] and "video_tokens" not in row for row in bad)
    used = [row["video_tokens"] for row in rows if "error" not in row]
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["tasks"]["tvg"]["n"], metrics["tasks"]["tvg"]["num_unreadable"]) == (7, 3)
    assert metrics["videos"] == {
        "tokens_mean": pytest.approx(sum(used) / 4),
        "tokens_max": max(used),
        "frames_cut_mean": 0,
    }
    assert "3 with an unreadable video; 7 without a usable answer counted as wrong" in capsys.readouterr().out
    evaluation.main(["score", str(tmp_path / "eval/predictions.jsonl"), "--out", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["tasks"], again["videos"]) == (metrics["tasks"], metrics["videos"])


def test_validation_counts_unreadable_videos(world, tmp_path):
    data = write_data(world, tmp_path / "data", 4, {0: TEXT})
    names = (f"data.validation={data}", "eval.every=1", "run.steps=1")
    train_sft.train(sft_cfg(world, tmp_path, *names))
    (row,) = metrics_of(tmp_path / "run")
    assert row["validation/num_unreadable"] == 1 and row["validation/tvg/parse_fail"] >= 25
