"""Every setting there is, with its default.

A file in configs/ starts from these (`config.default()`) and changes what its idea is about; `config.check` turns
the result into a `Config`, and the program reads nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

# What a layer keeps from forward to backward (models/remat.py); auto: "full" on accelerators, "none" on CPU.
Remat = Literal["auto", "none", "dots", "full", "offload"]


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: CLIP, SigLIP or DINOv2 by its fields. Sizes are in pixels of one view."""

    family: Literal["clip", "siglip", "siglip2", "dinov2"] = "clip"  # names and config.json of its weights' files
    image_size: int = 32
    patch_size: int = 8
    width: int = 64
    layers: int = 12
    heads: int = 4
    mlp_dim: int = 256
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    layer_scale: bool = False  # a factor per channel after attention and after the MLP (DINOv2)
    select_layer: int = -2  # main feature, HF index into hidden_states: -2 is the last block but one
    scan_layers: bool = True
    remat: Remat = "auto"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0..1, CLIP's
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def tokens_per_image(self) -> int:
        """Patches of one view (N)."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class FusionConfig:
    """How low- and hi-res tokens of a level become tokens of the LLM."""

    name: Literal["channel", "cross_attention", "mlp"] = "channel"
    shared: bool = True  # one set of weights for the main feature and all levels
    grid: tuple[int, ...] = (2, 2)  # rows and columns of hi-res crops (V = 1 + rows * columns); `mlp` reads none
    remat: Literal["auto", "none", "dots", "full"] = "auto"


@dataclass(frozen=True)
class ShortcutConfig:
    """Which tower levels enter which LLM layers. The defaults are the paper's plan."""

    density: Literal["none", "dense", "sparse", "explicit"] = "sparse"
    count: int = 8  # levels of a sparse plan
    distribution: Literal["uniform", "bottom", "top"] = "uniform"
    order: Literal["u", "parallel"] = "u"  # u: deepest level to the earliest layer
    position: Literal["pre", "post"] = "pre"  # before or after the layer
    feature_order_reverse: bool = False  # the released code's option of that name
    vit_levels: tuple[int, ...] = ()  # for density="explicit"
    llm_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class RopeConfig:
    """How rotary frequencies are stretched for longer texts; `llm.rope_theta` is their base."""

    kind: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0  # linear and llama3: frequencies are divided by it
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / this are stretched wholly,
    high_freq_factor: float = 4.0  # and those below original_length / this not at all
    original_length: int = 0  # positions the model was first trained on
    short_factor: tuple[float, ...] = ()  # longrope: divisors for texts up to original_length, one per frequency,
    long_factor: tuple[float, ...] = ()  # and for longer ones
    attention_factor: float = 1.0  # longrope: multiplies cos and sin


@dataclass(frozen=True)
class LLMConfig:
    """Decoder: Llama, Mistral, Qwen2, Qwen3 or Phi-3 by its fields."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"] = "llama"  # as for the tower
    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 64
    width: int = 64
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp_dim: int = 192
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope: RopeConfig = RopeConfig()
    max_positions: int = 0  # longest text it was made for, 0: not known; only written into exports
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # RMSNorm of every head of q and k, before the rotation (Qwen3)
    sliding_window: int = 0  # positions a layer sees, itself included (Mistral); 0: all
    sliding_from: int = 0  # first layer with a window (Qwen2's max_window_layers)
    tie_embeddings: bool = False
    scan_layers: bool = True
    remat: Remat = "auto"
    replicate_kv: bool = False  # a tensor axis that kv_heads cannot be split over: every device has all of them

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the matrices that an adapter may stand beside, without "/kernel"."""
        attention = tuple(f"llm/layers/attention/{name}" for name in ("q", "k", "v", "out"))
        mlp = tuple(f"llm/layers/mlp/{name}" for name in ("gate", "up", "down"))
        return attention + mlp + (() if self.tie_embeddings else ("llm/head",))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside linears of the LLM (arXiv 2106.09685), as parameters `..._lora_a` and `..._lora_b`."""

    rank: int = 0  # 0: none
    alpha: float = 256.0  # what they add is scaled by alpha / rank
    dropout: float = 0.0  # of their input, in training
    targets: tuple[str, ...] = ("llm/layers/attention/(q|k|v|out)", "llm/layers/mlp/(gate|up|down)")  # regexes on
    # `LLMConfig.linears`


@dataclass(frozen=True)
class InitConfig:
    """Pretrained weights that the parts start from; their config.json decides the sizes of `vision` and `llm`.

    Each source is a folder in Hugging Face layout, a file (.safetensors; .gguf for the LLM, .onnx for the tower) or a
    hub id. A part without a source is freshly initialised.
    """

    model: str = ""  # a whole one: llava-hf layout, or what `convert to-hf` wrote; sets fusion and shortcuts too
    vision: str = ""
    llm: str = ""
    fusion: str = ""  # mm_projector of LLaVA or SparseCut
    fresh: tuple[str, ...] = ()  # regexes on parameter paths that may be missing in the files
    image_size: int = 0  # of one view; 0: the tower's own, else its position embeddings are interpolated
    grow_vocab: bool = False  # rows for ids that only the tokenizer has, the mean of the old rows


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1, what is left over."""

    replica: int = 1  # copies of the model across slices, which slow links join
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows, in a mixture (`config.data.mix`).

    `path` is a JSON or JSONL file of conversations, the folder of a TFDS dataset (`data build` makes one),
    "tfds:NAME", "easy_vqa" or "scenes".
    """

    path: str = ""
    images: str = ""  # folder that the image paths of a JSON file start from
    weight: float = 1.0  # how often a row is seen per epoch; of 0.5 each epoch draws another half
    split: str = "train"  # of a TFDS dataset, as are the four below
    data_dir: str = ""  # where "tfds:NAME" is prepared; "": TFDS's own place
    image: str = "image"  # its feature that holds the picture; "": none
    question: str = ""  # its feature that holds the question, or a text with <image> in it; "": <image> alone
    answer: str = "caption"  # its feature that holds the answer


@dataclass(frozen=True)
class ScenesConfig:
    """The procedural pictures of source "scenes" (data/scenes.py)."""

    size: int = 0  # side of a picture in pixels; 0: of all hi-res crops together
    train: int = 20_000  # pictures
    test: int = 2_000
    seed: int = 0
    levels: tuple[str, ...] = ("low", "high")  # which questions are asked
    scales: tuple[str, ...] = ("coarse", "fine")


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    source: str = "easy_vqa"  # as SourceConfig.path
    images: str = ""  # folder that the image paths of a JSON file start from
    mix: dict[str, SourceConfig] = field(default_factory=dict)  # several sources by name, in place of `source`
    scenes: ScenesConfig = ScenesConfig()
    image_fit: Literal["pad", "squash", "crop"] = "pad"  # how an image becomes square
    max_pixels: int = 50_000_000  # larger images are refused before decoding
    max_images: int = 1  # images of a row, at most
    max_bad_fraction: float = 0.001  # of the rows; the run stops when more of them are broken
    flip: bool = False  # mirror training images half of the time; not where questions speak of left and right
    shift: int = 0  # move training images by up to so many low-res pixels
    holdout: int = 200  # training rows kept for the periodic evaluation
    threads: int = 2  # reading threads, per worker process; no influence on the order
    workers: int = 0  # processes that read beside the training one; no influence on the order


@dataclass(frozen=True)
class TokenizerConfig:
    """A Hugging Face tokenizer (folder or hub id), or a byte-level BPE trained on the training rows."""

    path: str = ""
    vocab_size: int = 512  # of the trained one, at most


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: its rows, what is trained, and the optimizer's settings."""

    rows: Literal["captions", "conversations"] = "conversations"
    sources: tuple[str, ...] = ()  # names in config.data.mix; (): all
    template: Literal["plain", "vicuna_v1", "llama3", "chatml", "mistral", "phi3", "smollm2", "qa", "tokenizer"] = (
        "vicuna_v1"  # data/conversation.py writes them out; "tokenizer": the tokenizer's own chat template
    )
    batching: Literal["rows", "packed", "buckets"] = "rows"  # one row a sequence, several, or rows of a like length
    seq_len: int = 2048  # T; an image takes N of these positions
    buckets: tuple[int, ...] = ()  # lengths shorter than seq_len for batching="buckets"; (): a quarter and a half
    slots: int = 0  # image slots of a sequence (M); 0: data.max_images, or what packed rows need on average
    epochs: float = 1.0
    max_steps: int = 0  # 0: as many as the epochs take
    batch_size: int = 128  # rows of all devices together, per optimizer step
    accumulate: int = 1  # micro-batches the batch is cut into
    trainable: tuple[str, ...] = ("fusion/.*", "llm/.*")  # regexes on parameter paths
    lr: float = 2e-5
    lr_of: dict[str, float] = field(default_factory=dict)  # other rates, by regexes that paths begin with
    warmup: float = 0.03  # share of the steps
    final_lr: float = 0.0  # share of lr at the end of the cosine
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0: no clipping
    b1: float = 0.9
    b2: float = 0.999


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # optimizer steps; 0: only at the end
    keep: int = 1  # latest ones; the best one is kept besides


@dataclass(frozen=True)
class EvalConfig:
    every: int = 500  # optimizer steps between evaluations on held-out training rows; 0: never
    batch_size: int = 256  # prompts per generation batch
    max_new_tokens: int = 8
    test: bool = True  # generate answers for the test split at the end


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    workdir: str = "runs/base"
    init_from: str = ""  # workdir of another run whose parts this one starts from
    init_parts: tuple[str, ...] = ("vision/.*", "fusion/.*", "llm/.*")  # regexes: what is taken from it
    init: InitConfig = InitConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 except on CPU
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of stored parameters; auto: float32 where they are
    # trained, since small updates are lost in bfloat16, else `dtype`; `convert` keeps what the files hold.
    attention: Literal["auto", "xla", "tiled", "splash", "cudnn"] = "auto"  # models/attention.py
    loss_chunk: int = 256  # positions of a row whose logits exist at one time
    log_every: int = 10
    profile: str = ""  # "START:STOP", optimizer steps to trace
    run_stages: tuple[str, ...] = ("align", "instruct")  # names in `stages`, in this order
    stages: dict[str, StageConfig] = field(default_factory=lambda: {"align": StageConfig(), "instruct": StageConfig()})
    vision: VisionConfig = VisionConfig()
    fusion: FusionConfig = FusionConfig()
    shortcuts: ShortcutConfig = ShortcutConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraConfig = LoraConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def tokens_per_image(self) -> int:
        """Positions that one image takes in the LLM (N)."""
        return self.vision.tokens_per_image

    def with_stage(self, name: str, **changes: Any) -> Config:
        """The config with settings of stage `name` changed."""
        return replace(self, stages={**self.stages, name: replace(self.stages[name], **changes)})
