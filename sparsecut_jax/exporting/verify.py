"""Reads an exported model back and compares it with its run."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
from flax import traverse_util

from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.exporting.export import portable
from sparsecut_jax.models import ways
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runs.setup import Shaped, open_weights
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config, InitConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch, UserError, empty_batch
from sparsecut_jax.weights import load
from sparsecut_jax.weights.tensors import read_json


def verify(run: Run, folder: str, drop_shortcuts: bool) -> str:
    """Loads the export in `folder` and compares parameters bit by bit, and logits on a built-in batch.

    Returns a line that says so.

    Raises:
      UserError: they differ.
    """
    config = read_json(os.path.join(folder, "config.json"))
    whole = "text_config" in config
    part = "model" if whole else "llm" if "vocab_size" in config else "vision"
    cfg, expected = portable(run, drop_shortcuts and config["model_type"] == "llava")
    before = build_model(cfg)
    depth, opened = cfg.vision.layers, open_weights(dataclasses.replace(cfg, init=InitConfig(**{part: folder})))
    cfg = opened.config
    if not whole:
        # A tower alone is written with the blocks that it has, and the fusion may count those of the whole one.
        cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, layers=depth))
    after = Shaped(cfg, run.mesh, build_model(cfg))
    old = traverse_util.flatten_dict(expected, sep="/")
    abstract = after.abstract(lambda path: old[path].dtype)  # frozen and trained ones differ
    fillings, _ = load.match(abstract, cfg, opened.weight_sources)
    loaded = load.read(fillings, cfg)
    for path, leaf in loaded.items():
        was, now = np.asarray(old[path]), np.asarray(leaf)
        if path in ("llm/embedding", "llm/head"):  # rows for the image token may have been appended
            now = now[: was.shape[0], : was.shape[1]]
        if was.dtype != now.dtype or was.tobytes() != now.tobytes():
            raise UserError(f"--verify: {path} in the export differs from the run's")
    batch = _example(cfg, run.config.llm.vocab_size, max(2, sharding.data_parallel(run.mesh)))
    batch = jax.device_put(batch, sharding.batch_sharding(run.mesh))
    run_model = lambda model, flat: jax.jit(model.apply)({"params": traverse_util.unflatten_dict(flat, sep="/")}, batch)
    was = np.asarray(run_model(before, old)[0])
    now = np.asarray(run_model(after.model, {**old, **loaded})[0])[..., : was.shape[-1]]
    off = float(np.abs(was - now).max())
    if not off <= 1e-5 * max(1.0, float(np.abs(was).max())):
        raise UserError(f"--verify: the export's logits differ by {off:g} from the run's")
    return f"verified   {len(loaded)} arrays bit by bit, logits on a built-in batch differ by at most {off:g}"


def _example(cfg: Config, words: int, rows: int) -> Batch:
    """Rows of random ids; every second one has an image near its start, and a question about it for ways that read it."""
    batch, rng = empty_batch(spec_of(cfg, rows, ways.positions(cfg) + 16, 1)), np.random.default_rng(0)
    batch.segments[:] = 1
    batch.positions[:] = np.arange(batch.tokens.shape[1])
    batch.image_start[::2] = 1
    if "question" in batch.extras:
        batch.extras["question"][...] = rng.integers(0, words, batch.extras["question"].shape, np.int32)
    tokens = rng.integers(0, words, batch.tokens.shape, np.int32)
    batch = batch.replace(tokens=tokens, views=rng.integers(0, 256, batch.views.shape, np.uint8))
    if "question" in batch.extras:
        batch.extras["question"][:] = rng.integers(0, words, batch.extras["question"].shape)
    return batch
