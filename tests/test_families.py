"""Hugging Face names of towers, LLMs and fusions."""

import pytest

from sparsecut_jax.models import ways
from sparsecut_jax.models.rules import LINEAR, Rule
from sparsecut_jax.weights import families
from sparsecut_jax.weights.families import part_and_name, rules_of
from tiny import tiny_config


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vision_model.encoder.layers.3.layer_norm2.weight", ("vision", "encoder.layers.3.layer_norm2.weight")),
        ("vision_tower.vision_model.pre_layrnorm.bias", ("vision", "pre_layrnorm.bias")),
        ("model.vision_tower.vision_model.embeddings.class_embedding", ("vision", "embeddings.class_embedding")),
        ("model.vision_tower.vision_tower.vision_model.head.probe", ("vision", "head.probe")),
        ("dinov2.encoder.layer.0.norm1.weight", ("vision", "encoder.layer.0.norm1.weight")),
        ("embeddings.cls_token", ("vision", "embeddings.cls_token")),
        ("language_model.model.layers.11.mlp.up_proj.weight", ("llm", "model.layers.11.mlp.up_proj.weight")),
        ("model.language_model.layers.11.mlp.up_proj.weight", ("llm", "model.layers.11.mlp.up_proj.weight")),
        ("model.language_model.embed_tokens.weight", ("llm", "model.embed_tokens.weight")),
        ("language_model.lm_head.weight", ("llm", "lm_head.weight")),
        ("lm_head.weight", ("llm", "lm_head.weight")),
        ("model.norm.weight", ("llm", "model.norm.weight")),
        ("model.mm_projector.mlp.0.weight", ("fusion", "mm_projector.0.weight")),
        ("mm_projector.2.bias", ("fusion", "mm_projector.2.bias")),
        ("model.multi_modal_projector.linear_1.bias", ("fusion", "multi_modal_projector.linear_1.bias")),
        ("model.multi_modal_projector.2.attn.in_proj_bias", ("fusion", "multi_modal_projector.2.attn.in_proj_bias")),
        ("fusion.inject.gate", ("fusion", "fusion.inject.gate")),
        ("fusions.gate", (None, "fusions.gate")),
        ("text_model.encoder.layers.0.mlp.fc1.weight", (None, "text_model.encoder.layers.0.mlp.fc1.weight")),
        ("blk.0.attn_q.bias", (None, "blk.0.attn_q.bias")),
    ],
)
def test_part_and_short_name(name, expected):
    assert part_and_name(name) == expected


@pytest.mark.parametrize(
    "table, path, name",
    [
        (families.CLIP, "vision/blocks/attention/out_bias", "encoder.layers.{i}.self_attn.out_proj.bias"),
        (families.DINOV2, "vision/blocks/attention/k_kernel", "encoder.layer.{i}.attention.attention.key.weight"),
        (families.DINOV2, "vision/blocks/scale2", "encoder.layer.{i}.layer_scale2.lambda1"),
        (families.LLAMA, "llm/layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight"),
        (families.LLAMA, "llm/layers/attention/q_norm/scale", "model.layers.{i}.self_attn.q_norm.weight"),
        (families.PHI3, "llm/layers/attention/v", "model.layers.{i}.self_attn.qkv_proj.weight"),
        (families.PHI3, "llm/layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight"),
    ],
)
def test_tables(table, path, name):
    assert [rule.name for rule in table if rule.path == path] == [name]


def test_no_table_names_a_parameter_twice():
    tables = [*families.TOWERS.values(), *families.LLMS.values()]
    tables += [table for way in ways.FUSING for table in families.tables_of(way).values()]
    for table in tables:
        assert len({rule.path for rule in table}) == len(table)


def test_a_towers_patch_kernel_gets_the_size_of_its_patches():
    rules = {rule.path: rule for rule in rules_of("vision", tiny_config())}
    assert rules["vision/patch_embedding/kernel"].sizes == (("y", 4), ("x", 4))
    assert rules["vision/position_embedding"].sizes == ()


# --- fusions ---

FFN, FC1, GATE = "fusion/fuse/ffn2/kernel", "fusion/fuse/projector/fc1/kernel", "fusion/inject/gate"
OFFICIAL, OURS, MANY = (
    "mm_projector.0.weight",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.0.linear_1.weight",
)


@pytest.mark.parametrize(
    "shared, names, fc1, ffn",
    [
        (True, (), OURS, "multi_modal_projector.ffn.2.weight"),  # to be written
        (True, (OURS,), OURS, "multi_modal_projector.ffn.2.weight"),
        (True, (OFFICIAL,), OFFICIAL, "mm_projector.ffn.2.weight"),
        (False, (), "multi_modal_projector.{i}.linear_1.weight", "multi_modal_projector.{i}.ffn.2.weight"),
        (False, (MANY,), "multi_modal_projector.{i}.linear_1.weight", "multi_modal_projector.{i}.ffn.2.weight"),
        (False, (OFFICIAL,), OFFICIAL, "mm_projector.ffn.2.weight"),
    ],
)
def test_names_of_a_fusion(shared, names, fc1, ffn):
    """By the file; what no table names is stored as it is. An official file's only set serves every level."""
    cfg = tiny_config(fusion=dict(name="cross_attention", shared=shared))
    rules = {rule.path: rule for rule in rules_of("fusion", cfg, [FC1, FFN, GATE, "llm/norm/scale"], names)}
    every = not shared and OFFICIAL in names
    assert rules[FC1] == Rule(FC1, fc1, LINEAR, repeated=every)
    assert rules[FFN] == Rule(FFN, ffn, LINEAR, repeated=every)
    assert rules[FFN].stacked is not shared
    assert rules[GATE] == Rule(GATE, "fusion.inject.gate")
    assert "llm/norm/scale" not in rules


def test_a_way_without_tables_is_stored_as_it_is(monkeypatch):
    monkeypatch.delattr(ways.FUSING["mlp"], "RULES")
    cfg = tiny_config(fusion=dict(name="mlp", shared=False))
    assert rules_of("fusion", cfg, [GATE, FC1]) == [
        Rule(GATE, "fusion.inject.gate"),
        Rule(FC1, "fusion.fuse.projector.fc1.kernel"),
    ]
