"""Collectives of a compiled step: which count, how often, and how many bytes come into a chip."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecut_jax.planning.roofline import Collective, collectives_of
from sparsecut_jax.runtime.sharding import make_mesh

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
