"""A config becomes a run step by step: pretrained parts, data, the model's shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import runs
from parity_cases import FOLDER
from sparsecut_jax import config as config_lib
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import InitConfig
from tiny import refusal, tiny_config


def test_pretrained_parts_are_opened_and_their_settings_adopted():
    asked = dataclasses.replace(config_lib.check(config_lib.default()), init=InitConfig(llm=str(FOLDER / "llama2")))
    opened = setup.open_weights(asked)
    assert list(opened.weight_sources) == ["llm"]
    assert opened.config.llm.width == 32 != asked.llm.width
    assert opened.notes == []  # nothing that was given is replaced


def test_what_is_not_here_is_assumed():
    """A plan needs no file: the config's sizes stand in for those of files elsewhere."""
    raw = config_lib.default()
    raw.init.llm = "someone/llm"
    opened = setup.open_here(config_lib.check(raw), "instruct")
    assert (opened.weight_sources, opened.config.run_stages) == ({}, ("instruct",))
    assert opened.config.llm.vocab_size == 512 and opened.config.init.llm == "someone/llm"
    assert opened.notes == [
        "not on this machine, so the config's sizes are used: someone/llm",
        "config.llm.vocab_size comes from the tokenizer; 512 is assumed",
    ]


def test_rows_a_tokenizer_and_a_reader_for_every_stage(tmp_path):
    runs.draw_rows(tmp_path)
    opened = setup.open_weights(config_lib.check(runs.small(tmp_path, tmp_path / "run")))
    data = setup.open_data(opened)
    assert list(data.readers) == list(opened.config.run_stages)
    whole, held_out = (len(data.reader("instruct", holdout).split) for holdout in (False, True))
    assert whole == len(data.readers["instruct"].split) > held_out > 0
    meta = {"data": data.source.fingerprint, "tokenizer": data.tokenizer.to_json()}
    again = setup.open_data(opened, meta)
    assert again.tokenizer.to_json() == data.tokenizer.to_json()
    assert refusal(setup.open_data, opened, meta | {"data": "other rows"}).startswith(
        f"{tmp_path}/run holds a run on other"
    )


def test_a_shortcut_from_a_block_that_is_not_there_is_refused():
    cfg = tiny_config()
    mesh = setup.mesh_of(cfg, jax.devices()[:1])
    setup.check_fits(cfg, mesh)
    deep = dataclasses.replace(cfg.shortcuts, density="explicit", vit_levels=(9,), llm_layers=(0,))
    assert "9" in refusal(setup.check_fits, dataclasses.replace(cfg, shortcuts=deep), mesh)


@pytest.mark.parametrize("made, remat", [(setup.shape, "full"), (setup.shape_for_inference, "none")])
def test_shapes_of_a_model(made, remat):
    cfg = tiny_config(llm=dict(remat="full"), top=dict(dtype="bfloat16"))
    shaped = made(cfg, setup.mesh_of(cfg, jax.devices()[:1]))
    assert (shaped.config.llm.remat, shaped.config.attention, shaped.model.dtype) == (remat, "tiled", jnp.bfloat16)
    assert shaped.model.intermediates == (("shortcut_ratio",) if made is setup.shape else ())
    assert shaped.shapes["llm/embedding"] == (64, 32)
    assert shaped.matrices["llm/embedding"] and not shaped.matrices["llm/norm/scale"]
    whole, frozen = (flatten(tree) for tree in (shaped.abstract(), shaped.abstract_at("align")))
    assert {leaf.dtype for leaf in whole.values()} == {jnp.dtype("float32")}
    assert frozen["vision/blocks/fc1/kernel"].dtype == jnp.bfloat16 and frozen["llm/norm/scale"].dtype == jnp.float32
    assert {leaf.sharding.mesh for leaf in frozen.values()} == {shaped.mesh}


# --- what a mesh asks of a config ---


def check(sizes, batches=(32, 64), **groups):
    """`check_mesh` of the tiny model, made so that four tensor devices can have it."""
    stages = {name: dict(batch_size=size) for name, size in zip(("align", "instruct"), batches, strict=True)}
    groups["vision"] = {"heads": 4, **groups.get("vision", {})}
    groups["llm"] = {"heads": 8, "kv_heads": 4, **groups.get("llm", {})}
    cfg = tiny_config(stages=stages, **groups)
    setup.check_mesh(cfg, dict(zip(sharding.MESH_AXES, sizes, strict=True)))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 8, 4), (2, 2, 8, 1), (1, 16, 1, 2)], ids=str)
def test_meshes_that_fit(sizes):
    check(sizes)


def test_a_vocabulary_that_is_not_known_yet_fits():
    check((1, 1, 1, 4), llm=dict(vocab_size=0))


def test_whole_kv_heads_fit_every_mesh():
    check((1, 1, 1, 8), vision=dict(heads=8), llm=dict(kv_heads=2, replicate_kv=True))


@pytest.mark.parametrize(
    "tensor, groups, sentence",
    [
        (3, {}, "config.vision.heads=4 cannot be sharded over mesh axis tensor=3; expected tensor=1 or 2 or 4"),
        (8, {}, "config.vision.heads=4 cannot be sharded over mesh axis tensor=8; expected tensor=1 or 2 or 4"),
        (4, dict(vision=dict(mlp_dim=42)), "config.vision.mlp_dim=42 cannot be sharded over mesh axis tensor=4; expected tensor=1 or 2"),
        (4, dict(llm=dict(heads=6, kv_heads=2)), "config.llm.heads=6 cannot be sharded over mesh axis tensor=4; expected tensor=1 or 2"),
        (4, dict(llm=dict(mlp_dim=50)), "config.llm.mlp_dim=50 cannot be sharded over mesh axis tensor=4; expected tensor=1 or 2"),
        (4, dict(llm=dict(vocab_size=99)), "config.llm.vocab_size=99 cannot be sharded over mesh axis tensor=4; expected tensor=1"),
        (
            2,
            dict(fusion=dict(name="cross_attention")),
            "config.vision.width // 64=1 cannot be sharded over mesh axis tensor=2; expected tensor=1",
        ),
        (
            4,
            dict(llm=dict(kv_heads=2)),
            "config.llm.kv_heads=2 cannot be sharded over mesh axis tensor=4; expected tensor=1 or 2, or "
            "config.llm.replicate_kv=True, which replicates them on every device",
        ),
    ],
)  # fmt: skip
def test_a_tensor_axis_that_does_not_fit(tensor, groups, sentence):
    assert refusal(lambda: check((1, 1, 1, tensor), **groups)) == sentence


@pytest.mark.parametrize(
    "sizes, batches, accumulate, sentence",
    [
        ((1, 8, 2, 1), (8, 64), 1, "align.batch_size / accumulate = 8 rows cannot be sharded over the 16 devices of mesh axes "
         "replica x data x fsdp; expected batch_size=16"),
        ((2, 2, 4, 2), (40, 64), 1, "align.batch_size / accumulate = 40 rows cannot be sharded over the 16 devices of mesh axes "
         "replica x data x fsdp; expected batch_size=32 or 48"),
        ((1, 1, 32, 1), (128, 64), 8, "align.batch_size / accumulate = 16 rows cannot be sharded over the 32 devices of mesh axes "
         "replica x data x fsdp; expected batch_size=256, or accumulate=4"),
        ((1, 1, 32, 1), (32, 40), 1, "instruct.batch_size / accumulate = 40 rows cannot be sharded over the 32 devices of mesh axes "
         "replica x data x fsdp; expected batch_size=32 or 64"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(sizes, batches, accumulate, sentence):
    cfg = tiny_config(stages={
        "align": dict(batch_size=batches[0], accumulate=accumulate), "instruct": dict(batch_size=batches[1]),
    })  # fmt: skip
    named = dict(zip(sharding.MESH_AXES, (*sizes[:3], 1), strict=True))
    assert refusal(setup.check_mesh, cfg, named) == f"config.stages.{sentence}"
