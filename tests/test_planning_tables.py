"""Several topologies beside one another."""

import json
import re

import pytest

import runs
from planning_configs import load
from sparsecut_jax.planning import answer, tables
from sparsecut_jax.runtime.hardware import parse


@pytest.fixture(scope="module")
def plans():
    found = []
    for chips in (8, 16):
        cfg, stage = load("sparsecut", "size=7b,stage=finetune", stage__batch_size=4 * chips)
        question = answer.PlanRequest(parse(f"h100:{chips}"), stage, search=True)
        found.append({"config": "sparsecut.py", **answer.answer(cfg, question)})
    return found


def test_rows(plans):
    """Weak scaling: a chip's FLOPs stay, its bytes fall, and beyond a node the network bears the gradients."""
    small, large = map(tables.scaling_row, plans)
    assert (small["chips"], small["rows"], large["chips"], large["rows"]) == (8, 32, 16, 64)
    assert small["flops"] == pytest.approx(large["flops"])
    assert small["bytes"] > 1.2 * large["bytes"]
    assert large["seconds"]["links"] > small["seconds"]["links"]
    assert small["links_share"] == small["seconds"]["links"] / small["seconds"]["products"]
    assert small["recommended"]["flags"].startswith("--config.mesh.")


def test_compiled_collectives_win(plans):
    plan = {**plans[0], "collectives": {"bytes": {"all-gather": 9e9}, "total": 9e9, "seconds": 0.02}}
    assert tables.scaling_row(plan)["seconds"]["links"] == 0.02
    assert "9.0" in tables.scaling_text([plan]) and "-" in tables.scaling_text([plans[0]])


def test_what_was_compiled_is_recommended(plans):
    """A setting that the compiler has tried, or the plan's own where that is as fast; else the model's first."""
    first = plans[0]["search"]["options"][0]
    compiled = {**plans[0], "collectives": {"bytes": {}, "total": 1.0, "seconds": 3.0}}

    def recommended(seconds):
        option = {**first, "compiled": 5e9, "compiled_seconds": seconds}
        return tables.recommended({**compiled, "search": {"options": [option]}}, 3.0)

    assert recommended(2.5) == {"flags": first["flags"], "bytes": 5e9, "seconds": 2.5}
    own = {"flags": "unchanged", "bytes": plans[0]["bytes_per_chip"]["total"], "seconds": 3.0}
    assert recommended(3.5) == own == tables.recommended({**compiled, "search": {"options": [first]}}, 3.0)
    assert tables.recommended(plans[0], 3.0)["seconds"] == first["seconds"]
    assert "by the roofline of the compiled step:\n  h100:8" in tables.scaling_text([compiled])
    none = {**plans[0], "search": {"options": []}}
    assert "h100:8       nothing fits" in tables.scaling_text([none])


def test_the_command(tmp_path):
    config = "--config=configs/sparsecut.py:size=7b,stage=finetune"
    (code, out, err), mixed = runs.each(
        ("plan", config, "--topology=h100:8,h100:16", "--rows_per_chip=2", f"--out={tmp_path}"),
        ("plan", config, "--topology=h100:8,cpu:8", f"--out={tmp_path}"),
    )
    searched = r"(searching  for settings that fit h100:{}) \.\.\.\n\{}: \d+\.\d s\n"
    assert code == 0 and re.fullmatch(searched.format(8, 1) + searched.format(16, 2), err)
    assert "interconnect / roofline" in out and "recommended, by the roofline of the analytic model:\n  h100:8" in out
    assert [plan["settings"]["batch_size"] for plan in json.loads((tmp_path / "scaling.json").read_text())] == [16, 32]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert mixed[0] == 2 and "--topology=h100:8,cpu:8: cpu has no published peak rate to compare" in mixed[2]
