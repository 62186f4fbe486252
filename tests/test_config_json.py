"""Settings as config.json: what Hugging Face calls them, and that they come back as they were."""

import dataclasses

import pytest

from sparsecut_jax.settings import LLMConfig, RopeConfig, VisionConfig
from sparsecut_jax.weights.architecture import llm_settings, vision_settings
from sparsecut_jax.weights.config_json import llm_config_json, vision_config_json
from tiny import refusal

SIZES = dict(image_size=60, patch_size=5, width=48, layers=7, heads=3, mlp_dim=96, norm_eps=3e-6)


@pytest.mark.parametrize(
    "settings",
    [
        dict(family="clip", activation="quick_gelu", class_token=True, patch_bias=False, pre_norm=True),
        dict(family="clip", activation="gelu", class_token=True, patch_bias=False, pre_norm=True),
        dict(family="siglip", activation="gelu_tanh", class_token=False, patch_bias=True, pre_norm=False),
        dict(family="siglip2", activation="gelu_tanh", class_token=False, patch_bias=True, pre_norm=False),
        dict(family="dinov2", activation="gelu", class_token=True, patch_bias=True, pre_norm=False, layer_scale=True),
    ],
)
def test_towers_come_back(settings):
    cfg = VisionConfig(**SIZES | settings, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    config = vision_config_json(cfg, 5)
    found = vision_settings(config, "F", {"image_mean": list(cfg.mean), "image_std": list(cfg.std)})
    assert VisionConfig(**found) == dataclasses.replace(cfg, layers=5)


def test_config_json_of_a_tower():
    cfg = VisionConfig(**SIZES, activation="gelu_tanh")
    assert vision_config_json(cfg, 6) == {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_size": 48,
        "num_hidden_layers": 6, "num_attention_heads": 3, "num_channels": 3, "patch_size": 5,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 3e-6, "image_size": 60, "intermediate_size": 96,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict(family="clip", patch_bias=True),
            "a clip tower has class_token, patch_bias, pre_norm, layer_scale = (True, False, True, False), "
            "this one has (True, True, True, False); set config.vision.family to what the tower is",
        ),
        (
            dict(family="siglip"),
            "a siglip tower has class_token, patch_bias, pre_norm, layer_scale = (False, True, False, False), "
            "this one has (True, False, True, False); set config.vision.family to what the tower is",
        ),
        (
            dict(family="dinov2", patch_bias=True, pre_norm=False, layer_scale=True, mlp_dim=72),
            "a dinov2 tower needs an mlp_dim that is a multiple of its width; got 72 and 48",
        ),
    ],
)
def test_towers_that_their_family_cannot_say(settings, expected):
    assert refusal(vision_config_json, VisionConfig(**SIZES | settings), 5) == expected


LLM_SIZES = dict(
    vocab_size=320, width=48, layers=6, heads=6, kv_heads=2, head_dim=8, mlp_dim=72, norm_eps=2e-6, rope_theta=5e4,
    max_positions=256,
)  # fmt: skip
LINEAR = RopeConfig(kind="linear", factor=2.5)
LLAMA3 = RopeConfig(kind="llama3", factor=4.0, low_freq_factor=1.5, high_freq_factor=6.0, original_length=64)
LONGROPE = RopeConfig(
    kind="longrope",
    original_length=64,
    short_factor=(1.0, 1.25, 1.5, 2.0),
    long_factor=(1.5, 3.0, 6.0, 9.0),
    attention_factor=1.25,
)


@pytest.mark.parametrize(
    "settings",
    [
        dict(family="llama"),
        dict(family="llama", head_dim=12, tie_embeddings=True, activation="gelu_tanh"),
        dict(family="llama", rope=LINEAR),
        dict(family="llama", rope=LLAMA3),
        dict(family="llama", rope=LONGROPE),
        dict(family="mistral", sliding_window=17, head_dim=16),
        dict(family="mistral"),
        dict(family="qwen2", qkv_bias=True),
        dict(family="qwen2", qkv_bias=True, sliding_window=9, sliding_from=4, tie_embeddings=True),
        dict(family="qwen2", qkv_bias=True, sliding_window=9),
        dict(family="qwen3", qk_norm=True, head_dim=16),
        dict(family="qwen3", qk_norm=True, sliding_window=9, sliding_from=6),
        dict(family="phi3"),
        dict(family="phi3", sliding_window=33, rope=LONGROPE),
    ],
    ids=lambda s: " ".join(str(getattr(v, "kind", v)) for v in s.values()),
)
def test_llms_come_back(settings):
    cfg = LLMConfig(**LLM_SIZES | settings)
    config = llm_config_json(cfg, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    found = llm_settings(config, "F")
    assert LLMConfig(**found | {"rope": RopeConfig(**found["rope"])}) == cfg


def test_config_json_of_an_llm():
    cfg = LLMConfig(**LLM_SIZES, family="qwen2", qkv_bias=True, sliding_window=9, sliding_from=4)
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    assert llm_config_json(cfg, special) == {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 320, "hidden_size": 48,
        "intermediate_size": 72, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
        "hidden_act": "silu", "rms_norm_eps": 2e-6, "rope_theta": 5e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8, "max_position_embeddings": 256,
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4,
    }  # fmt: skip


def test_config_json_of_an_llm_without_a_window():
    config = llm_config_json(LLMConfig(**LLM_SIZES, family="qwen3", qk_norm=True), {})
    keys = ("use_sliding_window", "sliding_window", "max_window_layers")
    assert [config[key] for key in keys] == [False, None, 6]


@pytest.mark.parametrize(
    ("settings", "key", "family", "value"),
    [
        (dict(family="llama", qkv_bias=True), "qkv_bias=True", "llama", False),
        (dict(family="qwen2"), "qkv_bias=False", "qwen2", True),
        (dict(family="mistral", qk_norm=True), "qk_norm=True", "mistral", False),
        (dict(family="qwen3"), "qk_norm=False", "qwen3", True),
        (dict(family="llama", sliding_window=4), "sliding_window=4", "llama", 0),
        (dict(family="mistral", sliding_window=4, sliding_from=1), "sliding_from=1", "mistral", 0),
    ],
)
def test_llms_that_their_family_cannot_say(settings, key, family, value):
    expected = f"config.llm.{key} cannot be written as a {family} model, where it is {value}; set config.llm.family"
    assert refusal(llm_config_json, LLMConfig(**LLM_SIZES | settings), {}).startswith(expected)


def test_heads_of_a_phi3_model_make_up_its_width():
    text = refusal(llm_config_json, LLMConfig(**LLM_SIZES | dict(family="phi3", head_dim=16)), {})
    assert text == "a phi3 model needs head_dim = width / heads; got 16 and 48 / 6"
