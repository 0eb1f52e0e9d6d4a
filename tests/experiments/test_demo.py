"""The demo's results and its table: rows, columns and differences. Nothing here trains."""

import json

import pytest
from prediction_rows import gqa, tvg
from run_folders import write_evaluation

from experiments import demo

FLOOR = {"tvg": {"miou": 36.65432, "r1@0.7": 9.444}, "mcqa": {"accuracy": 25.0}, "gqa": {"acc_gqa": 7.2222}}


def write_evaluations(root, right: dict[str, int]) -> None:
    """Evaluations in which a model answers so many of ten questions of each task right."""
    for name, num in right.items():
        rows = [tvg([[4, 8]] if i < num else [[9, 12]], id=f"t{i}", video=f"{i // 2}.mp4") for i in range(10)]
        rows += [gqa("B" if i < num else "A", [[4, 8]], id=f"g{i}", video=f"{i}.mp4") for i in range(10)]
        rows += [
            {"id": f"m{i}", "task": "mcqa", "pred_choice": "B" if i < num else None, "answer": "B"} for i in range(10)
        ]
        for test in demo.TESTS:
            path = write_evaluation(root / f"eval_{name}{test}", rows if not test else rows[2:10]) / "metrics.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"floor": FLOOR}))


def test_results_are_means_floors_and_paired_differences(tmp_path):
    write_evaluations(tmp_path, {"base": 2, "sft": 6, "grpo": 8})
    found = demo.results_of(tmp_path)
    assert found["rows"]["floor"] == {
        "tvg/miou": 36.6543,
        "tvg/r1@0.7": 9.444,
        "tvg_ood/miou": 36.6543,
        "mcqa/accuracy": 25.0,
        "gqa/acc_gqa": 7.2222,
    }
    assert found["rows"]["sft"] == dict.fromkeys(demo.COLUMNS, 60.0) | {"tvg_ood/miou": 50.0}
    assert found["paired"].keys() == demo.PAIRS.keys()
    mean, low, high = found["paired"]["grpo - base"]["mcqa/accuracy"]
    assert mean == 60.0 and 20 < low < 60 < high < 100
    mean, *wider = found["paired"]["grpo - base"]["tvg/miou"]  # five videos with two questions each
    assert mean == 60.0 and wider[1] - wider[0] > high - low
    assert found["paired"]["sft - base"]["tvg_ood/miou"][0] == 50.0


def test_the_floor_is_the_first_row_and_r1_a_column(tmp_path, capsys):
    """Of two seeds: a base of 37 and 39 mIoU is hardly above the floor, and R1@0.7 says so as well."""
    roots, floor = [], dict(zip(demo.COLUMNS, (36.65, 9.444, 19.63, 25.0, 7.2222)))
    for seed, miou in enumerate((37.0, 39.0)):
        root = tmp_path / str(seed)
        root.mkdir()
        model = {"tvg/miou": miou, "tvg/r1@0.7": 12.5, "tvg_ood/miou": 20.0, "mcqa/accuracy": 66.7, "gqa/acc_gqa": 40.0}
        rows = dict.fromkeys(("base", "sft", "grpo"), model) | {"floor": floor}
        result = {"rows": rows, "seconds": {"base": 1.0}, "seed": seed, "seen": {}, "paired": {}}
        (root / "results.json").write_text(json.dumps(result))
        roots.append(root)
    demo.main(["--table", *map(str, roots)])
    head, _, floor, base, *_ = capsys.readouterr().out.splitlines()
    assert head == "| |tvg/miou|tvg/r1@0.7|tvg_ood/miou|mcqa/accuracy|gqa/acc_gqa|"
    assert floor == "| floor | 36.6 ± 0.0 | 9.4 ± 0.0 | 19.6 ± 0.0 | 25.0 ± 0.0 | 7.2 ± 0.0 |"
    assert base == "| base | 38.0 ± 1.4 | 12.5 ± 0.0 | 20.0 ± 0.0 | 66.7 ± 0.0 | 40.0 ± 0.0 |"


def test_results_of_an_older_version_are_one_line(tmp_path):
    """They had neither the row of the floor nor the column of R1@0.7, and the table ended in a KeyError."""
    row = {"tvg/miou": 37.0, "tvg_ood/miou": 20.0, "mcqa/accuracy": 66.7, "gqa/acc_gqa": 40.0}
    old = {"rows": dict.fromkeys(("base", "sft", "grpo"), row), "seconds": {}, "seed": 3, "paired": {}, "seen": {}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit) as stop:
        demo.main(["--table", str(tmp_path)])
    line = f"error: {tmp_path}/results.json has no floor tvg/miou, because an older version wrote it: "
    assert stop.value.code == f"{line}run the demo again (python -m experiments.demo --dir {tmp_path} --seed 3)"
    with pytest.raises(SystemExit, match=r"^error: .*nowhere/results.json"):
        demo.main(["--table", str(tmp_path / "nowhere")])
