"""How a config becomes what a run reads: tokenizer and readers."""

from __future__ import annotations

from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.data.walk import RowEncoder
from sparsecut_jax.settings import Config
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import pretrained as weights


def make_tokenizer(
    cfg: Config, source: sources.Source, parts: dict[str, weights.WeightSource]
) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the LLM or of config.tokenizer; for an LLM trained from scratch, one trained on the rows."""
    tokenizer = weights.source_tokenizer(cfg, parts)
    if tokenizer is None and "llm" in parts:
        raise UserError(
            f"{parts['llm'].path} has no tokenizer; set config.tokenizer.path to a folder with the LLM's tokenizer"
        )
    return tokenizer or tokenizer_lib.train(source.texts(), cfg.tokenizer.vocab_size)


def make_reader(
    source: sources.Source, name: str, cfg: Config, tokenizer, pictures: pipeline.Images, holdout: bool = False
) -> pipeline.Reader:
    """The reader of a stage's training rows, or of its held-out rows, which are never augmented."""
    stage = cfg.stages[name]
    encoder = RowEncoder.of(stage, cfg.tokens_per_image, tokenizer)
    return pipeline.Reader(source.stage(stage, holdout), encoder, pictures, cfg.data.flip, cfg.data.shift)
