"""`bcqlm`: image tokens attend, through a gate, to the question's word embeddings in the LLM, not to those of a text encoder.

The original pools the question with its text encoder's class token, and has no mask; this way pools by the mean of the words,
through which no gradient flows, and masks positions that hold no token. With x[N, C] the main feature and e[Tq, D] the words,

    x = x Wx                    Wx[C, D]
    a = attention(x, e, e)      8 heads, biases
    g = sigmoid(relu([x; mean of e] W1) w2)     W1[2D, D], w2[D, 1]: one gate per token
    y = LN(x + g a)
    y = LN(y + relu(y W3) W4)   W3[D, D], W4[D, D]; the same LN, of eps 1e-5

The words are as wide as the LLM, so the original's two matrices from the encoder's width to D are the identity. For an image
without a question, as in rows of the template "plain", a = 0. There is no dropout of a. Source: BcQLM (arXiv 2509.08715).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, Linear, MultiHeadAttention
from sparsecut_jax.models.levels import main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.runtime.sharding import constrain
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.bcqlm.heads",)
MOST = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the question is read."""

    question: int = setting(77, "Tokens of the question that are read, from its start.")
    heads: int = setting(8, "Heads of the attention to the question; they divide llm.width.")


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError for a number of tokens below 1 or above 1024, or heads that do not divide the LLM's width."""
    if not 1 <= settings.question <= MOST:
        raise UserError(f"config.fusion.bcqlm.question={settings.question}: expected 1 to {MOST} tokens")
    width = cfg.llm.width
    if settings.heads < 1 or width % settings.heads:
        raise UserError(
            f"config.fusion.bcqlm.heads={settings.heads}: expected a number that divides config.llm.width={width}"
        )


def sharded_sizes(settings: Settings, cfg: Config) -> dict[str, int]:
    return {"config.fusion.bcqlm.heads": settings.heads}


def wiring(settings: Settings, cfg: Config) -> Wiring:
    return Wiring(
        levels=(main_level(cfg),),
        positions=patches(cfg),
        entering=((),) * cfg.llm.layers,
        question=settings.question,
    )


class Ask(nn.Module):
    """Tokens [I, N, C] of images and their questions -> [I, N, D], in the dtype of the tokens."""

    heads: int
    width: int
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, question: Question) -> jax.Array:
        linear = lambda name, features, axes=("embed", "mlp"): Linear(features, axes, name=name)
        x = constrain(linear("project", self.width)(x), "batch", "length", "act_embed")
        there = question.there[..., None]  # [I, Tq, 1]
        words = jnp.where(there, question.words, 0).astype(x.dtype)
        word_count = there.sum(1)  # [I, 1]
        pooled = words.sum(1) / jnp.maximum(word_count, 1).astype(x.dtype)
        sight = jnp.broadcast_to(question.there[:, None], (*x.shape[:2], there.shape[1]))
        asked = MultiHeadAttention(self.heads, self.attention, name="attention")(x, words, sight)
        asked = jnp.where(word_count[..., None] > 0, asked, 0)
        both = jnp.concatenate([x, jnp.broadcast_to(pooled[:, None], x.shape)], axis=-1)
        gate = nn.sigmoid(linear("gate2", 1, ("embed", None))(nn.relu(linear("gate1", self.width)(both))))
        norm = LayerNorm(1e-5, name="norm")
        y = norm(x + gate * asked)
        return norm(y + linear("fc2", self.width, ("mlp", "embed"))(nn.relu(linear("fc1", self.width)(y))))


class Fuse(Fusing):
    """Level [1, I, 1, N, C] and question -> tokens [I, N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        ask = rematted(Ask, self.config.remat, scanned=False)
        return Fused(ask(self.settings.heads, self.width, self.attention, name="fuse")(seen.levels[0, :, 0], question))
