"""Tensor names of the towers and LLMs that are read and written, one table per family, and what else files may hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable

from sparsecut_jax.models import ways
from sparsecut_jax.models.rules import (
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    LLAVA,
    Rule,
    Tables,
    attention,
    linear,
    norm,
)
from sparsecut_jax.settings import Config

PATCHES = "o i y x -> (y x i) o"
_BLOCK, _CLIP = "vision/blocks", "encoder.layers.{i}"
CLIP = [
    Rule("vision/class_embedding", "embeddings.class_embedding"),
    Rule("vision/patch_embedding/kernel", "embeddings.patch_embedding.weight", PATCHES),
    Rule("vision/patch_embedding/bias", "embeddings.patch_embedding.bias"),
    Rule("vision/position_embedding", "embeddings.position_embedding.weight"),
    *norm("vision/pre_norm", "pre_layrnorm"),
    *norm(f"{_BLOCK}/norm1", f"{_CLIP}.layer_norm1"),
    *norm(f"{_BLOCK}/norm2", f"{_CLIP}.layer_norm2"),
    *attention(f"{_BLOCK}/attention", {n: f"{_CLIP}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}),
    *linear(f"{_BLOCK}/fc1", f"{_CLIP}.mlp.fc1"),
    *linear(f"{_BLOCK}/fc2", f"{_CLIP}.mlp.fc2"),
]
SIGLIP2 = [  # its image processor cuts the patches, already in our order
    Rule(rule.path, rule.name, LINEAR) if rule.path == "vision/patch_embedding/kernel" else rule for rule in CLIP
]
_DINO = "encoder.layer.{i}"
_DINO_ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "output.dense"}
DINOV2 = [
    Rule("vision/class_embedding", "embeddings.cls_token", "1 1 c -> c"),
    Rule("vision/patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", PATCHES),
    Rule("vision/patch_embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("vision/position_embedding", "embeddings.position_embeddings", "1 p c -> p c"),
    *norm(f"{_BLOCK}/norm1", f"{_DINO}.norm1"),
    *norm(f"{_BLOCK}/norm2", f"{_DINO}.norm2"),
    *attention(f"{_BLOCK}/attention", {ours: f"{_DINO}.attention.{n}" for ours, n in _DINO_ATTENTION.items()}),
    *linear(f"{_BLOCK}/fc1", f"{_DINO}.mlp.fc1"),
    *linear(f"{_BLOCK}/fc2", f"{_DINO}.mlp.fc2"),
    Rule(f"{_BLOCK}/scale1", f"{_DINO}.layer_scale1.lambda1"),
    Rule(f"{_BLOCK}/scale2", f"{_DINO}.layer_scale2.lambda1"),
]
_LAYER, _LLAMA = "llm/layers", "model.layers.{i}"
LLAMA = [
    Rule("llm/embedding", "model.embed_tokens.weight"),
    Rule("llm/norm/scale", "model.norm.weight"),
    Rule("llm/head", "lm_head.weight", LINEAR),
    Rule(f"{_LAYER}/norm1/scale", f"{_LLAMA}.input_layernorm.weight"),
    Rule(f"{_LAYER}/norm2/scale", f"{_LLAMA}.post_attention_layernorm.weight"),
    *(Rule(f"{_LAYER}/attention/{n}", f"{_LLAMA}.self_attn.{n}_proj.weight", HEADS_IN) for n in "qkv"),
    *(Rule(f"{_LAYER}/attention/{n}_bias", f"{_LLAMA}.self_attn.{n}_proj.bias", HEADS_BIAS) for n in "qkv"),
    *(Rule(f"{_LAYER}/attention/{n}_norm/scale", f"{_LLAMA}.self_attn.{n}_norm.weight") for n in "qk"),
    Rule(f"{_LAYER}/attention/out", f"{_LLAMA}.self_attn.o_proj.weight", HEADS_OUT),
    *(Rule(f"{_LAYER}/mlp/{n}/kernel", f"{_LLAMA}.mlp.{n}_proj.weight", LINEAR) for n in ("gate", "up", "down")),
]
PHI3 = [
    *(rule for rule in LLAMA if not re.search(r"attention/[qkv]|mlp/(gate|up)", rule.path)),
    *(Rule(f"{_LAYER}/attention/{n}", f"{_LLAMA}.self_attn.qkv_proj.weight", HEADS_IN) for n in "qkv"),
    *(Rule(f"{_LAYER}/mlp/{n}/kernel", f"{_LLAMA}.mlp.gate_up_proj.weight", LINEAR) for n in ("gate", "up")),
]
TOWERS = {"clip": CLIP, "siglip": CLIP, "siglip2": SIGLIP2, "dinov2": DINOV2}
LLMS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "phi3": PHI3}

AS_IT_IS = "fusion"  # prefix of the tensors that no table names
TASK = "task"  # a task's own part, and the prefix of its tensors, which are stored as they are
# Prefixes of names in common checkpoints, by part; the rest is the short name.
PREFIXES = {
    "vision": r"(?:model\.)?(?:(?:vision_tower|backbone|dinov2)\.)*(?:vision_model\.)?"
    r"(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\.)",
    "llm": r"(?:language_model\.(?=model\.|lm_head\.)|model\.language_model\.(?=layers\.|norm\.|embed_tokens\.)|"
    r"(?=model\.(?:layers|norm|embed_tokens|rotary_emb)\.|lm_head\.))",
}
# Tensors that a file may have and no model here uses, with a description for the report.
LEFT = {
    "vision": [
        (r"(post_layernorm|layernorm)\..*", "norm after the last block"),
        (r"head\..*", "pooling head"),
        (r"embeddings\.mask_token", "mask token"),
        (r"embeddings\.position_ids", "position ids"),
    ],
    "llm": [(r".*rotary_emb\.inv_freq", "rotary frequencies")],
    "fusion": [],
    TASK: [],
}
OTHERS = [
    (r"text_model\..*|logit_scale|logit_bias|(visual|text)_projection\.weight", "text tower"),
    (r"(classifier|decoder)\..*", "head for another task"),
]


def part_and_name(name: str) -> tuple[str | None, str]:
    """(part, short name) of a tensor's name in a file; the part is None if it belongs to none of ours."""
    for part, prefix in PREFIXES.items():
        if match := re.match(prefix, name):
            rest = name[match.end() :]
            return part, f"model.{rest}" if match[0] == "model.language_model." else rest
    rest = name.removeprefix("model.")
    if rest.startswith(f"{TASK}."):
        return TASK, rest
    prefixes = [AS_IT_IS, *(prefix for way in ways.FUSING for prefix in tables_of(way))]
    if rest.startswith(tuple(f"{prefix}." for prefix in prefixes)):
        return "fusion", re.sub(r"^mm_projector\.mlp\.", "mm_projector.", rest)
    return None, name


def rules_of(part: str, cfg: Config, paths: Iterable[str] = (), names: Collection[str] = ()) -> list[Rule]:
    """The rules of a part's parameters.

    Args:
      paths: the model's parameters; a fusion's that no table names, and a task's, are stored as they are.
      names: short names of the tensors in a file to be read, which tell a fusion's tables apart.
    """
    if part == "vision":
        patch = (("y", cfg.vision.patch_size), ("x", cfg.vision.patch_size))
        table = TOWERS[cfg.vision.family]
        return [dataclasses.replace(rule, sizes=patch) if rule.layout == PATCHES else rule for rule in table]
    if part == TASK:
        return _as_they_are(path for path in paths if path.startswith(f"{TASK}/"))
    return LLMS[cfg.llm.family] if part == "llm" else fusion_rules(cfg, paths, names)


def tables_of(way: str) -> Tables:
    """The tables of a way of fusing; {} if it has none."""
    return getattr(ways.FUSING[way], "RULES", {})


def fusion_rules(cfg: Config, paths: Iterable[str], names: Collection[str] = ()) -> list[Rule]:
    """The rules of a fusion's parameters, by its table for the file, or for writing by LLAVA, or else its first."""
    tables = tables_of(cfg.fusion.name)
    ours = LLAVA if LLAVA in tables else next(iter(tables), "")
    prefix = next((p for p in tables if any(name.startswith(f"{p}.") for name in names)), ours)
    # With a set of weights per level ours have the level in their names; a foreign file's only set serves all of them.
    each = not cfg.fusion.shared and "fusion.shared" not in getattr(ways.FUSING[cfg.fusion.name], "IGNORES", ())
    numbered = f"{prefix}.{{i}}" if each and prefix == ours else prefix
    rules = [
        dataclasses.replace(rule, name=f"{numbered}.{rule.name}", repeated=each and prefix != ours)
        for rule in tables.get(prefix, ())
    ]
    named = {rule.path for rule in rules}
    return [*rules, *_as_they_are(path for path in paths if path.startswith("fusion/") and path not in named)]


def _as_they_are(paths: Iterable[str]) -> list[Rule]:
    """Rules for parameters whose tensors have their paths for names, and our layout."""
    return [Rule(path, path.replace("/", ".")) for path in paths]
