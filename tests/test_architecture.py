"""config.json <-> settings, on the config.json of models that people have, cut to what says something."""

import dataclasses
import math

import pytest

from sparsecut_jax.settings import RopeConfig
from sparsecut_jax.weights.architecture import llm_settings, refuse_remote_code, vision_settings
from tiny import refusal

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ----------------------------------------------------------------------------------------------------------------------
# towers

CLIP_L_336 = {  # openai/clip-vit-large-patch14-336, written by transformers 4.21 with the keys of a text generator
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 49408},
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
        "bad_words_ids": None, "bos_token_id": None, "chunk_size_feed_forward": 0, "do_sample": False, "dropout": 0.0,
        "hidden_act": "quick_gelu", "hidden_size": 1024, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "image_size": 336, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
        "is_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "max_length": 20,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_beams": 1, "num_channels": 3,
        "num_hidden_layers": 24, "num_return_sequences": 1, "patch_size": 14, "projection_dim": 768,
        "pruned_heads": {}, "temperature": 1.0, "top_k": 50, "torch_dtype": None, "use_bfloat16": False,
    },
}  # fmt: skip
CLIP_B_32 = {  # a bare tower that leaves everything to the defaults of its class, ViT-B/32
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
}  # fmt: skip
LAION_H = {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K: gelu, and a model_type in the outer config alone
    "model_type": "clip",
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120,
        "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024,
    },
}  # fmt: skip
SIGLIP_SO400M = {  # google/siglip-so400m-patch14-384
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
    "vision_config": {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
SIGLIP2_NAFLEX = {  # google/siglip2-base-patch16-naflex
    "architectures": ["Siglip2Model"],
    "model_type": "siglip2",
    "text_config": {"model_type": "siglip2_text_model", "vocab_size": 256000},
    "vision_config": {
        "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-06, "model_type": "siglip2_vision_model", "num_attention_heads": 12, "num_channels": 3,
        "num_hidden_layers": 12, "num_patches": 256, "patch_size": 16,
    },
}  # fmt: skip
DINOV2_LARGE = {  # facebook/dinov2-large
    "apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": 518,
    "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4,
    "model_type": "dinov2", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
    "out_features": ["stage24"], "out_indices": [24], "patch_size": 14, "qkv_bias": True,
    "reshape_hidden_states": True, "torch_dtype": "float32", "use_swiglu_ffn": False,
}  # fmt: skip
LLAVA = {  # llava-hf/llava-1.5-7b-hf: both parts say no more than what differs from the defaults
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}  # fmt: skip


def tower(family, image_size, patch_size, width, layers, heads, mlp_dim, activation, norm_eps, mean, std) -> dict:
    return {
        "family": family, "image_size": image_size, "patch_size": patch_size, "width": width, "layers": layers,
        "heads": heads, "mlp_dim": mlp_dim, "activation": activation, "norm_eps": norm_eps, "mean": mean, "std": std,
        "class_token": family in ("clip", "dinov2"), "patch_bias": family != "clip", "pre_norm": family == "clip",
        "layer_scale": family == "dinov2",
    }  # fmt: skip


CLIP_L = tower("clip", 336, 14, 1024, 24, 16, 4096, "quick_gelu", 1e-5, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CLIP_L_336, CLIP_L),
        (LLAVA, CLIP_L),
        (CLIP_B_32, tower("clip", 224, 32, 768, 12, 12, 3072, "quick_gelu", 1e-5, CLIP_MEAN, CLIP_STD)),
        (LAION_H, tower("clip", 224, 14, 1280, 32, 16, 5120, "gelu", 1e-5, CLIP_MEAN, CLIP_STD)),
        (SIGLIP_SO400M, tower("siglip", 384, 14, 1152, 27, 16, 4304, "gelu_tanh", 1e-6, HALF, HALF)),
        (
            {"model_type": "siglip", "vision_config": {"image_size": 448}},  # whose parts say no type of their own
            tower("siglip", 448, 16, 768, 12, 12, 3072, "gelu_tanh", 1e-6, HALF, HALF),
        ),
        (SIGLIP2_NAFLEX, tower("siglip2", 256, 16, 768, 12, 12, 3072, "gelu_tanh", 1e-6, HALF, HALF)),
        (DINOV2_LARGE, tower("dinov2", 518, 14, 1024, 24, 16, 4096, "gelu", 1e-6, IMAGENET_MEAN, IMAGENET_STD)),
    ],
    ids=["clip", "llava", "bare clip", "laion", "siglip", "old siglip", "siglip2", "dinov2"],
)
def test_towers(config, expected):
    assert vision_settings(config, "config.json", {}) == expected


def test_the_image_processor_says_how_pixels_are_normalised():
    """SigLIP 2's tower under CLIP's numbers, say; whole numbers are numbers too."""
    processor = {"image_mean": [0, 0.25, 1], "image_std": [1, 0.5, 2], "do_resize": True, "size": {"height": 384}}
    found = vision_settings(SIGLIP_SO400M, "config.json", processor)
    assert (found["mean"], found["std"]) == ((0.0, 0.25, 1.0), (1.0, 0.5, 2.0))
    found = vision_settings(DINOV2_LARGE, "config.json", {"image_mean": None, "image_std": [0.5] * 3})
    assert (found["mean"], found["std"]) == (IMAGENET_MEAN, HALF)


@pytest.mark.parametrize(
    ("spelt", "activation"),
    [
        ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"), ("silu", "silu"), ("swish", "silu"),
    ],
)  # fmt: skip
def test_activations(spelt, activation):
    assert vision_settings(CLIP_B_32 | {"hidden_act": spelt}, "F", {})["activation"] == activation


TOWERS = "clip, clip_vision_model, siglip, siglip_vision_model, siglip2, siglip2_vision_model, dinov2"
ACTIVATIONS = "gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, quick_gelu, silu, swish"
SIGLIP2 = SIGLIP2_NAFLEX["vision_config"]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (CLIP_B_32, {"model_type": "vit"}, f"vision tower 'vit' is not supported; supported are {TOWERS}"),
        (CLIP_B_32, {"model_type": None}, f"vision tower None is not supported; supported are {TOWERS}"),
        (CLIP_B_32, {"model_type": ["clip"]}, f"vision tower ['clip'] is not supported; supported are {TOWERS}"),
        (LAION_H, {"vision_config": {"model_type": "swin"}},
         f"vision tower 'swin' is not supported; supported are {TOWERS}"),
        (CLIP_B_32, {"hidden_act": "relu"}, f"activation 'relu' is not supported; supported are {ACTIVATIONS}"),
        (CLIP_B_32, {"num_channels": 4}, "num_channels=4; expected 3"),
        (CLIP_B_32, {"image_size": [224, 168]}, "image_size and patch_size must be integers"),
        (CLIP_B_32, {"patch_size": [32, 32]}, "image_size and patch_size must be integers"),
        (DINOV2_LARGE, {"use_swiglu_ffn": True}, "use_swiglu_ffn=true (the giant size) is not supported"),
        (DINOV2_LARGE, {"qkv_bias": False}, "qkv_bias=false is not supported"),
        (SIGLIP2, {"num_patches": 200}, "num_patches=200 is not a square number"),
        (SIGLIP2, {"num_patches": -4}, "num_patches=-4 is not a square number"),
        (DINOV2_LARGE, {"model_type": "dinov2_with_registers"},
         f"vision tower 'dinov2_with_registers' is not supported; supported are {TOWERS}"),
    ],
)  # fmt: skip
def test_towers_that_are_not_supported(config, changes, expected):
    assert refusal(vision_settings, config | changes, "tower/config.json", {}) == f"tower/config.json: {expected}"


@pytest.mark.parametrize("value", ["big", None, 2.5, [768], {}, True])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_sizes_of_another_type(key, value):
    for config, read in ((CLIP_B_32, lambda c: vision_settings(c, "F", {})), (VICUNA, lambda c: llm_settings(c, "F"))):
        text = refusal(read, config | {key: value})
        assert text.startswith("F is not a valid configuration of a ") and key in text


@pytest.mark.parametrize("value", ["0.5", 0.5, [0.5, 0.5], [0.5] * 4, [None] * 3, ["a", "b", "c"], [math.nan] * 3])
@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_an_image_processor_that_says_something_else(key, value):
    expected = f"tower/preprocessor_config.json: {key}={value!r}; expected 3 numbers"
    assert refusal(vision_settings, CLIP_B_32, "tower/config.json", {key: value}) == expected


# ----------------------------------------------------------------------------------------------------------------------
# LLMs

VICUNA = {  # lmsys/vicuna-7b-v1.5: no rope_theta
    "_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
VICUNA_16K = VICUNA | {"rope_scaling": {"factor": 4.0, "type": "linear"}}  # lmsys/vicuna-7b-v1.5-16k
OFFICIAL_LLAVA = VICUNA | {  # liuhaotian/llava-v1.5-7b: Llama's keys beside LLaVA's own
    "model_type": "llava_llama", "freeze_mm_mlp_adapter": False, "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}  # fmt: skip
LLAMA_31 = {  # meta-llama/Llama-3.1-8B-Instruct
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {  # mistralai/Mistral-7B-v0.1
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN25 = {  # Qwen/Qwen2.5-7B: a window that is switched off
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {  # Qwen/Qwen3-1.7B: heads are wider than hidden_size / num_attention_heads; rope_theta is a whole number
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SHORT = [1.0 + i / 50 for i in range(48)]
LONG = [1.0 + i * i / 40 for i in range(48)]
PHI3_128K = {  # microsoft/Phi-3-mini-128k-instruct, its factors made up and its auto_map left out
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "rope_theta": 10000.0,
    "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip


def rope(kind: str = "default", **values) -> dict:
    return dataclasses.asdict(RopeConfig(kind=kind)) | values


def llm(family, vocab_size, width, layers, heads, kv_heads, head_dim, mlp_dim, max_positions, **more) -> dict:
    expected = {
        "family": family, "vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads,
        "kv_heads": kv_heads, "head_dim": head_dim, "mlp_dim": mlp_dim, "max_positions": max_positions,
        "activation": "silu", "norm_eps": 1e-5, "rope_theta": 1e4, "rope": rope(), "qkv_bias": False, "qk_norm": False,
        "sliding_window": 0, "sliding_from": 0, "tie_embeddings": False,
    }  # fmt: skip
    return expected | more


LLAMA3_ROPE = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
# 128k tokens are 32 times 4k: sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5 / 12)
PHI3_ROPE = rope(
    "longrope",
    original_length=4096,
    short_factor=tuple(SHORT),
    long_factor=tuple(LONG),
    attention_factor=pytest.approx(1.19023807, abs=1e-8),
)
VICUNA_7B = llm("llama", 32000, 4096, 32, 32, 32, 128, 11008, 4096)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VICUNA, VICUNA_7B),
        (VICUNA_16K, VICUNA_7B | {"rope": rope("linear", factor=4.0)}),
        (OFFICIAL_LLAVA, VICUNA_7B),
        (LLAVA, VICUNA_7B | {"vocab_size": 32064}),
        (LLAMA_31, llm("llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072, rope_theta=5e5, rope=LLAMA3_ROPE)),
        (MISTRAL, llm("mistral", 32000, 4096, 32, 32, 8, 128, 14336, 32768, sliding_window=4096)),
        (
            QWEN25,
            llm("qwen2", 152064, 3584, 28, 28, 4, 128, 18944, 131072, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True),
        ),
        (
            QWEN3,
            llm(
                "qwen3", 151936, 2048, 28, 16, 8, 128, 6144, 40960,
                norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tie_embeddings=True,
            ),
        ),
        (PHI3_128K, llm("phi3", 32064, 3072, 32, 32, 32, 96, 8192, 131072, rope=PHI3_ROPE, sliding_window=262144)),
        (SMOLLM2, llm("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, rope_theta=1e5, tie_embeddings=True)),
    ],
    ids=["vicuna", "16k", "official llava", "llava", "llama3.1", "mistral", "qwen2.5", "qwen3", "phi3", "smollm2"],
)  # fmt: skip
def test_llms(config, expected):
    assert llm_settings(config, "config.json") == expected


def test_the_newer_spelling_of_rope_is_the_older_one():
    older = {key: value for key, value in LLAMA_31.items() if key not in ("rope_scaling", "rope_theta")}
    newer = older | {"rope_parameters": {**LLAMA_31["rope_scaling"], "rope_theta": 500000.0}}
    assert llm_settings(newer, "F") == llm_settings(LLAMA_31, "F")
    assert newer["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_the_first_names_of_longrope_in_phi3(old):
    scaling = PHI3_128K["rope_scaling"] | {"type": old}
    assert llm_settings(PHI3_128K | {"rope_scaling": scaling}, "F")["rope"] == PHI3_ROPE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_position_embeddings": 4096}, 1.0),  # no longer than the original texts
        ({"max_position_embeddings": 8192}, math.sqrt(1 + 1 / 12)),
        ({"rope_scaling": PHI3_128K["rope_scaling"] | {"factor": 64.0}}, math.sqrt(1 + 6 / 12)),
        ({"rope_scaling": PHI3_128K["rope_scaling"] | {"attention_factor": 1.5}}, 1.5),
    ],
)
def test_attention_factor_of_longrope(changes, expected):
    assert llm_settings(PHI3_128K | changes, "F")["rope"]["attention_factor"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "changes", "window", "first"),
    [
        (MISTRAL, {"sliding_window": None}, 0, 0),
        (VICUNA, {"sliding_window": 4096}, 0, 0),  # a Llama has none, whatever the file says
        (VICUNA, {"sliding_window": 4096, "use_sliding_window": True}, 0, 0),
        (PHI3_128K, {"sliding_window": None}, 0, 0),
        (QWEN25, {"use_sliding_window": True, "sliding_window": 4096}, 4096, 28),
        (QWEN25, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3}, 4096, 3),
        (QWEN25, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 99}, 4096, 28),
        (QWEN25, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, 4096, 0),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 10}, 512, 10),
        (QWEN3, {"layer_types": ["full_attention"] * 28}, 0, 0),
        (
            QWEN3,
            {
                "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 26,
                "layer_types": ["full_attention"] * 26 + ["sliding_attention"] * 2,
            },
            512,
            26,
        ),
    ],
)  # fmt: skip
def test_windows(config, changes, window, first):
    found = llm_settings(config | changes, "F")
    assert (found["sliding_window"], found["sliding_from"]) == (window, first)


@pytest.mark.parametrize(("outer", "inner", "tied"), [(True, False, True), (False, True, False), (None, True, True)])
def test_a_whole_model_says_whether_the_head_is_tied(outer, inner, tied):
    config = LLAVA | {"text_config": LLAVA["text_config"] | {"tie_word_embeddings": inner}}
    config = {**config, "tie_word_embeddings": outer}
    assert llm_settings(config, "F")["tie_embeddings"] is tied


def test_a_text_config_without_a_type_is_llamas():
    config = LLAVA | {"text_config": {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}}
    assert llm_settings(config, "F") == VICUNA_7B | {"vocab_size": 32064}


LLMS = "llama, mistral, qwen2, qwen3, phi3, llava, llava_llama, llava_mistral, llava_qwen"
KINDS = "supported are default, linear, llama3 and longrope"
MIXED = ["sliding_attention", "full_attention"] * 14


def scaled(kind: str, **values) -> dict:
    """`rope_parameters` of a kind; of llama3 those of Llama 3.1."""
    more = LLAMA_31["rope_scaling"] if kind == "llama3" else {}
    return {"rope_parameters": {"rope_theta": 1e4, **more, "rope_type": kind, **values}}


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (VICUNA, {"model_type": "gemma"}, f"language model 'gemma' is not supported; supported are {LLMS}"),
        (VICUNA, {"model_type": None}, f"language model None is not supported; supported are {LLMS}"),
        (VICUNA, {"model_type": {"a": 1}}, f"language model {{'a': 1}} is not supported; supported are {LLMS}"),
        (LLAVA, {"text_config": {"model_type": "opt"}}, f"language model 'opt' is not supported; supported are {LLMS}"),
        (VICUNA, {"hidden_act": "relu"}, f"activation 'relu' is not supported; supported are {ACTIVATIONS}"),
        (VICUNA, {"attention_bias": True}, "attention_bias=true is not supported"),
        (QWEN3, {"attention_bias": True}, "attention_bias=true is not supported"),
        (VICUNA, {"mlp_bias": True}, "mlp_bias=true is not supported"),
        (QWEN25, {"num_attention_heads": 0}, "num_attention_heads=0; expected at least 1"),
        (VICUNA, scaled("yarn", factor=4.0), f"rope_type='yarn' is not supported; {KINDS}"),
        (VICUNA, scaled("dynamic", factor=4.0), f"rope_type='dynamic' is not supported; {KINDS}"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         f"rope_type='yarn' is not supported; {KINDS}"),
        (PHI3_128K, {"rope_scaling": None, "partial_rotary_factor": 0.75},
         "partial_rotary_factor=0.75 is not supported; expected 1.0"),
        (VICUNA, scaled("default", rope_theta="big"), "rope_theta='big'; expected a positive number"),
        (VICUNA, scaled("default", rope_theta=None), "rope_theta=None; expected a positive number"),
        (VICUNA, scaled("default", rope_theta=0.0), "rope_theta=0.0; expected a positive number"),
        (VICUNA, scaled("linear", factor="4"), "factor='4'; expected a positive number"),
        (VICUNA, scaled("linear", factor=-2.0), "factor=-2.0; expected a positive number"),
        (VICUNA, scaled("linear", factor=0), "factor=0; expected a positive number"),
        (VICUNA, scaled("linear", factor=math.inf), "factor=inf; expected a positive number"),
        (VICUNA, scaled("llama3", factor=True), "factor=True; expected a positive number"),
        (VICUNA, scaled("llama3", low_freq_factor=0), "low_freq_factor=0; expected a positive number"),
        (VICUNA, scaled("llama3", low_freq_factor=4.0), "low_freq_factor=4.0; expected less than high_freq_factor=4.0"),
        (VICUNA, scaled("llama3", original_max_position_embeddings=-1),
         "original_max_position_embeddings=-1; expected a positive number"),
        (PHI3_128K, {"original_max_position_embeddings": 1},
         "original_max_position_embeddings=1; expected more than 1"),
        (PHI3_128K, {"rope_scaling": PHI3_128K["rope_scaling"] | {"factor": -1.0}},
         "factor=-1.0; expected a positive number"),
        (PHI3_128K, {"rope_scaling": PHI3_128K["rope_scaling"] | {"short_factor": [0.0] * 48}},
         "short_factor=0.0; expected a positive number"),
        (LLAMA_31, scaled("longrope", short_factor=[1.0] * 64, long_factor=[1.0] * 3,
                          original_max_position_embeddings=8192), "long_factor=[1.0, 1.0, 1.0]; expected 64 numbers"),
        (QWEN25, {"layer_types": MIXED},
         f"layer_types={MIXED} is not supported; expected a window from max_window_layers on"),
    ],
)  # fmt: skip
def test_llms_that_are_not_supported(config, changes, expected):
    if "rope_parameters" in changes:
        config = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    assert refusal(llm_settings, config | changes, "llm/config.json") == f"llm/config.json: {expected}"


AUTO_MAP = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}


@pytest.mark.parametrize(
    "config",
    [
        PHI3_128K | AUTO_MAP,
        PHI3_128K | {"auto_map": {}},
        LLAVA | {"text_config": LLAVA["text_config"] | AUTO_MAP},
        LLAVA | {"vision_config": LLAVA["vision_config"] | AUTO_MAP},
    ],
)
def test_code_of_the_checkpoint_is_never_run(config):
    expected = "F: 'auto_map' asks for code in the checkpoint, which is never run"
    assert refusal(refuse_remote_code, config, "F").startswith(expected)
    assert refusal(llm_settings, config, "F").startswith(expected)
    assert refusal(vision_settings, config, "F", {}).startswith(expected)


@pytest.mark.parametrize("config", [VICUNA, LLAVA, LLAVA | {"text_config": None}, LLAVA | {"vision_config": "clip"}])
def test_what_has_no_code_is_not_refused_for_it(config):
    assert refuse_remote_code(config, "F") is None
