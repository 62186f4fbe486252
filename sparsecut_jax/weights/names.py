"""Maps Hugging Face tensor names to our parameter paths and back: one table per family.

Torch stores a linear weight as (out, in); here kernels are (in, out), attention kernels have separate head axes, and the
layers of a stack share one array with a leading layer axis. The change of layout is an einops pattern, theirs -> ours;
export applies it in reverse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import einops
import numpy as np

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

LINEAR = "o i -> i o"
HEADS_IN, HEADS_BIAS, HEADS_OUT = "(q h) c -> c q h", "(q h) -> q h", "c (q h) -> q h c"


@dataclass(frozen=True)
class Rule:
    """One parameter and the tensor that holds it.

    Attributes:
      path: path of the parameter; stacked ones are under "blocks" or "layers".
      name: canonical name of the tensor (see `canonical`); {i} is the layer, {k} the level if each has its own fusion.
      layout: einops pattern, theirs -> ours; "" if they are the same.
      part, parts: the tensor concatenates several parameters along its rows (how many and how large: `parts`, see
        `part_rows`), and this is number `part`; "" if it holds only this one.
    """

    path: str
    name: str
    layout: str = ""
    part: int = 0
    parts: str = ""


def _norm(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/scale", f"{name}.weight"), Rule(f"{path}/bias", f"{name}.bias")]


def _linear(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/kernel", f"{name}.weight", LINEAR), Rule(f"{path}/bias", f"{name}.bias")]


def _attention(path: str, names: dict[str, str]) -> list[Rule]:
    rules = []
    for ours, theirs in names.items():
        kernel, bias = (HEADS_OUT, "") if ours == "out" else (HEADS_IN, HEADS_BIAS)
        rules.append(Rule(f"{path}/{ours}_kernel", f"{theirs}.weight", kernel))
        rules.append(Rule(f"{path}/{ours}_bias", f"{theirs}.bias", bias))
    return rules


_BLOCK, _CLIP = "vision/blocks", "encoder.layers.{i}"
CLIP = [
    Rule("vision/class_embedding", "embeddings.class_embedding"),
    Rule("vision/patch_embedding/kernel", "embeddings.patch_embedding.weight", "o i y x -> (y x i) o"),
    Rule("vision/patch_embedding/bias", "embeddings.patch_embedding.bias"),
    Rule("vision/position_embedding", "embeddings.position_embedding.weight"),
    *_norm("vision/pre_norm", "pre_layrnorm"),
    *_norm(f"{_BLOCK}/norm1", f"{_CLIP}.layer_norm1"),
    *_norm(f"{_BLOCK}/norm2", f"{_CLIP}.layer_norm2"),
    *_attention(f"{_BLOCK}/attention", {n: f"{_CLIP}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}),
    *_linear(f"{_BLOCK}/fc1", f"{_CLIP}.mlp.fc1"),
    *_linear(f"{_BLOCK}/fc2", f"{_CLIP}.mlp.fc2"),
]
SIGLIP2 = [  # its image processor cuts the patches, already in our order
    Rule(rule.path, rule.name, LINEAR) if rule.path == "vision/patch_embedding/kernel" else rule for rule in CLIP
]
_DINO = "encoder.layer.{i}"
_DINO_ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "output.dense"}
DINOV2 = [
    Rule("vision/class_embedding", "embeddings.cls_token", "1 1 c -> c"),
    Rule("vision/patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", "o i y x -> (y x i) o"),
    Rule("vision/patch_embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("vision/position_embedding", "embeddings.position_embeddings", "1 p c -> p c"),
    *_norm(f"{_BLOCK}/norm1", f"{_DINO}.norm1"),
    *_norm(f"{_BLOCK}/norm2", f"{_DINO}.norm2"),
    *_attention(f"{_BLOCK}/attention", {ours: f"{_DINO}.attention.{n}" for ours, n in _DINO_ATTENTION.items()}),
    *_linear(f"{_BLOCK}/fc1", f"{_DINO}.mlp.fc1"),
    *_linear(f"{_BLOCK}/fc2", f"{_DINO}.mlp.fc2"),
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
    *(
        Rule(f"{_LAYER}/attention/{n}", f"{_LLAMA}.self_attn.qkv_proj.weight", HEADS_IN, i, "qkv")
        for i, n in enumerate("qkv")
    ),
    *(
        Rule(f"{_LAYER}/mlp/{n}/kernel", f"{_LLAMA}.mlp.gate_up_proj.weight", LINEAR, i, "halves")
        for i, n in enumerate(("gate", "up"))
    ),
]
_FUSE = "fusion/fuse"


def _projector(prefix: str, fc1: str, fc2: str) -> list[Rule]:
    """The projector of every fusion, and the further tensors of `cross_attention` (PyTorch's MultiheadAttention)."""
    return [
        *_linear(f"{_FUSE}/projector/fc1", f"{prefix}.{fc1}"),
        *_linear(f"{_FUSE}/projector/fc2", f"{prefix}.{fc2}"),
        *(
            Rule(f"{_FUSE}/attention/{n}_kernel", f"{prefix}.attn.in_proj_weight", HEADS_IN, i, "thirds")
            for i, n in enumerate("qkv")
        ),
        *(
            Rule(f"{_FUSE}/attention/{n}_bias", f"{prefix}.attn.in_proj_bias", HEADS_BIAS, i, "thirds")
            for i, n in enumerate("qkv")
        ),
        Rule(f"{_FUSE}/attention/out_kernel", f"{prefix}.attn.out_proj.weight", HEADS_OUT),
        Rule(f"{_FUSE}/attention/out_bias", f"{prefix}.attn.out_proj.bias"),
        *_norm(f"{_FUSE}/norm1", f"{prefix}.norm1"),
        *_norm(f"{_FUSE}/norm2", f"{prefix}.norm2"),
        *_linear(f"{_FUSE}/ffn1", f"{prefix}.ffn.0"),
        *_linear(f"{_FUSE}/ffn2", f"{prefix}.ffn.2"),
    ]


PROJECTORS = {
    "mm_projector": _projector("mm_projector", "0", "2"),  # official; a `mlp.` before the number is dropped
    "multi_modal_projector": _projector("multi_modal_projector", "linear_1", "linear_2"),  # llava-hf, and ours
    "multi_modal_projector.{k}": _projector("multi_modal_projector.{k}", "linear_1", "linear_2"),  # shared=False
}
TOWERS = {"clip": CLIP, "siglip": CLIP, "siglip2": SIGLIP2, "dinov2": DINOV2}
LLMS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "phi3": PHI3}

# Prefixes of names in common checkpoints, by part; the rest is the canonical name.
PREFIXES = {
    "vision": r"(?:model\.)?(?:(?:vision_tower|backbone|dinov2)\.)*(?:vision_model\.)?"
    r"(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\.)",
    "llm": r"(?:language_model\.(?=model\.|lm_head\.)|model\.language_model\.(?=layers\.|norm\.|embed_tokens\.)|"
    r"(?=model\.(?:layers|norm|embed_tokens|rotary_emb)\.|lm_head\.))",
    "fusion": r"(?:model\.)?(?=mm_projector\.|multi_modal_projector\.)",
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
}
OTHERS = [
    (r"text_model\..*|logit_scale|logit_bias|(visual|text)_projection\.weight", "text tower"),
    (r"(classifier|decoder)\..*", "head for another task"),
]


def canonical(name: str) -> tuple[str | None, str]:
    """(part, canonical name) of a tensor's name in a file; the part is None if it belongs to none of ours."""
    for part, prefix in PREFIXES.items():
        if match := re.match(prefix, name):
            rest = name[match.end() :]
            if part == "llm" and match[0] == "model.language_model.":
                rest = "model." + rest
            if part == "fusion":
                rest = re.sub(r"^mm_projector\.mlp\.", "mm_projector.", rest)
            return part, rest
    return None, name


def rules_of(part: str, cfg: Config, names: Sequence[str] = ()) -> list[Rule]:
    """The table for a part's tensors. names: canonical names, which tell the kinds of projector files apart."""
    if part == "vision":
        return TOWERS[cfg.vision.family]
    if part == "llm":
        return LLMS[cfg.llm.family]
    if any(name.startswith("mm_projector.") for name in names):
        return PROJECTORS["mm_projector"]
    return PROJECTORS["multi_modal_projector" if cfg.fusion.shared else "multi_modal_projector.{k}"]


def axis_sizes(path: str, cfg: Config) -> dict[str, int]:
    """Sizes of the einops axes that do not follow from a tensor's shape."""
    if path.startswith("vision"):
        return {"h": cfg.vision.width // cfg.vision.heads, "y": cfg.vision.patch_size, "x": cfg.vision.patch_size}
    if path.startswith("fusion"):
        return {"h": cfg.vision.width // max(1, cfg.vision.width // 64)}
    return {"h": cfg.llm.head_dim}


def part_rows(rule: Rule, cfg: Config) -> list[int]:
    """Rows of each parameter that shares the rule's tensor; [] if the tensor holds only this one."""
    if not rule.parts:
        return []
    q, kv = cfg.llm.heads * cfg.llm.head_dim, cfg.llm.kv_heads * cfg.llm.head_dim
    return {"qkv": [q, kv, kv], "halves": [cfg.llm.mlp_dim] * 2, "thirds": [cfg.vision.width] * 3}[rule.parts]


def to_theirs(value: np.ndarray, rule: Rule, cfg: Config) -> np.ndarray:
    """A parameter (of one layer) in torch's layout."""
    if not rule.layout:
        return value
    theirs, ours = rule.layout.split(" -> ")
    return einops.rearrange(value, f"{ours} -> {theirs}", **_known(rule, cfg))


def to_ours(value: np.ndarray, rule: Rule, cfg: Config) -> np.ndarray:
    """A tensor (of one layer) in our layout; the inverse of `to_theirs`."""
    return einops.rearrange(value, rule.layout, **_known(rule, cfg)) if rule.layout else value


def their_shape(shape: Sequence[int], rule: Rule, cfg: Config) -> tuple[int, ...]:
    """Shape of the whole tensor that holds a parameter of `shape` (of one layer)."""
    if rule.layout:
        left, right = _sides(rule.layout)
        sizes = _sizes(right, shape, _known(rule, cfg))
        shape = [math.prod(sizes[letter] for letter in group) for group in left]
    rows = part_rows(rule, cfg)
    return (sum(rows), *shape[1:]) if rows else tuple(shape)


def their_slices(
    index: tuple[slice, ...], shape: Sequence[int], rule: Rule, cfg: Config
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """(slices of their tensor to read for `index` of our parameter, slices to keep of that in our layout).

    Axes that cannot be sliced in their layout are read whole and sliced afterwards.
    """
    index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
    if rule.layout:
        left, right = _sides(rule.layout)
        sizes = _sizes(right, shape, _known(rule, cfg))
        wanted = {group[0]: s for group, s in zip(right, index, strict=True) if len(group) == 1}
        theirs, followed = [], set()
        for group in left:
            inner = math.prod(sizes[letter] for letter in group[1:])
            # Only the outermost axis of a merged group can be sliced, or an axis of its own.
            if group and group[0] in wanted:
                start, stop = wanted[group[0]].start, wanted[group[0]].stop
                theirs.append(slice(start * inner, stop * inner))
                followed.add(group[0])
            else:
                theirs.append(slice(0, math.prod(sizes[letter] for letter in group)))
        keep = tuple(
            slice(None) if len(group) == 1 and group[0] in followed else s
            for group, s in zip(right, index, strict=True)
        )
    else:
        theirs, keep = list(index), (slice(None),) * len(shape)
    rows = part_rows(rule, cfg)
    if rows:
        offset = sum(rows[: rule.part])
        theirs[0] = slice(theirs[0].start + offset, theirs[0].stop + offset)
    return tuple(theirs), keep


def _known(rule: Rule, cfg: Config) -> dict[str, int]:
    return {axis: size for axis, size in axis_sizes(rule.path, cfg).items() if re.search(rf"\b{axis}\b", rule.layout)}


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """Parses "(q h) c -> c q h" into ([["q", "h"], ["c"]], [["c"], ["q"], ["h"]]); a "1" is an empty group."""
    parse = lambda side: [
        [letter for letter in group.strip("()").split() if letter != "1"]
        for group in re.findall(r"\([^)]*\)|\S+", side)
    ]
    left, right = layout.split(" -> ")
    return parse(left), parse(right)


def _sizes(groups: list[list[str]], shape: Sequence[int], known: dict[str, int]) -> dict[str, int]:
    """Sizes of all axes, from the shape of one side and the known sizes."""
    sizes = dict(known)
    for group, size in zip(groups, shape, strict=True):
        unknown = [letter for letter in group if letter not in sizes]
        if len(unknown) > 1:
            raise UserError(f"the sizes of axes {group}, {size} together, cannot be determined")
        for letter in unknown:
            sizes[letter] = size // math.prod(sizes[other] for other in group if other != letter)
    return sizes
