"""Parameter counts of the paper's models, from shapes alone, against published ones."""

import jax
import pytest
from flax import linen as nn

from sparsecut_jax import config
from sparsecut_jax.runs.parameters import boxed_shapes
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.weights.architecture import llm_settings, vision_settings

# config.json of openai/clip-vit-large-patch14-336 and lmsys/vicuna-{7,13}b-v1.5, as far as sizes go.
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA = {
    "7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
}  # fmt: skip
BLOCK = 12_596_224
POST_NORM = 2 * 1024


def sizes(llm: str, fusion: str = "channel", density: str = "sparse", select_layer: int = -2) -> dict[str, int]:
    raw = config.default()
    raw.vision.update(vision_settings(CLIP, "config.json", {}), select_layer=select_layer)
    raw.llm.update(llm_settings(VICUNA[llm], "config.json"))
    raw.fusion.name, raw.shortcuts.density = fusion, density
    cfg = config.check(raw)
    model = build_model(cfg)
    shapes = boxed_shapes(model, cfg.data.max_images)
    return {part: sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes[part]))) for part in shapes}


def test_the_tower():
    whole = sizes("7b", density="none", select_layer=-1)["vision"]
    assert whole + POST_NORM == 303_507_456
    # LLaVA's main feature needs no top block; the paper's plan takes its deepest level from it.
    assert sizes("7b", density="none")["vision"] == whole - BLOCK == 290_909_184
    assert sizes("7b", density="sparse")["vision"] == whole


@pytest.mark.parametrize("llm, expected", [("7b", 6_738_415_616), ("13b", 13_015_864_320)])
def test_the_llm(llm, expected):
    assert sizes(llm)["llm"] == expected


@pytest.mark.parametrize(
    "fusion, small, large",
    [
        ("channel", 37_756_928, 52_439_040),
        ("cross_attention", 33_575_936, 44_063_744),
        ("mlp", 20_979_712, 31_467_520),
    ],
)
def test_the_adapters(fusion, small, large):
    assert sizes("7b", fusion)["fusion"] == small
    assert sizes("13b", fusion)["fusion"] == large
