"""`emma`: the question is mixed into the image's tokens, over the axis of tokens, before LLaVA's projector.

The original reads the question with CLIP's text encoder, 77 positions with padding; this way reads the LLM's word embeddings
of it, without gradient, and positions that hold no token add nothing. With x[N, C] the main feature and e[Tq, D] the words,

    t = gelu(e Wt + bt)         Wt[D, C]
    y^T = [x; t]^T Wf + bf      Wf[N + Tq, N] = [I; 0] and bf[N] = 0 before the first step, where y = x

Wf belongs to one image size: weights made for another N are refused by their shape. Rows without a question, as those of the
template "plain", train neither Wt nor the rows of Wf that read it. To begin with LLaVA's trained projector, name its file in
`init.fusion` and set `init.fresh=("fusion/fuse/mix/.*",)`. Source: EMMA (arXiv 2410.02080).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import Linear, weight, zeros
from sparsecut_jax.models.levels import Projector, gelu, main_level, patches
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import projector
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.emma.question",)
RULES = projector()
MOST = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of the question is read."""

    question: int = setting(77, "Tokens of the question that are read, from its start.")


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError for a number of tokens below 1 or above 1024."""
    if not 1 <= settings.question <= MOST:
        raise UserError(f"config.fusion.emma.question={settings.question}: expected 1 to {MOST} tokens")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    return Wiring(
        levels=(main_level(cfg),),
        positions=patches(cfg),
        entering=((),) * cfg.llm.layers,
        question=settings.question,
    )


def identity(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """[I; 0], an initialiser that draws nothing."""
    return jnp.eye(*shape, dtype=dtype)


class Mix(nn.Module):
    """Tokens [I, N, C] of images and their questions -> [I, N, C], in the dtype of the tokens."""

    @nn.compact
    def __call__(self, x: jax.Array, question: Question) -> jax.Array:
        _, tokens, channels = x.shape
        # Not split over the tensor axis: the many tokens of the image would then be gathered over it together with the text's.
        text = gelu(Linear(channels, ("embed", None), name="text")(question.words))
        text = jnp.where(question.there[..., None], text, 0)
        shape = (tokens + text.shape[1], tokens)
        kernel = weight(self, "kernel", shape, ("embed", None), identity, x.dtype)
        bias = weight(self, "bias", (tokens,), ("norm",), zeros, x.dtype)
        return jnp.einsum("IJC,JN->INC", jnp.concatenate([x, text], axis=1), kernel) + bias[:, None]


class Emma(nn.Module):
    """Tokens [I, N, C] of images and their questions -> [I, N, D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, question: Question) -> jax.Array:
        return Projector(self.width, name="projector")(Mix(name="mix")(x, question))


class Fuse(Fusing):
    """Level [1, I, 1, N, C] and question -> tokens [I, N, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        emma = rematted(Emma, self.config.remat, scanned=False)
        return Fused(emma(self.width, name="fuse")(seen.levels[0, :, 0], question))
