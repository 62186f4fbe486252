"""Collectives of a compiled step; and what the real TPU compiler, libtpu, says of the paper's runs on a CPU machine.

`python -m pytest -m plan` compiles the whole models, minutes each; otherwise models of two layers are compiled.
"""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from runs import command, finish
from sparsecut_jax.planning.collectives import Collective, collectives_of
from sparsecut_jax.runtime.hardware import GIB
from sparsecut_jax.runtime.sharding import make_mesh

FINETUNE = "--config=configs/sparsecut.py:size={},stage=finetune"
TWO_LAYERS = (
    "--config.llm.layers=2", "--config.vision.layers=2", "--config.vision.select_layer=-1", "--config.shortcuts.count=2",
)  # fmt: skip


@functools.cache
def planned(size, topology, *flags, rows=64):
    """(exit code, plan.json, stdout, stderr) of the command for that many rows a step."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs the TPU compiler: pip install "jax[tpu]"')
    batch = f"--config.stages.instruct.batch_size={rows}"
    with tempfile.TemporaryDirectory() as folder:
        process = command(  # XLA_FLAGS: those of tests/conftest.py are for the CPU's compiler
            "plan", FINETUNE.format(size), f"--topology={topology}", batch, f"--out={folder}", *flags, XLA_FLAGS=""
        )
        code, out, err = finish(process, timeout=3000)
        return code, json.loads(Path(folder, "plan.json").read_text()) if code == 0 else None, out, err


def state_of(plan):
    return sum(plan["bytes_per_chip"][kind] for kind in ("parameters", "optimizer"))


# --- models of two layers, of the same widths ---


@pytest.fixture(scope="module")
def two_layers():
    return planned("7b", "v5e:8x8", *TWO_LAYERS)


def test_the_command_asks_the_compiler(two_layers):
    code, plan, out, err = two_layers
    assert code == 0 and err == ""
    assert plan["bytes_per_chip"]["source"].startswith("TPU compiler")
    assert plan["bytes_per_chip"]["fits"] and plan["bytes_per_chip"]["code"] > 2**20
    assert "fits" in out and plan["settings"]["attention"] == "splash"


def test_arguments_are_those_of_the_analytic_model(two_layers):
    """What arguments take beyond their numbers, and the program, is less than a tenth of a GiB."""
    assert two_layers[1]["bytes_per_chip"]["code"] < 0.1 * GIB


# --- the whole models ---


@pytest.mark.plan
@pytest.mark.parametrize("size, most", [("7b", 4), ("13b", 7)])
def test_full_fine_tuning_on_64_chips(size, most):
    """All that the compiler lists: five views, eight shortcuts, one row of 2,048 positions a chip."""
    code, plan, _, _ = planned(size, "v5e:8x8")
    assert code == 0
    assert plan["settings"]["batch_size"] == 64 and plan["settings"]["accumulate"] == 1
    assert plan["bytes_per_chip"]["fits"]
    assert plan["bytes_per_chip"]["total"] <= plan["bytes_per_chip"]["allocated"] <= most * GIB


@pytest.mark.plan
def test_accumulation_takes_at_most_one_more_copy_of_the_gradients():
    once = planned("7b", "v5e:8x8")[1]["bytes_per_chip"]
    turns = planned("7b", "v5e:8x8", "--config.stages.instruct.accumulate=2", rows=128)[1]["bytes_per_chip"]
    assert 0.1 * once["gradients"] < turns["total"] - once["total"] < 1.1 * once["gradients"]


@pytest.mark.plan
def test_state_falls_with_the_chips():
    """From 16 to 256 chips: a sixteenth within 5 %. The compiler's arguments are the state and its padding."""
    per_chip = {}
    for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256)):
        code, plan, _, _ = planned("7b", topology, rows=chips)
        assert code == 0
        per_chip[chips] = state_of(plan)
    assert per_chip[16] / per_chip[256] == pytest.approx(16, rel=0.05)


@pytest.mark.plan
def test_seven_billion_do_not_fit_on_four_chips():
    code, plan, out, _ = planned("7b", "v5e:2x2", rows=4)
    assert code == 0
    assert not plan["bytes_per_chip"]["fits"]
    assert "does not fit in 15.75 GiB" in out and "Ran out of memory" in plan["bytes_per_chip"]["refusal"]
    assert plan["search"]["options"] == []
    assert "no setting fits on 4 x v5e; v5e:" in out


# --- collectives: which count, how often, and how many bytes come into a chip ---

# A loop of 32 turns, by twos to 64, that collects a matrix (in two instructions of one channel) and sums a gradient, and one sum behind it.
HLO = """HloModule jit_step, is_scheduled=true

%add.1 (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%x.1, %y.1)
}

%fused.1 (param_0.1: bf16[64,4096]) -> bf16[4096,4096] {
  ROOT %all-gather.1 = bf16[4096,4096]{0,1:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=64] {'axis_1'}, dimensions={0}
}

%fused.2 (param_0.2: bf16[64,4096]) -> bf16[4096,4096] {
  ROOT %all-gather.2 = bf16[4096,4096]{0,1:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=64] {'axis_1'}, dimensions={0}
}

%condition.1 (state.1: (s32[], bf16[64,4096])) -> pred[] {
  %limit = u32[]{:T(128)} constant(64)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%body.1 (state.2: (s32[], bf16[64,4096])) -> (s32[], bf16[64,4096]) {
  %a = bf16[4096,4096] fusion(%w), kind=kCustom, calls=%fused.1
  %b = bf16[4096,4096] fusion(%w), kind=kCustom, calls=%fused.2
  %all-reduce.3 = (bf16[100]{0}, bf16[4,25]{1,0}) all-reduce(%g, %h), channel_id=6, replica_groups=[16,4]<=[64], to_apply=%add.1
  %i.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=0
  %two = u32[]{:T(128)} constant(2)
  %i.3 = u32[]{:T(128)} add(%i.2, %two)
  ROOT %next = (u32[], bf16[64,4096]) tuple(%i.3, %w)
}

ENTRY %main (p.1: bf16[64,4096]) -> f32[10] {
  %loop = (s32[], bf16[64,4096]) while(%start), condition=%condition.1, body=%body.1
  %scatter = f32[10]{0} reduce-scatter(%x), channel_id=7, replica_groups={{0,1,2,3,4}}, to_apply=%add.1
  ROOT %moved = f32[10]{0} collective-permute(%scatter), channel_id=8, source_target_pairs={{0,1},{1,0}}
}
"""


def test_literal():
    assert collectives_of(HLO) == [
        Collective("reduce-scatter", 10 * 4 * 4, 1),
        Collective("collective-permute", 10 * 4, 1),
        Collective("all-reduce", 2 * 200 * 2 * 3 / 4, 32),
        Collective("all-gather", 4096 * 4096 * 2 * 63 / 64, 32),
    ]


def test_of_a_started_one_the_result_counts():
    hlo = HLO.replace(
        "ROOT %moved = f32[10]{0} collective-permute(%scatter)",
        "ROOT %moved = (f32[10]{0}, f32[40]{0}) all-gather-start(%scatter), replica_groups={{0,1,2,3}}",
    )
    assert collectives_of(hlo)[1] == Collective("all-gather", 160 * 3 / 4, 1)


@pytest.mark.parametrize("turns", [1, 5])
def test_what_a_compiler_makes(turns):
    """Rows of x on 8 devices, a matrix whose rows they share: each turn collects it whole."""
    mesh = make_mesh({"fsdp": 8})
    split = NamedSharding(mesh, P("fsdp"))

    def run(x, w):
        step = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None)
        return jax.lax.scan(step, x, w)[0]

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((turns, 128, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    found = collectives_of(jax.jit(run, out_shardings=split).lower(x, w).compile().as_text())
    assert {each.kind for each in found} == {"all-gather"}
    assert sum(each.bytes * each.times for each in found) == turns * 128 * 128 * 4 * 7 / 8
