"""The fixtures of tests/parity (PyTorch's numbers; make_fixtures.py there wrote them), read through the loader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsecut_jax import config
from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.sparsecut import Encoded, SparseCut
from sparsecut_jax.runs.parameters import abstract_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch, empty_batch
from sparsecut_jax.weights import load, pretrained
from sparsecut_jax.weights.claims import adopt
from tiny import random_params

FOLDER = Path(__file__).parent / "parity"
INTERMEDIATES = ("hidden",)


@dataclasses.dataclass
class Loaded:
    cfg: Config
    model: SparseCut
    params: dict[str, Any]
    report: load.Report


def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "io.npz") as file:
        return dict(file)


def join(mesh=None, settings: dict[str, Any] | None = None, **init: Any) -> Loaded:
    """Parameters from the sources `init` names, the other parts drawn and tiny; `settings`: dotted keys."""
    raw = config.default()
    raw.vision.update(image_size=28, patch_size=7, width=32, layers=4, heads=2, mlp_dim=48, select_layer=-1)
    raw.llm.update(vocab_size=96, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_dim=48)
    raw.shortcuts.count = 2
    raw.init.update({key: str(value) if isinstance(value, Path) else value for key, value in init.items()})
    for key, value in (settings or {}).items():
        *path, last = key.split(".")
        group = raw
        for part in path:
            group = group[part]
        group[last] = value
    cfg = config.check(raw)
    found = pretrained.open_sources(cfg.init)
    cfg = adopt(cfg, found)
    mesh = mesh or sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model = build_model(cfg, intermediates=INTERMEDIATES)
    abstract = abstract_params(model, cfg, mesh)
    fillings, report = load.match(abstract, cfg, found)
    # Parts without a source get drawn values: compiling their initialisers would take most of the time.
    fresh = flatten(random_params(abstract))
    params = {
        path: jax.device_put(fresh[path].astype(leaf.dtype), leaf.sharding)
        for path, leaf in flatten(abstract).items()
        if path not in fillings
    }
    return Loaded(cfg, model, unflatten(params | load.read(fillings, cfg)), report)


def text_batch(ids: np.ndarray, cfg: Config) -> Batch:
    """int32[B, T] as rows without an image."""
    batch = empty_batch(spec_of(cfg, *ids.shape, slots=1, branched=True))
    batch.segments[:] = 1
    batch.positions[:] = np.arange(ids.shape[1])
    return batch.replace(tokens=ids)


def last_hidden(loaded: Loaded, ids: np.ndarray, image_start: np.ndarray, tokens: Any, bank: Any) -> np.ndarray:
    """Rows int32[B, T] with an image each, from int32[B] on: [B, T, D] after the last norm.

    tokens: [B, S, D]; bank: [R, B, S, D].
    """
    encoded = Encoded(tokens[:, None], bank[:, :, None], np.float32(0))
    start, segments = image_start[:, None], np.ones_like(ids)

    def run(model: SparseCut) -> jax.Array:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        x = model.embed(ids, start, encoded)
        return model.llm(x, positions, Packed(segments, None, positions, 1), model.sources(encoded, start, segments))[0]

    return np.asarray(jax.jit(lambda params: loaded.model.apply({"params": params}, method=run))(loaded.params))
