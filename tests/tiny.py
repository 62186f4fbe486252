"""A model of a few thousand weights, its parameters and its batches, for all tests.

Sizes differ from one another where they can (3 x 3 tokens, 5 blocks, 7 layers, widths 24 and 32), so that
swapped axes cannot hide.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from sparsecut_jax import config
from sparsecut_jax.models import parameters
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs.parameters import boxed_shapes
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch, UserError, batch_spec, empty_batch

IMAGE = -200  # in a row of word ids: an image goes here, N positions long
N = 9
PLAN = ((4, 0), (2, 3), (0, 6))  # shortcuts of the default config
LONGROPE = dict(
    kind="longrope", original_length=12, short_factor=(1.0, 1.1, 1.3, 1.6), long_factor=(1.2, 2.5, 5.0, 9.0)
)


def tiny_config(**groups: dict[str, Any]) -> Config:
    """The checked config; `tiny_config(llm=dict(layers=2))` changes single settings of a group, `top` those without one."""
    raw = config.default()
    raw.vision.update(image_size=12, patch_size=4, width=24, layers=5, heads=2, mlp_dim=40)
    raw.llm.update(vocab_size=64, width=32, layers=7, heads=4, kv_heads=2, head_dim=8, mlp_dim=48)
    raw.shortcuts.update(count=3)
    raw.update(groups.pop("top", {}))
    for group, values in groups.items():
        raw[group].update(values)
    return config.check(raw)


def random_params(abstract: Any, seed: int = 0) -> dict[str, Any]:
    """Values for a tree of shapes: no bias is zero and no scale is one, so that each of them matters."""
    rng = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(nn.meta.unbox(abstract), sep="/")

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape).astype(np.float32)
        if path.endswith("scale"):
            return 1 + 0.2 * noise
        return (0.1 if path.endswith("bias") else 0.15) * noise

    return traverse_util.unflatten_dict({path: value(path, leaf.shape) for path, leaf in flat.items()}, sep="/")


def params_of(model: nn.Module, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    return random_params(shapes["params"], seed)


def matrices_of(model: SparseCut) -> dict[str, bool]:
    """{path: whether the parameter is a matrix}."""
    return parameters.matrices(boxed_shapes(model, 1))


def make_batch(
    rows: list[list[int]],
    length: int = 32,
    slots: int = 2,
    answers: int | list[int] = 2,
    seed: int = 0,
    positions: int = N,
) -> Batch:
    """Rows of word ids with IMAGE where an image goes, `positions` long; the last `answers` ids of each row are supervised.

    Every slot has a picture, also the empty ones: what nobody refers to must not matter.
    """
    rng = np.random.default_rng(seed)
    count = len(rows)
    answers = [answers] * count if isinstance(answers, int) else answers
    batch = empty_batch(batch_spec(count, length, slots, (5, 12, 12, 3), branched=True))
    for b, row in enumerate(rows):
        ids: list[int] = []
        slot = 0
        for word in row:
            if word == IMAGE:
                batch.image_start[b, slot] = len(ids)
                slot += 1
            ids += [0] * positions if word == IMAGE else [word]
        batch.tokens[b, : len(ids)] = ids
        batch.segments[b, : len(ids)] = 1
        batch.loss_mask[b, len(ids) - answers[b] : len(ids)] = 1
    batch.positions[:] = np.arange(length)
    return batch.replace(views=rng.integers(0, 256, batch.views.shape, np.uint8))


@dataclasses.dataclass
class Tiny:
    """A model with parameters; calling it gives the logits of a batch, through one jitted function."""

    cfg: Config
    model: SparseCut
    params: dict[str, Any]

    @classmethod
    def build(cls, **groups: dict[str, Any]) -> Tiny:
        cfg = tiny_config(**groups)
        model = build_model(cfg, intermediates=("hidden", "shortcut_ratio"))
        return cls(cfg, model, jax.device_put(params_of(model, make_batch([[1]]))))

    def __post_init__(self) -> None:
        self.apply = jax.jit(lambda params, batch: self.model.apply({"params": params}, batch))

    def __call__(self, batch: Batch) -> np.ndarray:
        return np.asarray(self.apply(self.params, batch)[0])


def refusal(read, *inputs, **named) -> str:
    """The one sentence with which `read` refuses its inputs."""
    with pytest.raises(UserError) as caught:
        read(*inputs, **named)
    text = str(caught.value)
    assert "\n" not in text
    return text
