"""Write the parity fixtures: tiny random checkpoints laid out as on the Hugging Face hub, and PyTorch's outputs of them.

The fixtures are in the repository, and the tests need neither PyTorch nor this script. To write them anew, in an
environment of its own:

    pip install torch transformers safetensors
    python tests/parity/make_fixtures.py [NAME ...]

Written with torch 2.13.0 and transformers 5.23.0 (qwen3vl, docling and granite4: 5.24.0) on CPU, in float32 with eager attention. Seeds are fixed: the same
versions write the same files. Every case is a folder with config.json, the weights, and io.npz:

    vision  pixel_values (2,3,S,S); hidden_states (layers+1, 2, P, C): the input of layer 0, then every layer's output,
            before any last norm, class token included. With the suffix _resized the same for larger pictures.
    llm     input_ids (2,T); logits (2,T,V); hidden_states (layers+1, 2, T, D): the input of every layer, then the
            output of the final norm. greedy_ids (2,10): what follows input_ids[:, :greedy_prompt_length], with no stop
            at the end token; greedy_margin: the smallest gap between best and second logit on the way.
            With the suffix _long the same for another T.
    llava   pixel_values and input_ids, logits, and greedy_ids (2,8) after the whole of input_ids
    official_cross_attention  no config.json; low (2,9,C), the tokens of four crops (2,4,9,C), and the adapter's out
    qwen3vl, docling, granite4  a way of fusing before its text model, both with random weights. levels (1+K,2,N,C): the
            main feature, then what the level projectors read, in row-major order; tokens (2,S,D) and sources (R,2,S,D) of
            the fusion; input_ids (2,T), image_start (2,) and hidden (2,T,D), the text model's last hidden states. config.json
            is that of the plain text model, whose multipliers are one.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers.models.granite4_vision import modeling_granite4_vision as granite4_vision
from transformers.models.granite_docling import modeling_granite_docling as granite_docling
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

HERE = Path(__file__).parent
MIN_MARGIN = 1e-2  # far more than float32 rounding moves a logit
MIN_DISTINCT = 5  # different tokens in a greedy continuation: one that repeats itself would hide errors
IMAGE_TOKEN, IMAGE_TOKENS = 95, 16


def vision(model: hf.PreTrainedModel, rng: Generator, size: int = 28, resized: int = 0, **options: Any) -> dict:
    """`options` go into the call with the resized pictures."""
    tower = getattr(model, "vision_model", model)  # a whole CLIP or SigLIP has a text tower too
    io = {}
    for suffix, side, extra in (("", size, {}), ("_resized", resized, options)):
        if side:
            io["pixel_values" + suffix] = pixels = torch.randn(2, 3, side, side, generator=rng)
            hidden = tower(pixels, output_hidden_states=True, **extra).hidden_states
            io["hidden_states" + suffix] = torch.stack(hidden)
    return io


def vision_naflex(model: hf.PreTrainedModel, rng: Generator) -> dict:
    """SigLIP 2 takes patches, row by row; a patch is row by row too, with the three colours of a pixel together."""
    pixels = torch.randn(2, 3, 28, 28, generator=rng)
    patches = pixels.reshape(2, 3, 4, 7, 4, 7).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 7 * 7 * 3)
    mask, shapes = torch.ones(2, 16, dtype=torch.int32), torch.tensor([[4, 4], [4, 4]])
    hidden = model(patches, mask, shapes, output_hidden_states=True).hidden_states
    return dict(pixel_values=pixels, hidden_states=torch.stack(hidden))


def greedy(model: hf.PreTrainedModel, prompt: Tensor, steps: int, **inputs: Tensor) -> dict:
    """Every token from a forward pass over all the tokens before it: there is no cache that could be wrong."""
    rows, margin = [], float("inf")
    for b, ids in enumerate(prompt):
        row = {name: value[b : b + 1] for name, value in inputs.items()}
        for _ in range(steps):
            best = model(input_ids=ids[None], use_cache=False, **row).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[:1]])
        rows.append(ids[-steps:].tolist())
    assert margin > MIN_MARGIN, f"margin {margin}: try another seed"
    assert all(len(set(row)) >= MIN_DISTINCT for row in rows), f"{rows}: try another seed"
    return dict(greedy_prompt_length=prompt.shape[1], greedy_ids=rows, greedy_margin=np.float32(margin))


def llm(model: hf.PreTrainedModel, rng: Generator, length: int = 20, prompt: int = 10) -> dict:
    ids = torch.randint(3, TOKENS["vocab_size"], (2, length), generator=rng)
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    io = dict(input_ids=ids, logits=out.logits, hidden_states=torch.stack(out.hidden_states))
    return io | greedy(model, ids[:, :prompt], steps=10)


def longrope(model: hf.PreTrainedModel, rng: Generator) -> dict:
    """Up to 16 tokens have the short factors, the generated ones included, more than 16 the long ones; one text grows
    from 13 tokens to 23."""
    short, long = llm(model, rng, 12, prompt=6), llm(model, rng, 24, prompt=20)
    growing = greedy(model, long["input_ids"][:, 7:20], steps=10)
    ends = {"_long": long, "_growing": growing}
    return short | {f"{name}{end}": value for end, io in ends.items() for name, value in io.items()}


def llava(model: hf.PreTrainedModel, rng: Generator) -> dict:
    pixels, ids = torch.randn(2, 3, 28, 28, generator=rng), torch.randint(3, IMAGE_TOKEN, (2, 24), generator=rng)
    for row, start in zip(ids, (2, 5), strict=True):
        row[start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    return dict(pixel_values=pixels, input_ids=ids, logits=logits) | greedy(model, ids, steps=8, pixel_values=pixels)


def rope(theta: float, rope_type: str = "default", **scaling: Any) -> dict:
    return dict(rope_parameters=dict(rope_theta=theta, rope_type=rope_type, **scaling))


def four_x(config: dict) -> None:
    """The config as transformers 4 wrote it, which is what most of the hub has."""
    scaling = config.pop("rope_parameters")
    config |= dict(rope_theta=scaling.pop("rope_theta"), torch_dtype=config.pop("dtype"))
    scaling.pop("partial_rotary_factor", None)
    if scaling["rope_type"] == "longrope":  # Phi-3 has its own spelling
        scaling["type"] = scaling.pop("rope_type")
        config["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    config["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    config.pop("head_dim", None)  # it was hidden_size / num_attention_heads
    del config["transformers_version"]


class Case(NamedTuple):
    model: type[hf.PreTrainedModel]
    settings: dict[str, Any]
    reference: Callable[[hf.PreTrainedModel, Generator], dict]
    seed: int = 0  # for LLMs the first one with clear greedy choices
    rename: tuple[str, str] = ("", "")  # regex and replacement: from names of transformers 5 to names on the hub
    edit: Callable[[dict], None] = lambda config: None
    unused: dict[str, Tensor] = {}  # buffers that are in the hub's files
    shard_size: str = "1GB"


TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BLOCK = dict(hidden_size=32, intermediate_size=48)
VISION = BLOCK | dict(num_hidden_layers=4, num_attention_heads=2, patch_size=7)
SQUARE, ODD = VISION | dict(image_size=28), VISION | dict(image_size=21, hidden_act="gelu")
# as wide as the vision tower: shapes alone do not stop a loader that mistakes one for the other
TEXT = BLOCK | TOKENS | dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
PAIR = dict(text_config=TEXT, vision_config=SQUARE)
DINOV2 = {k: v for k, v in SQUARE.items() if k != "intermediate_size"} | dict(mlp_ratio=2, use_mask_token=True)
LLM = BLOCK | TOKENS | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
LLM |= dict(max_position_embeddings=64, rms_norm_eps=1e-5)
BASE = LLM | rope(1e4)
QWEN = LLM | rope(1e6) | dict(rms_norm_eps=1e-6)
SLIDING = dict(use_sliding_window=True, max_window_layers=2, sliding_window=6, num_hidden_layers=4)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LLAMA3 = LLM | rope(5e5, "llama3", **LLAMA3) | dict(max_position_embeddings=128)
LONG = dict(short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.2, 2.5, 5.0, 9.0])
LONG = LLM | rope(1e4, "longrope", **LONG) | dict(original_max_position_embeddings=16)
LLAVA = dict(vision_config=SQUARE | dict(model_type="clip_vision_model"), text_config=BASE | dict(model_type="llama"))
LLAVA |= dict(image_token_index=IMAGE_TOKEN, image_seq_length=IMAGE_TOKENS, multimodal_projector_bias=True)
LLAVA |= dict(vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu")
POSITIONS = {f"{t}_model.embeddings.position_ids": torch.arange(n)[None] for t, n in (("vision", 17), ("text", 16))}
ROTARY = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(0, 8, 2) / 8) for i in range(3)}
Llama, Qwen2, Qwen3, Phi3 = hf.LlamaForCausalLM, hf.Qwen2ForCausalLM, hf.Qwen3ForCausalLM, hf.Phi3ForCausalLM
resized = partial(vision, resized=42, interpolate_pos_encoding=True)
bare = (r"^", "vision_model.")  # transformers 5 saves a tower alone without the prefix
nested = (r"^vision_tower\.", "vision_tower.vision_model.")
CASES = {
    "clip": Case(hf.CLIPModel, PAIR | dict(projection_dim=32), resized, unused=POSITIONS),
    "clip_vision": Case(hf.CLIPVisionModel, ODD, partial(vision, size=21), rename=bare),
    "siglip": Case(hf.SiglipModel, PAIR, resized),
    "siglip2": Case(hf.Siglip2VisionModel, VISION | dict(num_patches=16), vision_naflex, rename=bare),
    "dinov2": Case(hf.Dinov2Model, DINOV2, partial(vision, resized=42)),  # interpolates unasked
    "llama2": Case(Llama, BASE, llm, seed=5, edit=four_x, unused=ROTARY, shard_size="80KB"),
    "llama2_linear": Case(Llama, LLM | rope(1e4, "linear", factor=2.0), llm, seed=5),
    "llama3": Case(Llama, LLAMA3, partial(llm, length=40, prompt=20), seed=3, edit=four_x),
    "mistral": Case(hf.MistralForCausalLM, BASE | dict(sliding_window=7), partial(llm, length=24, prompt=12), seed=2),
    "qwen2": Case(Qwen2, QWEN | SLIDING, partial(llm, length=24, prompt=12), seed=7),
    "qwen3": Case(Qwen3, QWEN | dict(head_dim=16), llm, seed=5),
    "phi3": Case(Phi3, BASE | dict(original_max_position_embeddings=64), llm, seed=2),
    "phi3_longrope": Case(Phi3, LONG, longrope, seed=5, edit=four_x),
    "smollm2": Case(Llama, LLM | rope(1e5) | dict(tie_word_embeddings=True), llm, seed=3),
    "llava": Case(hf.LlavaForConditionalGeneration, LLAVA, llava, seed=2, rename=nested),
}


def randomize(model: nn.Module, rng: Generator) -> None:
    """Random values everywhere: no bias is zero, no norm and no layer scale the identity."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if name.endswith("lambda1") or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif parameter.ndim < 2 or re.search("token|position|probe", name):
            value = 0.15 * noise  # small, so that the epsilon of the first norm shows in the outputs
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data = value


def save(model: hf.PreTrainedModel, folder: Path, case: Case) -> None:
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    files, weight_map, size = sorted(folder.glob("*.safetensors")), {}, 0
    for file in files:
        tensors = {re.sub(*case.rename, name): tensor for name, tensor in load_file(file).items()}
        tensors |= case.unused if file == files[0] else {}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = dict(metadata=dict(total_size=size), weight_map=weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = json.loads((folder / "config.json").read_text())
    case.edit(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_io(folder: Path, io: dict) -> None:
    arrays = {name: np.asarray(value) for name, value in io.items()}
    np.savez(folder / "io.npz", **{k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in arrays.items()})


def write_case(folder: Path, case: Case) -> None:
    """Save a model; what is in io.npz comes from the model that transformers reads back from the folder."""
    rng = Generator().manual_seed(case.seed)
    config = case.model.config_class(**copy.deepcopy(case.settings))  # the config writes into nested dicts
    model = case.model(config).eval()
    model.set_attn_implementation("eager")
    randomize(model, rng)
    save(model, folder, case)
    again, info = case.model.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert set(info["unexpected_keys"]) <= set(case.unused), info
    state = rng.get_state()
    io, expected = (case.reference(m.eval(), rng.set_state(state)) for m in (again, model))
    for name, value in expected.items():  # neither renaming nor the older config has lost anything
        np.testing.assert_array_equal(io[name], value, name)
    write_io(folder, io)


def write_official_cross_attention(folder: Path) -> None:
    """The adapter of the official SparseCut code: post-norm cross-attention, then a two-layer MLP."""
    width, out = 128, 32
    parts = dict(
        attn=nn.MultiheadAttention(width, width // 64, batch_first=True),
        norm1=nn.LayerNorm(width, eps=1e-5),
        norm2=nn.LayerNorm(width, eps=1e-5),
        ffn=nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        mlp=nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out)),
    )
    adapter = nn.ModuleDict(parts).eval()
    rng = Generator().manual_seed(0)
    randomize(adapter, rng)
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in adapter.state_dict().items()}
    save_file(tensors, folder / "mm_projector.safetensors", metadata={"format": "pt"})
    low, crops = torch.randn(2, 9, width, generator=rng), torch.randn(2, 4, 9, width, generator=rng)
    keys = crops.flatten(1, 2)  # one crop after the other
    x = adapter["norm1"](low + adapter["attn"](low, keys, keys)[0])
    x = adapter["norm2"](x + adapter["ffn"](x))
    write_io(folder, dict(low=low, crops=crops, out=adapter["mlp"](x)))


WAY = TOKENS | dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
WAY |= dict(head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True)
ONES = dict(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=8**-0.5, logits_scaling=1.0)


def write_text(
    folder: Path, text: hf.PreTrainedModel, config: hf.PreTrainedConfig, parts: dict[str, nn.Module]
) -> None:
    """The text model and the parts of a fusion, by the prefix of their names, in one file; the plain model's config."""
    tensors = {f"model.language_model.{name}": tensor for name, tensor in text.state_dict().items()}
    for prefix, part in parts.items():
        tensors |= {f"model.{prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def image_rows(rng: Generator, count: int, tokens: Tensor, text: nn.Module) -> tuple[dict, Tensor, Tensor]:
    """Two rows of random ids with `count` image positions each; their embeddings with `tokens` there, and bool (2,T)."""
    starts = torch.tensor([2, 4])
    ids = torch.randint(3, WAY["vocab_size"], (2, count + 7), generator=rng)
    place = torch.arange(count + 7)
    image = (place >= starts[:, None]) & (place < starts[:, None] + count)
    x = text.get_input_embeddings()(ids).clone()
    x[image] = tokens.reshape(-1, x.shape[-1])
    return dict(input_ids=ids.masked_fill(image, 0), image_start=starts), x, image


def injected_after(text: nn.Module, rng: Generator, tokens: Tensor, sources: Tensor) -> dict:
    """Last hidden states where source k is added after layer k, with the fusion's outputs, as entries of io.npz."""
    rows, x, image = image_rows(rng, tokens.shape[1], tokens, text)
    hidden = text(inputs_embeds=x, visual_pos_masks=image, deepstack_visual_embeds=list(sources.flatten(1, 2)))
    return rows | dict(tokens=tokens, sources=sources, hidden=hidden.last_hidden_state)


def write_qwen3vl(folder: Path) -> None:
    """The main merger and two level mergers, on 6 x 6 tokens that are brought into the order of 2 x 2 blocks for them."""
    rng = Generator().manual_seed(0)
    config = WAY | dict(num_hidden_layers=4)
    rope_of = dict(rope_theta=1e4, rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True)
    text = qwen3_vl.Qwen3VLTextModel(qwen3_vl.Qwen3VLTextConfig(**config, rope_parameters=rope_of)).eval()
    vision = hf.Qwen3VLConfig().vision_config
    vision.hidden_size, vision.out_hidden_size, vision.spatial_merge_size = 8, 16, 2
    mergers = [qwen3_vl.Qwen3VLVisionPatchMerger(vision, use_postshuffle_norm=late) for late in (False, True, True)]
    main, *others = mergers
    parts = {"visual.merger": main, "visual.deepstack_merger_list": nn.ModuleList(others)}
    for module in (text, *parts.values()):
        randomize(module, rng)
    levels = torch.randn(3, 2, 36, 8, generator=rng)
    blocks = [6 * y + x for top in (0, 2, 4) for left in (0, 2, 4) for y in (top, top + 1) for x in (left, left + 1)]
    tokens, *sources = (merger(level[:, blocks]).view(2, 9, 16) for merger, level in zip(mergers, levels, strict=True))
    write_text(folder, text, hf.Qwen3Config(**config, **rope(1e4)), parts)
    write_io(folder, dict(levels=levels) | injected_after(text, rng, tokens, torch.stack(sources)))


def write_docling(folder: Path) -> None:
    """The connector with two levels on 8 x 8 tokens, for its coarse and its fine path, which end the names in io.npz."""
    rng = Generator().manual_seed(0)
    config = WAY | dict(num_hidden_layers=4) | rope(1e4)
    text = granite_docling.GraniteDoclingTextModel(granite_docling.GraniteDoclingTextConfig(**config, **ONES)).eval()
    vision = hf.GraniteDoclingConfig().vision_config
    vision.hidden_size, vision.out_hidden_size, vision.image_size, vision.patch_size = 8, 16, 64, 8
    vision.deepstack_visual_indexes = [0, 2]
    connector = granite_docling.GraniteDoclingConnector(vision).eval()
    for module in (text, connector):
        randomize(module, rng)
    levels = torch.randn(3, 2, 64, 8, generator=rng)
    io = dict(levels=levels)
    for end, fine in (("_coarse", False), ("_fine", True)):
        tokens, sources = connector(levels[0], list(levels[1:]), fine=fine)
        both = (x.view(-1, 2, 16 if fine else 4, 16) for x in (tokens, torch.stack(sources)))
        tokens, sources = both
        io |= {name + end: value for name, value in injected_after(text, rng, tokens[0], sources).items()}
    write_text(folder, text, hf.LlamaConfig(**config), {"vision_model.connector": connector})
    write_io(folder, io)


def write_granite4(folder: Path) -> None:
    """Two level projectors and the four spatial ones at rate 2/4 on 8 x 8 tokens, before layers that are in no order.

    The projectors are in a file of their own. levels has the main feature last: what the spatial projectors read.
    """
    rng = Generator().manual_seed(0)
    config = WAY | dict(hidden_size=8, num_attention_heads=2, head_dim=4, num_hidden_layers=7) | rope(1e4)
    ones = ONES | dict(attention_multiplier=0.5)
    text = granite4_vision.Granite4VisionTextModel(granite4_vision.Granite4VisionTextConfig(**config, **ones)).eval()
    whole = granite4_vision.Granite4VisionConfig(downsample_rate="2/4", deepstack_layer_map=[[-1, 3], [-2, 0]])
    whole.text_config.hidden_size, whole.vision_config.hidden_size = 8, 12
    whole.vision_config.image_size, whole.vision_config.patch_size = 64, 8
    q_former = whole.qformer_config
    q_former.hidden_size = q_former.encoder_hidden_size = 12
    q_former.num_attention_heads, q_former.intermediate_size = 1, 20
    of_levels, of_groups = (
        nn.ModuleList(
            granite4_vision.Granite4VisionWindowQFormerDownsampler(whole, offset) for offset in offsets
        ).eval()
        for offsets in ((None, None), range(4))
    )
    parts = {"layerwise_projectors": of_levels, "spatial_projectors": of_groups}
    for module in (text, *parts.values()):
        randomize(module, rng)
    levels = torch.randn(3, 2, 64, 12, generator=rng)
    read = [levels[0], levels[1], *[levels[2]] * 4]
    sources = [projector(level) for projector, level in zip([*of_levels, *of_groups], read, strict=True)]
    layers = [3, 0, 6, 1, 5, 2]
    rows, x, image = image_rows(rng, 16, torch.zeros(2, 16, 8), text)
    entering = {layer: source.flatten(0, 1) for layer, source in zip(layers, sources, strict=True)}
    hidden = text(inputs_embeds=x, vision_mask=image[..., None], deepstack_features=entering)
    io = rows | dict(levels=levels, tokens=torch.zeros(2, 16, 8), sources=torch.stack(sources), layers=layers)
    weights = {f"{prefix}.{n}": p.data for prefix, part in parts.items() for n, p in part.named_parameters()}
    save_file(weights, folder / "projectors.safetensors")
    write_text(folder, text, hf.LlamaConfig(**config), {})
    write_io(folder, io | dict(hidden=hidden.last_hidden_state))


OTHERS = {
    "official_cross_attention": write_official_cross_attention,
    "qwen3vl": write_qwen3vl,
    "docling": write_docling,
    "granite4": write_granite4,
}


@torch.no_grad()
def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # threads would split sums, and round, as the machine has cores
    known = [*CASES, *OTHERS]
    if unknown := set(names) - set(known):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in names or known:
        shutil.rmtree(HERE / name, ignore_errors=True)
        (HERE / name).mkdir()
        if name in CASES:
            write_case(HERE / name, CASES[name])
        else:
            OTHERS[name](HERE / name)


if __name__ == "__main__":
    main(sys.argv[1:])
