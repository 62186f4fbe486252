"""What every way of fusing costs, in one table."""

import dataclasses

from sparsecut_jax.models.ways import FUSING
from sparsecut_jax.planning import costs, costs_table
from sparsecut_jax.runtime import hardware
from sparsecut_jax.settings import StageConfig
from tiny import tiny_config


def table(*ways: str, equal: bool = False) -> dict:
    cfg = tiny_config()
    cfg = dataclasses.replace(cfg, stages={"instruct": StageConfig(seq_len=64, batch_size=8)}, run_stages=("instruct",))
    found = {"config": "tiny", **costs.costs(cfg, "instruct", hardware.parse("h100:8"), ways, False, equal)}
    return {row["way"]: row for row in found["ways"]} | {"text": costs_table.text(found)}


def test_rows():
    """Positions of 9 tokens a view, exact parameters of the projectors, and the crops' share of the tower's work."""
    found = table("mlp", "concat", "channel")
    assert {way: found[way]["positions"] for way in ("mlp", "concat", "channel")} == {
        "mlp": 9,
        "concat": 45,
        "channel": 9,
    }
    assert found["mlp"]["parameters"] == 24 * 32 + 32 + 32 * 32 + 32
    assert found["concat"]["parameters"] == found["mlp"]["parameters"]
    assert found["channel"]["flops"]["vision"] == 5 * found["mlp"]["flops"]["vision"]
    assert all(f"  {way} " in found["text"] for way in ("mlp", "concat", "channel"))


def test_a_way_that_the_config_cannot_have_says_why():
    found = table("granite4", "mlp")
    assert found["granite4"]["refusal"] and not found["mlp"]["refusal"]
    assert found["granite4"]["refusal"][:60] in found["text"].replace("\n", " ")


def test_all_ways_have_a_row():
    assert table(*FUSING).keys() == {*FUSING, "text"}
