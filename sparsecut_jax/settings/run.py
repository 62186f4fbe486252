"""Settings of a run: its task, weights, devices, data, stages, checkpoints and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsecut_jax.settings.fields import setting

Template = Literal["plain", "vicuna_v1", "llama3", "chatml", "mistral", "phi3", "smollm2", "qa", "tokenizer"]


@dataclass(frozen=True)
class TaskConfig:
    """What the model is trained for and tested on."""

    name: str = setting("answers", "Task: the name of a file in tasks.")


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
    view_size: int = setting(
        0, "Side in pixels at which views are cut, before they are enlarged to vision.image_size; 0: that size."
    )
    cache_features: Literal["none", "float16", "float32"] = setting(
        "none", "Compute the outputs of a frozen tower once, store them in this dtype and train on them."
    )
    features_dir: str = setting(
        "",
        "Folder of the stored features, which other runs with the same tower and pictures use too; empty: WORKDIR/features.",
    )
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
