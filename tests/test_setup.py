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
