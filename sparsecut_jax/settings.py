"""Every setting, with its type or allowed values, its default and its meaning.

A file in configs/ starts from these (`config.default()`) and changes what it needs; `config.check` turns
the result into a `Config`, and the program reads nothing else. `--help` of every command prints this list.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Remat = Literal["auto", "none", "dots", "full", "offload"]
Template = Literal["plain", "vicuna_v1", "llama3", "chatml", "mistral", "phi3", "smollm2", "qa", "tokenizer"]

REMAT = (
    "What a layer keeps for the backward pass: everything (none), matmul results (dots), its input (full; offload: in "
    "host memory); auto: full, on CPUs none."
)


def setting(default: Any, meaning: str) -> Any:
    """A field with this default and, for --help, what it means in one sentence."""
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.copy(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: CLIP, SigLIP or DINOv2, depending on its fields."""

    family: Literal["clip", "siglip", "siglip2", "dinov2"] = setting(
        "clip", "Model family, which sets the tensor names and config.json of its files."
    )
    image_size: int = setting(32, "Side of one view in pixels.")
    patch_size: int = setting(8, "Side of a patch in pixels; a patch is one token.")
    width: int = setting(64, "Channels of a token (C).")
    layers: int = setting(12, "Number of transformer blocks.")
    heads: int = setting(4, "Attention heads; they divide width.")
    mlp_dim: int = setting(256, "Hidden channels of the MLP.")
    activation: Activation = setting("quick_gelu", "Activation function of the MLP.")
    norm_eps: float = setting(1e-5, "Epsilon of the layer norms.")
    class_token: bool = setting(True, "Prepend a class token; it is never passed to the LLM.")
    patch_bias: bool = setting(False, "Add a bias to the patch embedding.")
    pre_norm: bool = setting(True, "Apply a layer norm before the first block (CLIP).")
    layer_scale: bool = setting(False, "Scale each channel after attention and after the MLP (DINOv2).")
    select_layer: int = setting(
        -2, "Main feature, as an index into Hugging Face's hidden_states; -2 is the output of the second-to-last block."
    )
    scan_layers: bool = setting(True, "Compile the blocks as one loop, which compiles faster than unrolled blocks.")
    remat: Remat = setting("auto", REMAT)
    mean: tuple[float, ...] = setting(
        (0.48145466, 0.4578275, 0.40821073), "Mean of red, green and blue, subtracted from values in 0 to 1."
    )
    std: tuple[float, ...] = setting(
        (0.26862954, 0.26130258, 0.27577711), "Standard deviation of red, green and blue, in 0 to 1."
    )


@dataclass(frozen=True)
class FusionConfig:
    """How low- and hi-res tokens of a level become tokens of the LLM."""

    name: str = setting("channel", "Way of fusing: the name of a file in models/fusing.")
    shared: bool = setting(True, "Use one set of weights for the main feature and all shortcut levels.")
    grid: tuple[int, ...] = setting((2, 2), "Rows and columns of hi-res crops of an image.")
    remat: Literal["auto", "none", "dots", "full"] = setting("auto", "As vision.remat, for the fusion module.")


@dataclass(frozen=True)
class InjectingConfig:
    """How sources enter the layers of the LLM; the way of fusing says which of these it uses."""


@dataclass(frozen=True)
class TaskConfig:
    """What the model is trained for and tested on."""

    name: str = setting("answers", "Task: the name of a file in tasks.")


@dataclass(frozen=True)
class ShortcutConfig:
    """Which tower levels enter which LLM layers. The defaults are the paper's plan."""

    density: Literal["none", "dense", "sparse", "explicit", "random", "qwen3vl", "granite4", "lin_3_18_23"] = setting(
        "sparse",
        "Levels with a shortcut: none, all (dense), count of them (sparse), vit_levels (explicit); or a whole plan by name, "
        "see models/plans.py.",
    )
    count: int = setting(8, "Number of levels of a sparse, random or qwen3vl plan.")
    seed: int = setting(0, "Seed of a random plan.")
    distribution: Literal["uniform", "bottom", "top"] = setting(
        "uniform", "LLM layers that shortcuts enter: evenly spaced, the first ones (bottom) or the last ones (top)."
    )
    order: Literal["u", "parallel"] = setting(
        "u", "The deepest level enters the earliest LLM layer (u), or the latest one (parallel)."
    )
    position: Literal["pre", "post"] = setting(
        "pre", "Add before (pre) or after (post) the LLM layer; qwen3vl: after it."
    )
    feature_order_reverse: bool = setting(
        False,
        "Count levels from the deepest block and take block 0 as main feature, as the released code's option does.",
    )
    vit_levels: tuple[int, ...] = setting((), "Tower level of each shortcut of an explicit plan, from 0.")
    llm_layers: tuple[int, ...] = setting((), "LLM layer of each shortcut of an explicit plan, from 0.")


@dataclass(frozen=True)
class RopeConfig:
    """How rotary frequencies are scaled for longer texts; `llm.rope_theta` is their base."""

    kind: Literal["default", "linear", "llama3", "longrope"] = setting(
        "default", "Scaling rule; default scales nothing."
    )
    factor: float = setting(1.0, "linear, llama3: frequencies are divided by this.")
    low_freq_factor: float = setting(
        1.0, "llama3: wavelengths above original_length / this (in positions) are scaled in full."
    )
    high_freq_factor: float = setting(
        4.0, "llama3: wavelengths below original_length / this (in positions) are not scaled."
    )
    original_length: int = setting(0, "llama3, longrope: context length of the original training, in positions.")
    short_factor: tuple[float, ...] = setting(
        (), "longrope: divisor of each frequency in texts of up to original_length positions."
    )
    long_factor: tuple[float, ...] = setting((), "longrope: divisor of each frequency in longer texts.")
    attention_factor: float = setting(1.0, "longrope: multiplies cos and sin.")


@dataclass(frozen=True)
class LLMConfig:
    """Decoder: Llama, Mistral, Qwen2, Qwen3 or Phi-3, depending on its fields."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"] = setting(
        "llama", "Model family, which sets the tensor names and config.json of its files."
    )
    vocab_size: int = setting(0, "Rows of the embedding; 0: the tokenizer's ids, rounded up to a multiple of 64.")
    width: int = setting(64, "Channels of a token (D).")
    layers: int = setting(12, "Number of decoder layers.")
    heads: int = setting(4, "Query heads.")
    kv_heads: int = setting(2, "Key and value heads; they divide heads.")
    head_dim: int = setting(16, "Channels of a head, an even number.")
    mlp_dim: int = setting(192, "Hidden channels of the MLP.")
    activation: Activation = setting("silu", "Activation function of the MLP.")
    norm_eps: float = setting(1e-5, "Epsilon of the RMS norms.")
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies.")
    rope: RopeConfig = RopeConfig()
    max_positions: int = setting(0, "Context length in tokens, for exported files; 0: unknown.")
    qkv_bias: bool = setting(False, "Add a bias to queries, keys and values (Qwen2).")
    qk_norm: bool = setting(False, "Normalise each head of queries and keys before the rotation (Qwen3).")
    sliding_window: int = setting(0, "Positions that a token attends to, itself included (Mistral); 0: all before it.")
    sliding_from: int = setting(0, "First layer with a sliding window (Qwen2's max_window_layers).")
    tie_embeddings: bool = setting(False, "Use the embedding's weights for the output layer too.")
    scan_layers: bool = setting(True, "Compile the layers as one loop, which compiles faster than unrolled layers.")
    remat: Remat = setting("auto", REMAT)
    replicate_kv: bool = setting(
        False, "Give every device of the tensor axis all key and value heads, where kv_heads cannot be split over it."
    )

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the weight matrices that can have an adapter, without "/kernel"."""
        attention = tuple(f"llm/layers/attention/{name}" for name in ("q", "k", "v", "out"))
        mlp = tuple(f"llm/layers/mlp/{name}" for name in ("gate", "up", "down"))
        return attention + mlp + (() if self.tie_embeddings else ("llm/head",))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the LLM (arXiv 2106.09685), as parameters `..._lora_a` and `..._lora_b`."""

    rank: int = setting(0, "Rank of the adapters; 0: no adapters.")
    alpha: float = setting(256.0, "An adapter's output is multiplied by alpha / rank.")
    dropout: float = setting(0.0, "Probability that an adapter's input is dropped in training, 0 to below 1.")
    targets: tuple[str, ...] = setting(
        ("llm/layers/attention/(q|k|v|out)", "llm/layers/mlp/(gate|up|down)"),
        "Regular expressions for the matrices that get an adapter.",
    )


@dataclass(frozen=True)
class InitConfig:
    """Pretrained weights that the parts start from.

    Each source is a folder in Hugging Face layout, a file (.safetensors; .gguf for the LLM, .onnx for the tower) or a
    hub id. A part without a source is randomly initialised.

    A source's config.json sets sizes and more: of `vision` and `llm`, and for the fusion and whole models also `fusion`,
    `shortcuts`, `vision.select_layer` and `data.image_fit`. It replaces defaults and values from a file in configs/,
    since such a file describes models with and without sources. Values given on the command line, or listed in `keep`,
    override config.json, or are refused if the weights have another size.
    """

    model: str = setting(
        "", "Weights of a whole model (llava-hf layout or an export of `convert to-hf`); sets fusion and shortcuts too."
    )
    vision: str = setting("", "Weights of the vision tower.")
    llm: str = setting("", "Weights of the LLM.")
    fusion: str = setting("", "Weights of the fusion: mm_projector of LLaVA or SparseCut.")
    fresh: tuple[str, ...] = setting(
        (), "Regular expressions for parameters that may be missing in the files and are then initialised randomly."
    )
    image_size: int = setting(
        0, "Side of one view in pixels, for which position embeddings are interpolated; 0: the size in the files."
    )
    grow_vocab: bool = setting(
        False, "Add rows to the embedding for ids that only the tokenizer has, each the mean of the old rows."
    )
    keep: tuple[str, ...] = setting(
        (), "Settings that override a source's config.json; those on the command line are added automatically."
    )

    def decides(self, key: str) -> bool:
        """Whether a source's config.json may say this setting, as "llm.width"."""
        groups = {
            "vision": ("vision.",),
            "llm": ("llm.",),
            "fusion": ("fusion.", "shortcuts.", "vision.select_layer"),
            "model": ("vision.", "llm.", "fusion.", "injecting.", "shortcuts.", "task.", "data.image_fit"),
        }
        return any(getattr(self, part) and key.startswith(start) for part, start in groups.items())


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1, which is whatever the others leave."""

    replica: int = setting(1, "Copies of the model, one per slice, over slow links between slices.")
    data: int = setting(-1, "Devices that split the batch and each hold all parameters of a copy.")
    fsdp: int = setting(1, "Devices that split the batch and the parameters.")
    tensor: int = setting(1, "Devices that split each matmul (heads and hidden channels).")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows, in a mixture (`config.data.mix`)."""

    path: str = setting(
        "", "JSON, JSONL, Parquet, Arrow or tar file, folder of shards or dataset, tfds:NAME, easy_vqa or scenes."
    )
    images: str = setting("", "Folder that relative image paths start from.")
    weight: float = setting(1.0, "How often a row is seen per epoch; at 0.5 each epoch draws another half.")
    split: str = setting("train", "TFDS, DatasetDict or a folder of shards named by split: the split to read.")
    data_dir: str = setting("", "TFDS: folder where tfds:NAME is prepared; empty: TFDS's own.")
    image: str = setting("image", "Feature, column or tar member extension with the image; empty: none.")
    question: str = setting(
        "", "Feature or column with the question, or the question itself; empty: column question, or <image> alone."
    )
    answer: str = setting("caption", "Feature or column with the answer; if there is none of this name, column answer.")


@dataclass(frozen=True)
class ScenesConfig:
    """The generated pictures of source "scenes" (data/scenes.py)."""

    size: int = setting(0, "Side of a picture in pixels; 0: that of all hi-res crops together.")
    train: int = setting(20_000, "Number of training pictures.")
    test: int = setting(2_000, "Number of test pictures.")
    seed: int = setting(0, "Seed of the pictures.")
    levels: tuple[str, ...] = setting(("low", "high"), "Levels of information that questions ask for: low, high.")
    scales: tuple[str, ...] = setting(("coarse", "fine"), "Scales that questions ask for: coarse, fine.")


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    source: str = setting(
        "easy_vqa",
        "JSON, JSONL, Parquet, Arrow or tar file, folder of shards or dataset, tfds:NAME, easy_vqa or scenes.",
    )
    images: str = setting("", "Folder that relative image paths start from.")
    follow_links: bool = setting(False, "Follow links that lead out of a source's folder of images.")
    mix: dict[str, SourceConfig] = setting({}, "Several sources by name, instead of `source`.")
    scenes: ScenesConfig = ScenesConfig()
    image_fit: Literal["pad", "squash", "crop"] = setting("pad", "How an image becomes square.")
    max_pixels: int = setting(50_000_000, "Largest image in pixels; larger ones are refused before decoding.")
    max_images: int = setting(1, "Maximum number of images per row.")
    max_bad_fraction: float = setting(0.001, "Share of broken rows, 0 to 1, above which the run stops.")
    flip: bool = setting(False, "Mirror half of the training images; wrong where questions mention left or right.")
    shift: int = setting(0, "Move training images by up to this many low-res pixels.")
    holdout: int = setting(
        200, "Training rows held out for evaluation; -1: one in 20, 10 to 500 of them, but at most one in 5."
    )
    test: str = setting("", "Test rows, given like `source`; empty: the official test split or the held-out rows.")
    test_images: str = setting("", "Folder that image paths in `test` start from; empty: `images`.")
    threads: int = setting(2, "Reading threads per worker process; they do not change the order of rows.")
    workers: int = setting(0, "Extra processes that read data; they do not change the order of rows.")


@dataclass(frozen=True)
class TokenizerConfig:
    """A Hugging Face tokenizer, or a byte-level BPE trained on the training rows."""

    path: str = setting("", "Folder or hub id of a tokenizer; empty: that of the LLM's weights, else one is trained.")
    vocab_size: int = setting(512, "Maximum vocabulary size of a trained tokenizer.")


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: its rows, what is trained, and the optimizer's settings."""

    rows: Literal["captions", "conversations"] = setting(
        "conversations", "Train on rows as they are, or on captions of built-in sources."
    )
    sources: tuple[str, ...] = setting((), "Names in config.data.mix to train on; (): all.")
    template: Template = setting(
        "vicuna_v1", "How conversations become text; tokenizer: the tokenizer's own chat template."
    )
    batching: Literal["rows", "packed", "buckets"] = setting(
        "rows", "A sequence holds one row (rows) or several (packed); buckets: one row, in batches of similar length."
    )
    seq_len: int = setting(2048, "Length of a sequence in tokens (T), image tokens included.")
    buckets: tuple[int, ...] = setting(
        (), "Lengths below seq_len, in tokens, for batching=buckets; (): a quarter and a half of seq_len."
    )
    slots: int = setting(
        0, "Image slots of a sequence (M); 0: data.max_images, for packed rows what they need on average."
    )
    epochs: float = setting(1.0, "Passes over the rows.")
    max_steps: int = setting(0, "Maximum number of optimizer steps; 0: as many as the epochs take.")
    batch_size: int = setting(128, "Sequences per optimizer step, over all devices.")
    accumulate: int = setting(1, "Micro-batches that a batch is split into.")
    trainable: tuple[str, ...] = setting(
        ("fusion/.*", "llm/.*"), "Regular expressions for the parameters to train; all others stay frozen."
    )
    lr: float = setting(2e-5, "Peak learning rate.")
    lr_of: dict[str, float] = setting(
        {}, "Peak learning rates of some parameters, by regular expressions for the beginning of their path."
    )
    warmup: float = setting(0.03, "Share of the steps with linear warm-up, 0 to below 1.")
    final_lr: float = setting(0.0, "Learning rate at the end of the cosine decay, as a share of lr.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    clip_norm: float = setting(1.0, "Largest global norm of the gradients; 0: no clipping.")
    b1: float = setting(0.9, "Decay of Adam's first moment, 0 to below 1.")
    b2: float = setting(0.999, "Decay of Adam's second moment, 0 to below 1.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written."""

    every: int = setting(500, "Optimizer steps between checkpoints; 0: only at the end.")
    keep: int = setting(1, "Number of latest checkpoints to keep, besides the best one.")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    every: int = setting(500, "Optimizer steps between evaluations on held-out training rows; 0: never.")
    batch_size: int = setting(256, "Prompts per batch of generation.")
    max_new_tokens: int = setting(0, "Maximum answer length in tokens; 0: the longest test answer plus a margin.")
    prefill_chunk: int = setting(
        0, "Positions of a prompt that are read at a time, which bounds the memory of long prompts; 0: all at once."
    )
    test: bool = setting(True, "Evaluate on the test rows at the end of training.")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = setting(0, "Seed for initial weights, row order, augmentation and dropout.")
    workdir: str = setting("runs/base", "Folder that the run writes to and resumes from.")
    init_from: str = setting("", "Workdir of another run that weights are taken from.")
    init_parts: tuple[str, ...] = setting(
        ("vision/.*", "fusion/.*", "llm/.*"), "Regular expressions for the parameters taken from init_from."
    )
    init: InitConfig = InitConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of the computation; auto: bfloat16, on CPUs float32."
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of stored parameters; auto: float32 if trained, as small updates vanish in bfloat16, else dtype."
    )
    attention: Literal["auto", "xla", "tiled", "splash", "cudnn"] = setting(
        "auto", "Attention kernel; auto: tiled on CPUs, cudnn on GPUs, splash on TPUs, else xla."
    )
    loss_chunk: int = setting(
        256, "Positions of a row whose logits are in memory at the same time; smaller values save memory."
    )
    log_every: int = setting(10, "Optimizer steps between lines of metrics.")
    profile: str = setting("", "Optimizer steps to profile, as START:STOP; empty: none.")
    run_stages: tuple[str, ...] = setting(("align", "instruct"), "Names in `stages` to run, in this order.")
    stages: dict[str, StageConfig] = setting(
        {"align": StageConfig(), "instruct": StageConfig()}, "Stages of training, by name."
    )
    vision: VisionConfig = VisionConfig()
    fusion: FusionConfig = FusionConfig()
    injecting: InjectingConfig = InjectingConfig()
    shortcuts: ShortcutConfig = ShortcutConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def with_stage(self, name: str, **changes: Any) -> Config:
        """The config with settings of stage `name` changed."""
        return replace(self, stages={**self.stages, name: replace(self.stages[name], **changes)})
