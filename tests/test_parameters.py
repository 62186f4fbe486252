"""Paths of parameters, and which of them are matrices."""

import re

import jax.numpy as jnp
import pytest
from flax import linen as nn

from sparsecut_jax.models.layers import ones, weight
from sparsecut_jax.models.parameters import is_matrix, join, matrices, split
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import UserError
from tiny import matrices_of, tiny_config

PARAMS = {
    "vision": {"pre_norm": {"scale": 1}, "blocks": {"fc1": {"kernel": 2, "bias": 3}}},
    "fusion": {"fuse": {"projector": {"fc1": {"kernel": 4}}}},
    "llm": {"embedding": 5, "layers": {"attention": {"q": 6}}},
}
VISION = {"vision/pre_norm/scale": 1, "vision/blocks/fc1/kernel": 2, "vision/blocks/fc1/bias": 3}
FUSION = {"fusion/fuse/projector/fc1/kernel": 4}
LLM = {"llm/embedding": 5, "llm/layers/attention/q": 6}


@pytest.mark.parametrize(
    "patterns, trainable, frozen",
    [
        (("fusion/.*",), FUSION, VISION | LLM),
        (("fusion/.*", "llm/.*"), FUSION | LLM, VISION),
        ((".*",), VISION | FUSION | LLM, {}),
        ((".*bias", "llm/embedding"), {"vision/blocks/fc1/bias": 3, "llm/embedding": 5}, None),
        ((), {}, VISION | FUSION | LLM),
    ],
)
def test_split(patterns, trainable, frozen):
    moving, rest = split(PARAMS, patterns)
    assert moving == trainable
    assert rest == (
        {k: v for k, v in (VISION | FUSION | LLM).items() if k not in trainable} if frozen is None else frozen
    )
    assert join(rest, moving) == PARAMS


@pytest.mark.parametrize("pattern", ["fusion", "fusion/fuse", "lm/.*", "llm/layers/.*/bias"])
def test_a_pattern_matches_the_whole_path_of_something(pattern):
    sentence = f"trainable={pattern!r} matches no parameter; paths look like vision/pre_norm/scale, "
    with pytest.raises(UserError, match=re.escape(sentence)):
        split(PARAMS, ("llm/.*", pattern))


# --- matrices ---

TOWER = {
    "vision/patch_embedding/kernel": True,
    "vision/position_embedding": True,
    "vision/blocks/attention/q_kernel": True,
    "vision/blocks/attention/k_kernel": True,
    "vision/blocks/attention/v_kernel": True,
    "vision/blocks/attention/out_kernel": True,
    "vision/blocks/fc1/kernel": True,
    "vision/blocks/fc2/kernel": True,
    "vision/blocks/norm1/scale": False,
    "vision/blocks/norm1/bias": False,
    "vision/blocks/norm2/scale": False,
    "vision/blocks/norm2/bias": False,
    "vision/blocks/attention/q_bias": False,
    "vision/blocks/attention/k_bias": False,
    "vision/blocks/attention/v_bias": False,
    "vision/blocks/attention/out_bias": False,
    "vision/blocks/fc1/bias": False,
    "vision/blocks/fc2/bias": False,
}
PATCH_BIAS = {"vision/patch_embedding/bias": False}
CLASS_TOKEN = {"vision/class_embedding": False}
CLIP = {**TOWER, **CLASS_TOKEN, "vision/pre_norm/scale": False, "vision/pre_norm/bias": False}
SIGLIP = {**TOWER, **PATCH_BIAS}
DINOV2 = {
    **TOWER, **CLASS_TOKEN, **PATCH_BIAS, "vision/blocks/scale1": False, "vision/blocks/scale2": False,
}  # fmt: skip
PROJECTOR = {
    "fusion/fuse/projector/fc1/kernel": True,
    "fusion/fuse/projector/fc1/bias": False,
    "fusion/fuse/projector/fc2/kernel": True,
    "fusion/fuse/projector/fc2/bias": False,
}
CROSS_ATTENTION = {
    **PROJECTOR,
    "fusion/fuse/attention/q_kernel": True,
    "fusion/fuse/attention/k_kernel": True,
    "fusion/fuse/attention/v_kernel": True,
    "fusion/fuse/attention/out_kernel": True,
    "fusion/fuse/attention/q_bias": False,
    "fusion/fuse/attention/k_bias": False,
    "fusion/fuse/attention/v_bias": False,
    "fusion/fuse/attention/out_bias": False,
    "fusion/fuse/norm1/scale": False,
    "fusion/fuse/norm1/bias": False,
    "fusion/fuse/norm2/scale": False,
    "fusion/fuse/norm2/bias": False,
    "fusion/fuse/ffn1/kernel": True,
    "fusion/fuse/ffn1/bias": False,
    "fusion/fuse/ffn2/kernel": True,
    "fusion/fuse/ffn2/bias": False,
}
TIED = {
    "llm/embedding": True,
    "llm/norm/scale": False,
    "llm/layers/norm1/scale": False,
    "llm/layers/norm2/scale": False,
    "llm/layers/attention/q": True,
    "llm/layers/attention/k": True,
    "llm/layers/attention/v": True,
    "llm/layers/attention/out": True,
    "llm/layers/mlp/gate/kernel": True,
    "llm/layers/mlp/up/kernel": True,
    "llm/layers/mlp/down/kernel": True,
}
LLAMA = {**TIED, "llm/head": True}
QWEN2 = {
    **LLAMA,
    "llm/layers/attention/q_bias": False,
    "llm/layers/attention/k_bias": False,
    "llm/layers/attention/v_bias": False,
}
QWEN3 = {**LLAMA, "llm/layers/attention/q_norm/scale": False, "llm/layers/attention/k_norm/scale": False}
LORA = {
    "llm/head_lora_a": True,
    "llm/head_lora_b": True,
    "llm/layers/attention/q_lora_a": True,
    "llm/layers/attention/q_lora_b": True,
    "llm/layers/attention/k_lora_a": True,
    "llm/layers/attention/k_lora_b": True,
    "llm/layers/attention/v_lora_a": True,
    "llm/layers/attention/v_lora_b": True,
    "llm/layers/attention/out_lora_a": True,
    "llm/layers/attention/out_lora_b": True,
    "llm/layers/mlp/gate_lora_a": True,
    "llm/layers/mlp/gate_lora_b": True,
    "llm/layers/mlp/up_lora_a": True,
    "llm/layers/mlp/up_lora_b": True,
    "llm/layers/mlp/down_lora_a": True,
    "llm/layers/mlp/down_lora_b": True,
}
SIGLIP_SETTINGS = dict(family="siglip", class_token=False, patch_bias=True, pre_norm=False)
DINOV2_SETTINGS = dict(family="dinov2", patch_bias=True, pre_norm=False, layer_scale=True)


@pytest.mark.parametrize(
    "groups, expected",
    [
        (dict(), CLIP | PROJECTOR | LLAMA),
        (dict(fusion=dict(shared=False), llm=dict(tie_embeddings=True)), CLIP | PROJECTOR | TIED),
        (dict(vision=SIGLIP_SETTINGS, fusion=dict(name="mlp"), llm=dict(qkv_bias=True)), SIGLIP | PROJECTOR | QWEN2),
        (
            dict(vision=SIGLIP_SETTINGS, fusion=dict(name="mlp"), llm=dict(qkv_bias=True, replicate_kv=True)),
            SIGLIP | PROJECTOR | QWEN2,
        ),
        (
            dict(vision=DINOV2_SETTINGS, fusion=dict(name="cross_attention"), llm=dict(qk_norm=True)),
            DINOV2 | CROSS_ATTENTION | QWEN3,
        ),
        (
            dict(fusion=dict(name="cross_attention", shared=False), lora=dict(rank=2, targets=("llm/.*",))),
            CLIP | CROSS_ATTENTION | LLAMA | LORA,
        ),
    ],
    ids=["clip llama", "tied, a fusion for each level", "siglip qwen2", "replicated kv", "dinov2 qwen3", "lora"],
)
def test_matrices_of_a_model(groups, expected):
    """Every path of every kind of part."""
    assert matrices_of(build_model(tiny_config(**groups))) == expected


@pytest.mark.parametrize(
    "axes, expected",
    [
        ((), False),  # a scalar gate
        (("sites",), False),  # a gate per site
        (("layers", "levels"), False),  # a scalar per layer and level
        (("sites", "norm"), False),
        (("sites", "heads", "head_dim"), False),  # biases of queries
        ((None, "embed"), True),
        (("sites", "embed", "heads", "head_dim"), True),
        (("levels", "embed", "rank"), True),
    ],
)
def test_stacks_and_parts_of_heads_make_no_matrix(axes, expected):
    assert is_matrix(axes) is expected


def test_a_parameter_without_named_axes_is_refused():
    class Nameless(nn.Module):
        @nn.compact
        def __call__(self):
            return weight(self, "gate", (), (), ones) * self.param("kernel", ones, (2, 2))

    params = nn.Module.init(Nameless(), jnp.zeros(2, jnp.uint32))["params"]
    with pytest.raises(ValueError, match="parameter kernel has no logical axes; make it with models.layers.weight"):
        matrices(params)
    del params["kernel"]
    assert matrices(params) == {"gate": False}
