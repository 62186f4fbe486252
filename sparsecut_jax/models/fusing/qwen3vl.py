"""`qwen3vl`: blocks of 2 x 2 tokens become one, by a merger for the input and one for each level, added after early layers.

With x[N, C] the main feature and x_k[N, C] the output of the k-th tower block that is read, LN with eps 1e-6, exact GELU and
S = N / 4 tokens, all of the low-res view:

    tokens = merge(LN_C(x)) W1, gelu, W2            W1[4C, 4C], W2[4C, D], with biases: the norm before the merge
    source_k = LN_4C(merge(x_k)) W1, gelu, W2       weights of its own: the norm after it

hidden[image positions] += source_k after LLM layer k = 0, 1, ..., without a gate. Weights begin as everywhere in this
framework, not as normal(0.02). The original's main feature is the output of the last block: vision.select_layer=-1.

Source: Qwen3-VL; Hugging Face `Qwen3VLVisionPatchMerger` and `Qwen3VLTextModel`.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.layers import LayerNorm, Linear
from sparsecut_jax.models.levels import gelu, merge_blocks, patches, side, stack, wiring_after_first_layers
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.rules import linear, norm
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")
OF_WEIGHTS = ("fusion.qwen3vl.levels", "fusion.qwen3vl.merge")
RULES = {
    "visual": [
        rule
        for path, name in (("merger", "merger"), ("level_mergers", "deepstack_merger_list.{i}"))
        for rule in (
            *norm(f"fusion/{path}/norm", f"{name}.norm"),
            *linear(f"fusion/{path}/fc1", f"{name}.linear_fc1"),
            *linear(f"fusion/{path}/fc2", f"{name}.linear_fc2"),
        )
    ]
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which levels are injected, and how many tokens become one."""

    levels: tuple[int, ...] = setting(
        (),
        "Tower blocks whose outputs enter after LLM layers 0, 1, ...; (): the last of each of the first three quarters.",
    )
    merge: int = setting(2, "Rows, and columns, of tokens that become one.")


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for impossible levels, and for a grid of tokens that blocks do not fill."""
    h, depth = side(cfg), cfg.vision.layers
    if settings.merge < 1 or h % settings.merge:
        raise UserError(
            f"config.fusion.qwen3vl.merge={settings.merge}: expected a divisor of the {h} rows and columns of tokens in a view"
        )
    # 5, 11 and 17 of 24 blocks, as in the released models of that depth.
    levels = settings.levels or tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3))
    return wiring_after_first_layers("config.fusion.qwen3vl.levels", levels, patches(cfg) // settings.merge**2, cfg)


class Merger(nn.Module):
    """[..., N, C] -> [..., S, D]. norm_first: whether the norm is over C, before the merge, or over the merged channels."""

    width: int
    merge: int
    norm_first: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = LayerNorm(1e-6, name="norm")
        x = merge_blocks(normed(x), self.merge) if self.norm_first else normed(merge_blocks(x, self.merge))
        x = Linear(x.shape[-1], ("embed", "mlp"), name="fc1")(x)
        return Linear(self.width, ("mlp", "embed"), name="fc2")(gelu(x))


class Fuse(Fusing):
    """Levels [1 + K, I, 1, N, C], the main feature first -> tokens [I, S, D], bank [K, I, S, D]."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels, merge = seen.levels[:, :, 0], self.settings.merge
        main = rematted(Merger, self.config.remat, scanned=False)
        others = stack(Merger, len(levels) - 1, self.config.remat)
        return Fused(
            main(self.width, merge, True, name="merger")(levels[0]),
            others(self.width, merge, False, name="level_mergers")(levels[1:]),
        )
