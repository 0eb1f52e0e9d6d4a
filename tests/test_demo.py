"""The demo's table: its rows and columns; nothing here trains."""

import json

import pytest

from experiments import demo

FLOOR = {"tvg": {"miou": 36.65, "r1@0.7": 9.444}, "mcqa": {"accuracy": 25.0}, "gqa": {"acc_gqa": 7.2222}}


def test_the_floor_is_the_first_row_and_r1_a_column(tmp_path, capsys):
    """Of two seeds: a base of 37 and 39 mIoU is hardly above the floor, and R1@0.7 says so as well."""
    roots = []
    for seed, miou in enumerate((37.0, 39.0)):
        root = tmp_path / str(seed)
        for name, floor in (("eval_base", FLOOR), ("eval_base_ood", {"tvg": {"miou": 19.63}})):
            (root / name).mkdir(parents=True)
            (root / name / "metrics.json").write_text(json.dumps({"floor": floor}))
        model = {"tvg/miou": miou, "tvg/r1@0.7": 12.5, "tvg_ood/miou": 20.0, "mcqa/accuracy": 66.7, "gqa/acc_gqa": 40.0}
        rows = dict.fromkeys(("base", "sft", "grpo"), model) | {"floor": demo.floors(root)}
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
