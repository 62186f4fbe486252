"""What each device holds, and the table of it that a run begins with."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecut_jax.models.levels import wiring_of_shortcuts
from sparsecut_jax.models.shortcuts import Shortcuts
from sparsecut_jax.runs.parameters import abstract_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.runtime.tables import size_text
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.holdings import Holding, bytes_of_one, group_of, holdings, split_axes
from sparsecut_jax.training.report import heading, holdings_table
from tiny import matrices_of, tiny_config

MESH = AbstractMesh((2, 1, 4, 2), sharding.MESH_AXES)


def leaf(shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*spec)))


def test_groups():
    paths = {
        "vision/class_embedding": "vision/embeddings",
        "vision/patch_embedding/kernel": "vision/embeddings",
        "vision/pre_norm/scale": "vision/embeddings",
        "vision/blocks/norm1/scale": "vision/blocks",
        "fusion/fuse/projector/fc1/kernel": "fusion",
        "llm/embedding": "llm/embedding",
        "llm/head": "llm/head",
        "llm/head_lora_a": "llm/adapters",
        "llm/norm/scale": "llm/norms",
        "llm/layers/norm1/scale": "llm/norms",
        "llm/layers/attention/q": "llm/layers/attention",
        "llm/layers/attention/q_lora_b": "llm/adapters",
        "llm/layers/mlp/gate/kernel": "llm/layers/mlp",
        "llm/layers/router": "llm/others",
        "fusion/inject/gate": "fusion",
        "memory/keys": "memory/others",
    }
    assert {path: group_of(path) for path in paths} == paths


def test_bytes_of_one_and_axes():
    assert bytes_of_one(leaf((8, 6), ("fsdp", "tensor"))) == 2 * 3 * 4
    assert bytes_of_one(leaf((8, 6), (), jnp.bfloat16)) == 96
    assert split_axes(leaf((8, 8), (None, ("tensor", "fsdp"))).sharding) == ("fsdp", "tensor")
    assert split_axes(leaf((8, 8), ("data", "tensor")).sharding) == ("tensor",)  # data has one device
    assert split_axes(leaf((8, 8), ()).sharding) == ()


def test_split_names_shares_of_one_percent_and_more():
    held = Holding()
    held.numbers.update({("bfloat16", ("fsdp", "tensor")): 800, ("float32", ("fsdp",)): 195, ("float32", ()): 5})
    assert held.split == "80% fsdp x tensor, 20% fsdp" and held.dtype == "bfloat16"
    held.numbers = type(held.numbers)({("float32", ()): 5, ("float32", ("tensor",)): 995})
    assert held.split == "tensor"


def tiny_states(sizes, trainable):
    cfg = tiny_config(stages=dict(align=dict(trainable=trainable), instruct=dict(trainable=("llm/.*",))))
    mesh, model = AbstractMesh(sizes, sharding.MESH_AXES), build_model(cfg)
    params, are_matrices = abstract_params(model, cfg, mesh), matrices_of(model)
    return params, {
        name: state.abstract_state(params, cfg.stages[name].trainable, opt.adamw(cfg.stages[name], are_matrices), mesh)
        for name in cfg.run_stages
    }


def test_holdings_of_a_model():
    """LLM: 7 layers of width 32, 4 heads of 8 with 2 KV heads, 64 words; four fsdp and two tensor devices."""
    held = holdings(*tiny_states((1, 1, 4, 2), ("llm/layers/attention/q", "fusion/.*")))
    attention = held["llm/layers/attention"]
    q, kv = 7 * 32 * 32, 7 * 32 * 16
    assert attention.numbers == {("float32", ("fsdp", "tensor")): 2 * q + 2 * kv}
    assert attention.weights == (2 * q + 2 * kv) * 4 // 8
    assert attention.trained == {"align": q, "instruct": 2 * q + 2 * kv}
    assert attention.moments == {"align": 2 * q * 4 // 8, "instruct": 2 * (2 * q + 2 * kv) * 4 // 8}
    assert attention.total == 3 * attention.weights
    assert held["llm/embedding"].weights == 64 * 32 * 4 // 8
    norms = held["llm/norms"]
    assert norms.split == "replicated" and norms.weights == (7 * 2 + 1) * 32 * 4
    vision = held["vision/blocks"]
    assert not vision.moments and vision.total == vision.weights
    assert sum(h.numbers.total() for h in held.values()) == sum(leaf.size for leaf in jax.tree.leaves(
        tiny_states((1, 1, 4, 2), ("fusion/.*",))[0]
    ))  # fmt: skip


def test_replicas_and_data_hold_the_same():
    alone, many = (holdings(*tiny_states(sizes, ("fusion/.*",))) for sizes in ((1, 1, 2, 1), (2, 4, 2, 1)))
    assert {name: h.total for name, h in alone.items()} == {name: h.total for name, h in many.items()}
    assert many["llm/head"].split == "fsdp"


def test_size_text():
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 15 * 2**20 + 2**19, 2**30 - 1, 2**30, 300 * 2**30)] == [
        "0 B", "1,023 B", "1.00 KiB", "1.50 KiB", "15.5 MiB", "1,024 MiB", "1.00 GiB", "300 GiB",
    ]  # fmt: skip


def test_table():
    held = {"fusion": Holding(weights=2048), "llm/head": Holding(weights=3 * 2**20)}
    held["fusion"].numbers["float32", ("fsdp",)] = 1000
    held["fusion"].moments["align"] = 4096
    held["llm/head"].numbers["bfloat16", ("fsdp", "tensor")] = 2_000_000
    assert holdings_table(held, ["align"]).splitlines() == [
        "  part      parameters     dtype   sharded over   weights  moments in align  per device",
        "  fusion         1,000   float32           fsdp  2.00 KiB          4.00 KiB    6.00 KiB",
        "  llm/head   2,000,000  bfloat16  fsdp x tensor  3.00 MiB                 -    3.00 MiB",
        "  total      2,001,000                           3.00 MiB          4.00 KiB    3.01 MiB",
    ]


def test_heading():
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    params, states = tiny_states((1, 2, 2, 2), ("fusion/.*",))
    lines = heading(mesh, wiring_of_shortcuts(Shortcuts(((4, 0),), 3, 5, 7), 9), params, states, "float32").splitlines()
    assert lines[:4] == [
        "devices    8 x cpu (cpu), 1 process",
        "mesh       data=2 x fsdp=2 x tensor=2, computing in float32",
        "trained    4,928 of 87,128 parameters in align, 58,336 of 87,128 parameters in instruct",
        "",
    ]
    assert [line.split()[0] for line in lines[4:14]] == [
        "part", "fusion", "llm/embedding", "llm/head", "llm/layers/attention", "llm/layers/mlp", "llm/norms",
        "vision/blocks", "vision/embeddings", "total",
    ]  # fmt: skip
    assert lines[15] == "shortcuts  1, added before the layer; main feature: output of ViT block 3"
    many = sharding.make_mesh(dict(replica=2, data=1, fsdp=2, tensor=2))
    assert heading(many, wiring_of_shortcuts(Shortcuts((), 3, 5, 7), 9), params, {}, "float32").splitlines()[1:3] == [
        "mesh       replica=2 x data=1 x fsdp=2 x tensor=2, computing in float32", "",
    ]  # fmt: skip
