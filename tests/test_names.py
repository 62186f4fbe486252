"""Hugging Face names, and where in a tensor the numbers of a parameter stand."""

import itertools

import numpy as np
import pytest

from sparsecut_jax.weights import names
from sparsecut_jax.weights.names import Rule, canonical, part_rows, their_shape, their_slices, to_ours, to_theirs
from tiny import tiny_config

CFG = tiny_config(llm=dict(heads=4, kv_heads=2, head_dim=8, mlp_dim=48), vision=dict(width=24, heads=2))


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
        ("text_model.encoder.layers.0.mlp.fc1.weight", (None, "text_model.encoder.layers.0.mlp.fc1.weight")),
        ("blk.0.attn_q.bias", (None, "blk.0.attn_q.bias")),
    ],
)
def test_canonical_names(name, expected):
    assert canonical(name) == expected


@pytest.mark.parametrize(
    "table, path, name",
    [
        (names.CLIP, "vision/blocks/attention/out_bias", "encoder.layers.{i}.self_attn.out_proj.bias"),
        (names.DINOV2, "vision/blocks/attention/k_kernel", "encoder.layer.{i}.attention.attention.key.weight"),
        (names.DINOV2, "vision/blocks/scale2", "encoder.layer.{i}.layer_scale2.lambda1"),
        (names.LLAMA, "llm/layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight"),
        (names.LLAMA, "llm/layers/attention/q_norm/scale", "model.layers.{i}.self_attn.q_norm.weight"),
        (names.PHI3, "llm/layers/attention/v", "model.layers.{i}.self_attn.qkv_proj.weight"),
        (names.PHI3, "llm/layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight"),
        (names.PROJECTORS["mm_projector"], "fusion/fuse/ffn2/bias", "mm_projector.ffn.2.bias"),
        (
            names.PROJECTORS["multi_modal_projector.{k}"],
            "fusion/fuse/projector/fc1/kernel",
            "multi_modal_projector.{k}.linear_1.weight",
        ),
    ],
)
def test_tables(table, path, name):
    assert [rule.name for rule in table if rule.path == path] == [name]


def test_no_table_names_a_parameter_twice():
    for table in (names.CLIP, names.SIGLIP2, names.DINOV2, names.LLAMA, names.PHI3, *names.PROJECTORS.values()):
        assert len({rule.path for rule in table}) == len(table)


def test_a_query_kernel_by_its_numbers():
    """Row q * 8 + h of torch's matrix is head q, element h."""
    rule = next(r for r in names.LLAMA if r.path == "llm/layers/attention/q")
    theirs = np.arange(32 * 32).reshape(32, 32)
    ours = to_ours(theirs, rule, CFG)
    assert ours.shape == (32, 4, 8)
    assert ours[5, 3, 2] == theirs[3 * 8 + 2, 5]


def test_a_patch_kernel_by_its_numbers():
    """Of a patch, pixel (y, x) and channel c is input (y * 4 + x) * 3 + c."""
    theirs = np.arange(24 * 3 * 4 * 4).reshape(24, 3, 4, 4)
    ours = to_ours(theirs, names.CLIP[1], CFG)
    assert ours.shape == (48, 24)
    assert ours[(2 * 4 + 3) * 3 + 1, 7] == theirs[7, 1, 2, 3]


def test_packed_rows_of_phi3():
    rows = {n: next(r for r in names.PHI3 if r.path.endswith(f"attention/{n}")) for n in "qkv"}
    assert part_rows(rows["q"], CFG) == [32, 16, 16]
    assert their_shape((32, 2, 8), rows["v"], CFG) == (64, 32)
    theirs, _ = their_slices((slice(None),) * 3, (32, 2, 8), rows["v"], CFG)
    assert theirs == (slice(48, 64), slice(0, 32))


LAYOUTS = {
    "linear": (Rule("llm/x", "x", names.LINEAR), (32, 48)),
    "heads_in": (Rule("llm/x", "x", names.HEADS_IN), (32, 4, 8)),
    "heads_out": (Rule("llm/x", "x", names.HEADS_OUT), (4, 8, 32)),
    "heads_bias": (Rule("llm/x", "x", names.HEADS_BIAS), (4, 8)),
    "patches": (names.CLIP[1], (48, 24)),
    "packed": (Rule("llm/x", "x", names.HEADS_IN, 1, "qkv"), (32, 2, 8)),
    "token": (names.DINOV2[0], (24,)),
    "same": (Rule("llm/x", "x"), (6, 32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_slice_is_read_as_cut_from_the_whole(layout):
    """For each axis all, the first half or the second, in every combination; and nothing more is read than asked
    for where an axis of ours is one of theirs."""
    rule, shape = LAYOUTS[layout]
    theirs = np.random.default_rng(0).standard_normal(their_shape(shape, rule, CFG))
    rows = part_rows(rule, CFG)
    start = sum(rows[: rule.part])
    alone = theirs[start : start + rows[rule.part]] if rows else theirs
    whole = to_ours(alone, rule, CFG)
    assert whole.shape == shape
    np.testing.assert_array_equal(to_theirs(whole, rule, CFG), alone)
    halves = [(slice(None), slice(0, n // 2), slice(n // 2, n)) for n in shape]
    for index in itertools.product(*halves):
        where, keep = their_slices(index, shape, rule, CFG)
        np.testing.assert_array_equal(to_ours(theirs[where], rule, CFG)[keep], whole[index])


@pytest.mark.parametrize(
    "layout, index, expected",
    [
        ("linear", (slice(0, 4), slice(8, 16)), (slice(8, 16), slice(0, 4))),
        ("heads_in", (slice(0, 4), slice(2, 3), slice(None)), (slice(16, 24), slice(0, 4))),
        ("heads_out", (slice(2, 3), slice(None), slice(0, 4)), (slice(0, 4), slice(16, 24))),
        ("patches", (slice(None), slice(0, 3)), (slice(0, 3), slice(0, 3), slice(0, 4), slice(0, 4))),
        ("packed", (slice(0, 4), slice(1, 2), slice(None)), (slice(40, 48), slice(0, 4))),
    ],
)
def test_what_a_device_reads(layout, index, expected):
    """embed (fsdp) and heads or mlp (tensor) are cut in the file: no device reads its neighbour's part."""
    rule, shape = LAYOUTS[layout]
    assert their_slices(index, shape, rule, CFG)[0] == expected
