"""The whole model: tower, fusion and decoder joined by shortcuts. Parameters: {"vision", "fusion", "llm"}."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.fusion import Fusion, views_of
from sparsecut_jax.models.llm import Cache, Decoder, word_logits
from sparsecut_jax.models.shortcuts import Plan, plan_shortcuts, write_slots
from sparsecut_jax.models.vit import VisionTower
from sparsecut_jax.settings import Config, FusionConfig, LLMConfig, LoraConfig, VisionConfig
from sparsecut_jax.types import Batch


@flax.struct.dataclass
class Encoded:
    """Encoded images.

    tokens: [B, M, N, D], which replace the word embeddings at image positions.
    bank: [R, B, M, N, D], the sources of the shortcuts; None if the plan has none.
    aux_loss: float32[], the fusion's own loss.
    """

    tokens: jax.Array
    bank: jax.Array | None
    aux_loss: jax.Array

    def rows(self, index: jax.Array) -> Encoded:
        """The rows `index`, int32[B'], so that images encoded once serve several prompts."""
        bank = None if self.bank is None else self.bank[:, index]
        return Encoded(self.tokens[index], bank, self.aux_loss)


class SparseCut(nn.Module):
    """Batch in, logits out.

    Attributes:
      vision_config, fusion_config, llm_config: the parts' settings, with vocab_size resolved.
      plan: which tower level enters which LLM layer.
      dtype: of the computation; norms, softmax, logits and loss are always float32.
      intermediates: see `Decoder`.
      attention: backend, see models/attention.py.
      lora: adapters of the LLM's weight matrices.
    """

    vision_config: VisionConfig
    fusion_config: FusionConfig
    llm_config: LLMConfig
    plan: Plan
    dtype: Any = jnp.float32
    intermediates: tuple[str, ...] = ()
    attention: str = "xla"
    lora: LoraConfig = LoraConfig()

    def setup(self) -> None:
        # The main feature is a level like the others; the tower returns each level once, however often it is used.
        self.tower_levels = tuple(dict.fromkeys((self.plan.main_level, *self.plan.levels)))
        self.vision = VisionTower(self.vision_config, self.tower_levels, self.attention)
        self.fusion = Fusion(self.fusion_config, self.llm_config.width, self.attention)
        self.llm = Decoder(self.llm_config, self.plan, self.intermediates, self.attention, self.lora)

    def levels(self, views: jax.Array) -> jax.Array:
        """uint8[B, M, V, S, S, 3] -> [1 + K, B*M, V, N, C]: the main feature, then the plan's levels."""
        cfg = self.vision_config
        views = views[:, :, : views_of(self.fusion_config)]
        b, m, v, *pixels = views.shape
        mean, std = jnp.array(cfg.mean, jnp.float32), jnp.array(cfg.std, jnp.float32)
        x = views.astype(jnp.float32)
        if views.dtype == jnp.uint8:  # floats are taken as already normalised
            x = (x / 255.0 - mean) / std
        x = self.vision(x.astype(self.dtype).reshape(b * m * v, *pixels))
        x = x.reshape(len(self.tower_levels), b * m, v, *x.shape[2:])
        wanted = [self.tower_levels.index(level) for level in (self.plan.main_level, *self.plan.levels)]
        return x if wanted == list(range(len(wanted))) else x[jnp.array(wanted)]

    def encode(self, views: jax.Array) -> Encoded:
        """uint8[B, M, V, S, S, 3] (or float, already normalised) -> Encoded."""
        b, m = views.shape[:2]
        fused, aux_loss = self.fusion(self.levels(views))
        fused = fused.reshape(fused.shape[0], b, m, *fused.shape[2:])
        return Encoded(fused[0], fused[1:] if self.plan.levels else None, aux_loss)

    def embed(self, tokens: jax.Array, image_start: jax.Array, encoded: Encoded) -> jax.Array:
        """Word embeddings with the images written over their positions: [B, T, D]."""
        return write_slots(self.llm.embed(tokens, self.dtype), encoded.tokens, image_start, add=False)

    def hidden(self, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Returns two factors of the logits, [B, T, D'] after the final norm and [D', W] (see `Decoder.to_words`), and
        the intermediates with "aux_loss"."""
        encoded = self.encode(batch.views)
        x = self.embed(batch.tokens, batch.image_start, encoded)
        sight = Packed(batch.segments, batch.branches, batch.positions, batch.most_segments or x.shape[1])
        x, _, seen = self.llm(x, batch.positions, sight, encoded.bank, batch.image_start)
        return *self.llm.to_words(x), {**seen, "aux_loss": encoded.aux_loss}

    def __call__(self, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """Returns float32[B, T, W] logits, and the intermediates with "aux_loss"."""
        x, words, seen = self.hidden(batch)
        return word_logits(x, words), seen

    def prefill(
        self, tokens: jax.Array, length: jax.Array, image_start: jax.Array, encoded: Encoded, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts into the cache. In generation the shortcuts act on prompts only.

        Args:
          tokens: int32[B, T], padded on the right; length: int32[B], tokens of each prompt.

        Returns:
          float32[B, W] logits of the position after each prompt, and the cache.
        """
        b, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        real = positions < length[:, None]
        return self.read(tokens, positions, real, length - 1, length, image_start, encoded, cache)

    def read(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        last: jax.Array,
        length: jax.Array,
        image_start: jax.Array,
        encoded: Encoded,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Reads texts with images into the cache, from its first position on.

        Args:
          tokens: int32[B, T]; positions: int32[B, T], rotary ones; real: bool[B, T], False at padding.
          last: int32[B], where in T each text ends; length: int32[B], its number of tokens.

        Returns:
          float32[B, W] logits of the position after `last`, and the cache.
        """
        t = tokens.shape[1]
        mask = jnp.tril(jnp.ones((t, t), bool)) & real[:, None, :]
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, cache.k.shape[3] - t)))
        x = self.embed(tokens, image_start, encoded)
        x, cache, _ = self.llm(x, positions, mask, encoded.bank, image_start, cache, length[:, None])
        last = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self.llm.logits(last)[:, 0], cache

    def decode(
        self, token: jax.Array, position: jax.Array, visible: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads one more token, int32[B], at rotary position int32[B], which sees `visible`, bool[B, S], of the cache.

        Returns float32[B, W] logits of the position after it, and the cache. The keys of earlier positions stay as they
        are, also where longrope asks for other factors from this token on: `inference/decoding.py` sees to that.
        """
        x = self.llm.embed(token[:, None], self.dtype)
        lengths = position[:, None] + 1
        x, cache, _ = self.llm(x, position[:, None], visible[:, None, :], cache=cache, lengths=lengths)
        return self.llm.logits(x)[:, 0], cache


def build_model(cfg: Config, dtype: Any = jnp.float32, intermediates: tuple[str, ...] = ()) -> SparseCut:
    """The model of a config whose vocab_size is resolved.

    If the config is not resolved for a platform (backends.py), attention is "xla" and nothing is rematerialized.

    Raises:
      UserError: a plan of shortcuts that is impossible.
    """
    plan = plan_shortcuts(cfg.shortcuts, cfg.vision.layers, cfg.llm.layers, cfg.vision.select_layer)
    attention = "xla" if cfg.attention == "auto" else cfg.attention
    return SparseCut(cfg.vision, cfg.fusion, cfg.llm, plan, dtype, intermediates, attention, cfg.lora)
