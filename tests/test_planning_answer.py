"""Plans without a compiler: their figures, their files, what is searched and what is refused."""

import dataclasses
import json
import re

import pytest
from PIL import Image

from planning_configs import load
from runs import command, finish
from sparsecut_jax.planning import answer, tables
from sparsecut_jax.runtime.hardware import GIB, parse
from tiny import refusal

SEVEN = ("sparsecut", "size=7b,stage=finetune")


def plan_of(cfg, stage, topology, **request):
    return answer.answer(cfg, answer.PlanRequest(parse(topology), stage, **request))


@pytest.fixture(scope="module")
def plan():
    """7B on a node of GPUs, 16 rows a chip."""
    return plan_of(*load(*SEVEN), "h100:8", price=2.0)


def test_figures(plan):
    """By hand: 6.78e9 trained numbers and 0.15e9 frozen ones of two bytes; peak rate; 5,198 steps an epoch."""
    b, t = plan["bytes_per_chip"], plan["time"]
    assert b["optimizer"] == pytest.approx(8 * 6.776e9 / 8, rel=0.01)
    assert b["parameters"] == pytest.approx((4 * 6.776e9 + 2 * 0.29e9) / 8, rel=0.01)
    assert b["gradients"] == b["optimizer"] / 2
    assert b["total"] == sum(b[kind] for kind in tables.KINDS)
    assert b["fits"] and b["memory"] == 80e9 and b["source"] == "analytic model"
    total = plan["flops_per_step"]["total"]
    model = total["forward"] + total["backward"]
    assert model == pytest.approx(6 * 6.776e9 * 128 * 2048, rel=0.12)
    assert t["seconds"] == pytest.approx(model / (8 * 989e12 * 0.4))
    assert t["roofline"]["bound"] == "compute"
    assert t["roofline"]["compute"] == pytest.approx((model + total["again"]) / (8 * 989e12))
    assert t["most_mfu"] == pytest.approx(model / (model + total["again"]))
    assert t["tokens_per_second"] == pytest.approx(128 * 2048 / t["seconds"])
    assert (t["rows"], t["rows_from"], t["steps"]) == (665_298, "llava_v1_5_mix665k.json", 5198)
    assert 0.3 * 5198 * t["seconds"] < t["hours"] * 3600 < 0.6 * 5198 * t["seconds"]  # most sequences are short
    assert t["chip_hours"] == 8 * t["hours"] and t["price"] == 2 * t["chip_hours"]


def test_tables(plan):
    text = tables.text({"config": "configs/sparsecut.py:size=7b,stage=finetune", **plan})
    for part in (
        "plan       configs/sparsecut.py:size=7b,stage=finetune, stage instruct, on h100:8\n",
        "mesh       data=1 x fsdp=8 x tensor=1; bfloat16, attention cudnn; remat: LLM full, fusion full, tower full\n",
        "batch      128 sequences of 2,048 positions: 16 per chip at a time, no accumulation\n",
        "not on this machine, so the config's sizes are used: openai/clip-vit-large-patch14-336, lmsys/vicuna-7b-v1.5\n",
        "665,298 rows (llava_v1_5_mix665k.json), 5,198 steps of",
    ):
        assert part in text


def test_what_does_not_fit_is_searched():
    """One chip has no room for the state of 7B, two have."""
    plan = plan_of(*load(*SEVEN, stage__batch_size=64), "h100:1")
    assert not plan["bytes_per_chip"]["fits"]
    assert plan["search"]["options"] == []
    assert plan["search"]["larger"]["topology"] == "h100:2"
    assert "no setting fits on 1 x h100; h100:2 would, with" in tables.search_table(plan)


def test_a_search_finds_what_fits():
    """Four chips, all rows at once, do not fit; turns do, and are ranked by the roofline."""
    cfg, stage = load(*SEVEN, stage__batch_size=128, llm__remat="none")
    plan = plan_of(cfg, stage, "h100:4")
    assert not plan["bytes_per_chip"]["fits"]
    options = plan["search"]["options"]
    assert options and all(option["bytes"] <= 80e9 for option in options)
    assert [option["seconds"] for option in options] == sorted(option["seconds"] for option in options)
    best = options[0]
    assert best["flags"] == (
        f"--config.mesh.data={best['mesh']['data']} --config.mesh.fsdp={best['mesh']['fsdp']} "
        f"--config.mesh.tensor={best['mesh']['tensor']} --config.llm.remat={best['remat']} "
        f"--config.stages.instruct.accumulate={best['accumulate']}"
    )
    tried, _ = load(
        *SEVEN, stage__batch_size=128, stage__accumulate=best["accumulate"], llm__remat=best["remat"],
        mesh__data=best["mesh"]["data"], mesh__fsdp=best["mesh"]["fsdp"], mesh__tensor=best["mesh"]["tensor"],
    )  # fmt: skip
    again = plan_of(tried, stage, "h100:4")
    assert again["bytes_per_chip"]["fits"]
    assert again["bytes_per_chip"]["total"] == best["bytes"]


def test_cpu_has_no_time():
    cfg, stage = load("own", "source=rows.json,images=pictures")
    plan = plan_of(cfg, stage, "cpu:8")
    assert plan["time"] == {} and plan["bytes_per_chip"]["fits"]
    assert plan["bytes_per_chip"]["total"] < GIB / 2


# --- steps ---


def test_steps():
    """Buckets take a row each; packed sequences several, and have a slot for each image."""
    cfg, stage = load(*SEVEN)
    buckets = answer.steps_of(cfg, stage)
    assert (buckets.steps, buckets.slots) == (5198, 1)
    assert set(buckets.lengths) == {768, 1024, 1536, 2048} and sum(buckets.lengths.values()) == pytest.approx(1)
    packed = answer.steps_of(*load(*SEVEN, stage__batching="packed"))
    assert packed.slots == 3 and packed.lengths == {2048: 1.0}
    assert 0.38 < packed.steps / 5198 < 0.48
    assert answer.steps_of(cfg, stage, rows=1280).steps == 10
    assert answer.steps_of(*load(*SEVEN, stage__max_steps=7), rows=1280).steps == 7
    unknown = answer.steps_of(*load(*SEVEN, data__source="elsewhere.json"))
    assert (unknown.rows, unknown.steps) == (None, None)


# --- refusals ---


@pytest.mark.parametrize(
    "changes, topology, sentence",
    [
        (
            dict(mesh__fsdp=3),
            "h100:8",
            "mesh(data=1, fsdp=3, tensor=1) asks for 3 devices, but there are 8 gpu devices",
        ),
        (dict(mesh__tensor=3), "h100:3", "config.vision.heads=16 cannot be sharded over mesh axis tensor=3"),
        (dict(stage__batch_size=12), "h100:8", "12 rows cannot be sharded over the 8 devices"),
        (dict(attention="splash"), "h100:8", "config.attention='splash' does not run on gpu; expected cudnn or xla"),
        (dict(llm__remat="offload"), "cpu:8", "config.llm.remat='offload' moves activations to host memory"),
        (dict(stage__seq_len=576), "h100:8", "seq_len=576 leaves no room for text beside 576 image tokens"),
    ],
)
def test_refusals(changes, topology, sentence):
    cfg, stage = load(*SEVEN, **{"stage__buckets": (), **changes})
    assert sentence in refusal(plan_of, cfg, stage, topology)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = refusal(plan_of, *load(*SEVEN, stage__batch_size=64), "v5e:8x8")
    assert sentence.startswith('the TPU compiler is not installed: pip install "jax[tpu]==')


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (dict(mfu=1.5), "--mfu=1.5: expected a share of the peak rate, 0.001 to 1"),
        (dict(mfu=0.0), "--mfu=0.0: expected a share of the peak rate, 0.001 to 1"),
        (dict(price=-1.0), "--price=-1.0: expected 0 or more"),
        (dict(rows=-1), "--rows=-1: expected 0 to 1,000,000,000,000"),
    ],
)
def test_requests(asked, sentence):
    assert refusal(lambda: answer.PlanRequest(parse("cpu:1"), "instruct", **asked)) == sentence


def test_nothing_is_expected_to_be_faster_than_the_roofline():
    plan = plan_of(*load("base", ""), "h100:8", mfu=0.9)
    t = plan["time"]
    assert t["seconds"] == pytest.approx(t["roofline"]["seconds"]) and t["mfu"] == t["most_mfu"] < 0.9
    said = tables.text({**plan, "config": "base.py"})
    assert "model GFLOP per step" in said and "ms per step" in said
    assert f"--mfu=0.9 is more than the roofline allows; {t['mfu']:.3g} is assumed" in said
    assert "fits: below 0.1% of 74.51 GiB" in said


def test_a_cpu_has_no_stated_rate():
    plan = plan_of(*load("base", ""), "cpu:8", price=2.0)
    assert plan["time"] == {}
    assert "cpu has no published peak rate: no time and no price" in plan["notes"]


def test_what_is_trained_is_asked_as_in_a_run():
    cfg, stage = load("base", "", stage__trainable=("nothing",))
    assert refusal(plan_of, cfg, stage, "h100:8").startswith("config.stages.instruct.trainable='nothing' matches no")


@pytest.mark.parametrize("hours, text", [(2.4712, "2.47 h"), (0.5, "30 min"), (0.001, "3.6 s")])
def test_durations(hours, text):
    assert tables.duration(hours) == text


def test_stages():
    cfg, _ = load(*SEVEN)
    assert answer.default_stage(cfg, "") == "instruct"
    both = dataclasses.replace(cfg, run_stages=("align", "instruct"))
    assert answer.default_stage(both, "align") == "align"
    assert refusal(answer.default_stage, both, "instructs") == (
        "--stage='instructs' is not in config.run_stages; expected align or instruct; did you mean 'instruct'?"
    )


# --- the command ---


def test_the_command(tmp_path):
    flags = (
        "--config=configs/sparsecut.py:size=7b,stage=lora",
        "--topology=h100:8",
        "--price=2.5",
        f"--out={tmp_path}",
    )
    code, out, err = finish(command("plan", *flags, "--search"))
    assert code == 0 and re.fullmatch(r"(searching  for settings that fit h100:8) \.\.\.\n\1: \d+\.\d s\n", err)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["config"] == "configs/sparsecut.py:size=7b,stage=lora" and len(found["search"]["options"]) > 1
    assert "also fits (analytic model)" in out and f"written    {tmp_path}/plan.json, plan.png" in out
    with Image.open(tmp_path / "plan.png") as picture:
        assert min(picture.size) > 700
