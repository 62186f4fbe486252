"""Every way of bringing vision into the LLM as a small model, for the laws that hold for all of them (test_ways.py).

A way is a case by being in the registry, and again for each value of its settings that are a choice of words.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from sparsecut_jax import config
from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models import ways
from sparsecut_jax.models.sparsecut import Encoded, SparseCut
from sparsecut_jax.runs.parameters import boxed_shapes
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import Batch, empty_batch
from tiny import random_params

B, SLOTS, WORDS = 8, 2, 64
QUESTION = 5  # tokens of a question that are read
PICTURES = 3

# Besides: settings that are no choice of words, but change where sources enter or what is made of them.
MORE = {
    "channel after the layer, a set for each level": dict(
        fusion=dict(name="channel", shared=False), shortcuts=dict(position="post")
    ),
    "deepstack with two projectors": dict(fusion=dict(name="deepstack", shared=False)),
    "mlp of another width": dict(fusion=dict(name="mlp", mlp=dict(hidden=40))),
    "repeat with a set for each level": dict(fusion=dict(name="repeat", shared=False)),
    "layalign without a prefix, two layers": dict(
        fusion=dict(name="layalign", layalign=dict(prefix=False, layers=(2, 0)))
    ),
    "granite4 without groups": dict(fusion=dict(name="granite4", granite4=dict(spatial=False, rate="1/4"))),
}
LAYERS = {"granite4": 6}  # of the LLM, where a way's sources need more than 4


def config_of(fusion: dict[str, Any], **groups: dict[str, Any]) -> Config:
    """16 tokens a view, two crops side by side; two levels enter LLM layer 2, none 1 and 3.

    The tower is as wide as it has to be for a tensor axis of two devices.
    """
    raw = config.default()
    raw.update(attention="xla", dtype="float32")
    raw.vision.update(image_size=16, patch_size=4, width=32, layers=4, heads=2, mlp_dim=40)
    raw.llm.update(vocab_size=WORDS, width=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=48)
    raw.llm.layers = LAYERS.get(fusion["name"], 4)
    raw.shortcuts.update(density="explicit", vit_levels=(3, 0, 1), llm_layers=(0, 2, 2))
    raw.fusion.grid = (1, 2)
    raw.stages.instruct.update(seq_len=512, batch_size=2)
    raw.data.max_images = SLOTS
    if "question" in raw.fusion.get(fusion["name"], {}):
        raw.fusion[fusion["name"]].question = QUESTION
    for group, values in {"fusion": fusion, **groups}.items():
        raw[group].update(values)
    odd = lambda: any(size % 2 for size in ways.sharded_sizes(config.check(raw)).values())
    while odd():
        raw.vision.width *= 2
    return config.check(raw)


def all_cases() -> dict[str, dict[str, Any]]:
    """{name: groups of settings}, for `config_of`."""
    cases = {}
    for name in ways.FUSING:
        cases[name] = dict(fusion=dict(name=name))
        for choice in _choices(ways.FUSING[name]):
            cases[" ".join((name, *choice.values()))] = dict(fusion={"name": name, name: choice})
        injecting = ways.wiring_of(config_of(**cases[name])).injecting
        for choice in _choices(ways.INJECTING[injecting]):
            cases[" ".join((name, *choice.values()))] = dict(fusion=dict(name=name), injecting={injecting: choice})
    return cases | MORE


def _choices(way: Any) -> list[dict[str, str]]:
    """The settings of a way, one at a time, in each of their choices of words but the default."""
    kind = getattr(way, "Settings", None)
    hints = typing.get_type_hints(kind) if kind else {}
    words = {field: typing.get_args(hint) for field, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    return [{field: word} for field in words for word in words[field] if word != getattr(kind(), field)]


@dataclasses.dataclass
class Case:
    """A small model and its functions, each compiled once. All its parameters are drawn, gates with a width that opens them."""

    name: str
    cfg: Config

    def __post_init__(self) -> None:
        self.model = build_model(self.cfg)
        self.wiring = self.model.wiring
        self.length = 16 + SLOTS * self.wiring.positions  # of a sequence (T)
        params = random_params(boxed_shapes(self.model, SLOTS))
        if "inject" in params["fusion"]:
            params["fusion"]["inject"] = jax.tree.map(lambda leaf: 4 * leaf, params["fusion"]["inject"])
        self.params = jax.device_put(params)
        self.step = jax.jit(jax.value_and_grad(functools.partial(loss, self.model), has_aux=True))

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the levels and views [B, K, V], and of the image tokens and the sources [B, 1 + R]: all one."""
        sizes = (len(self.wiring.levels), ways.view_count(self.wiring))
        return np.ones((B, *sizes), np.float32), np.ones((B, 1 + len(self.wiring.names)), np.float32)

    def logits(self, batch: Batch, factors: Any = None) -> np.ndarray:
        """float32[B, T, W]."""
        (_, (logits, _)), _ = self.step(self.params, batch, factors or self.whole)
        return np.asarray(logits)

    def encoded(self, batch: Batch) -> Encoded:
        return self.step(self.params, batch, self.whole)[0][1][1]

    def batch(self, rows: list[list[list[int]]]) -> Batch:
        """Rows of texts of word ids; -1, -2 and -3 are the three pictures, each with its own question.

        Empty slots hold pictures and questions, too: what nobody refers to must not matter. All words but the first of a
        text are targets.
        """
        rng = np.random.default_rng(0)
        batch = empty_batch(spec_of(self.cfg, B, self.length, SLOTS, most_segments=2))
        batch.views[:] = rng.integers(0, 256, batch.views.shape, np.uint8)
        pictures = rng.integers(0, 256, (PICTURES, *batch.views.shape[2:]), np.uint8)
        extras = {name: np.array(array) for name, array in batch.extras.items()}
        questions = rng.integers(1, WORDS, (PICTURES, QUESTION))
        if "question" in extras:
            extras["question"][:] = rng.integers(1, WORDS, extras["question"].shape)
        for b, texts in enumerate(rows):
            at = slot = 0
            for segment, text in enumerate(texts, 1):
                begin = at
                for word in text:
                    size = 1
                    if word < 0:
                        batch.image_start[b, slot], batch.views[b, slot] = at, pictures[-word - 1]
                        if "question" in extras:
                            extras["question"][b, slot] = questions[-word - 1]
                        slot, size = slot + 1, self.wiring.positions
                    else:
                        batch.tokens[b, at] = word
                        batch.loss_mask[b, at] = at > begin
                    at += size
                batch.segments[b, begin:at] = segment
                batch.positions[b, begin:at] = np.arange(at - begin)
        return batch.replace(extras=extras)


def loss(model: SparseCut, params: Any, batch: Batch, factors: Any) -> tuple[jax.Array, tuple[jax.Array, Encoded]]:
    """Mean cross-entropy and the way's own loss; logits and encoded images. `factors`: see `Case.whole`."""
    of_levels, of_sources = factors
    kept = {}

    def dim(call, inputs, named, context):
        out = call(*inputs, **named)
        if isinstance(context.module, SparseCut) and context.method_name == "levels":
            return out * of_levels.swapaxes(0, 1).repeat(SLOTS, 1)[..., None, None]
        if isinstance(context.module, SparseCut) and context.method_name == "encode":
            tokens, *sources = of_sources.T[..., None, None, None]
            bank = None if out.bank is None else out.bank * jnp.stack(sources)
            out = kept["encoded"] = out.replace(tokens=out.tokens * tokens, bank=bank)
        return out

    with nn.intercept_methods(dim):
        logits, seen = model.apply({"params": params}, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    mean = (losses * batch.loss_mask[:, 1:]).sum() / batch.loss_mask[:, 1:].sum()
    return mean + seen["aux_loss"], (logits, kept["encoded"])
