"""The whole model: tower, fusion and decoder, joined as the wiring says. Parameters: {"vision", "fusion", "llm"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.interfaces import Question, Sources, Wiring
from sparsecut_jax.models.llm import Cache, Decoder, word_logits
from sparsecut_jax.models.losses import chunked_cross_entropy
from sparsecut_jax.models.slots import belonging, write_slots
from sparsecut_jax.models.vit import VisionTower
from sparsecut_jax.models.ways import INJECTING, view_count
from sparsecut_jax.settings import FusionConfig, InjectingConfig, LLMConfig, LoraConfig, VisionConfig
from sparsecut_jax.types import EMPTY_SLOT, NO_TOKEN, Batch, Extra


@flax.struct.dataclass
class Encoded:
    """Encoded images.

    tokens: [B, M, S, D], which replace the word embeddings at image positions.
    bank: [R, B, M, Sr, D], the sources that are injected; None without any.
    aux_loss: float32[], the fusion's own loss.
    """

    tokens: jax.Array
    bank: jax.Array | None
    aux_loss: jax.Array

    def rows(self, index: jax.Array) -> Encoded:
        """The rows `index`, int32[B'], so that images encoded once serve several prompts."""
        bank = None if self.bank is None else self.bank[:, index]
        return Encoded(self.tokens[index], bank, self.aux_loss)


def normalised(views: jax.Array, cfg: VisionConfig, dtype: Any) -> jax.Array:
    """uint8[..., 3] -> pixels as the tower reads them; floats are taken as already normalised."""
    x = views.astype(jnp.float32)
    if views.dtype == jnp.uint8:
        x = (x / 255.0 - jnp.array(cfg.mean, jnp.float32)) / jnp.array(cfg.std, jnp.float32)
    return x.astype(dtype)


class SparseCut(nn.Module):
    """Batch in, logits out.

    Attributes:
      vision_config, fusion_config, llm_config: the parts' settings, with vocab_size resolved.
      wiring: which tower levels the fusion reads, and which layers its sources enter.
      dtype: of the computation; norms, softmax, logits and loss are always float32.
      intermediates: see `Decoder`.
      attention: backend, see models/attention.py.
      lora: adapters of the LLM's weight matrices.
      injecting_config: settings of the ways of injecting.
      extras: {name: Extra}, what it reads of `Batch.extras`.
      task_settings: its task's own; None if that has none.
    """

    vision_config: VisionConfig
    fusion_config: FusionConfig
    llm_config: LLMConfig
    wiring: Wiring
    dtype: Any = jnp.float32
    intermediates: tuple[str, ...] = ()
    attention: str = "xla"
    lora: LoraConfig = LoraConfig()
    injecting_config: InjectingConfig = InjectingConfig()
    extras: Mapping[str, Extra] = FrozenDict()
    task_settings: Any = None

    def setup(self) -> None:
        # The tower returns each level once, however often the fusion reads it.
        self.tower_levels = tuple(dict.fromkeys(self.wiring.levels))
        self.vision = VisionTower(self.vision_config, self.tower_levels, self.attention)
        self.fusion = Fusion(self.fusion_config, self.wiring, self.llm_config, self.attention)
        self.llm = Decoder(
            self.llm_config, self.wiring, self.intermediates, self.attention, self.lora, self.injecting_config
        )

    @property
    def in_decode(self) -> bool:
        """Whether generated tokens look at the sources."""
        return INJECTING[self.wiring.injecting].in_decode

    def levels(self, views: jax.Array) -> jax.Array:
        """uint8[B, M, V, S, S, 3] -> [K, B*M, V, N, C], the levels of the wiring.

        Stored features, [B, M, V, N, K' * C] with each level once, are taken as they are, and the tower is left out.
        """
        views = views[:, :, : view_count(self.wiring)]
        b, m, v, n, *_ = views.shape
        if views.ndim == 5:
            x = jnp.stack(jnp.split(views.astype(self.dtype).reshape(b * m, v, n, -1), len(self.tower_levels), axis=-1))
        else:
            x = normalised(views, self.vision_config, self.dtype)
            x = self.vision(x.reshape(b * m * v, *views.shape[3:]))
            x = x.reshape(len(self.tower_levels), b * m, v, *x.shape[2:])
        wanted = [self.tower_levels.index(level) for level in self.wiring.levels]
        return x if wanted == list(range(len(wanted))) else x[jnp.array(wanted)]

    def encode(self, views: jax.Array, question: jax.Array | None = None) -> Encoded:
        """uint8[B, M, V, S, S, 3] (or float, already normalised; or stored features, see `levels`) -> Encoded.

        question: int32[B, M, Tq], tokens of the question about each image, NO_TOKEN where there is none; only for wirings
        that read it. Raises ValueError if it is missing.
        """
        b, m = views.shape[:2]
        asked = None
        if self.wiring.question:
            if question is None:
                raise ValueError(f"fusion {self.fusion_config.name!r} reads the question of each image")
            ids = question.reshape(b * m, -1)
            words = jax.lax.stop_gradient(self.llm.embed(jnp.maximum(ids, 0), self.dtype))
            asked = Question(ids != NO_TOKEN, words)
        fused = self.fusion(self.levels(views), asked, m)
        by_row = lambda x: x.reshape(b, m, *x.shape[-2:])
        bank = None if fused.bank is None else fused.bank.reshape(-1, b, m, *fused.bank.shape[-2:])
        return Encoded(by_row(fused.tokens), bank, fused.aux_loss)

    def embed(
        self, tokens: jax.Array, image_start: jax.Array, encoded: Encoded, first: jax.Array | None = None
    ) -> jax.Array:
        """Word embeddings with the images written over their positions: [B, T, D]. first: see `write_slots`."""
        return write_slots(self.llm.embed(tokens, self.dtype), encoded.tokens, image_start, add=False, first=first)

    def sources(
        self,
        encoded: Encoded,
        image_start: jax.Array,
        segments: jax.Array,
        first: jax.Array | None = None,
        length: int = 0,
    ) -> Sources | None:
        """What the layers inject into rows of texts `segments`, int32[B, T], or into `length` positions from `first` on."""
        if encoded.bank is None:
            return None
        own = after = None
        if self.in_decode:
            own, after = belonging(segments, image_start, self.wiring.positions)
            if first is not None:
                own, after = (jax.lax.dynamic_slice_in_dim(x, first, length, 1) for x in (own, after))
        return Sources(encoded.bank, image_start, own, after, self.fusion.site_weights(), first)

    def hidden(self, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Returns two factors of the logits, [B, T, D'] after the final norm and [D', W] (see `Decoder.to_words`), and
        the intermediates with "aux_loss"."""
        encoded = self.encode(batch.views, batch.extras.get("question"))
        x = self.embed(batch.tokens, batch.image_start, encoded)
        sight = Packed(batch.segments, batch.branches, batch.positions, batch.most_segments or x.shape[1])
        x, _, seen = self.llm(x, batch.positions, sight, self.sources(encoded, batch.image_start, batch.segments))
        return *self.llm.to_words(x), {**seen, "aux_loss": encoded.aux_loss}

    def __call__(self, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """Returns float32[B, T, W] logits, and the intermediates with "aux_loss"."""
        x, words, seen = self.hidden(batch)
        return word_logits(x, words), seen

    def loss(self, batch: Batch, chunk: int) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """The loss of a batch, as a sum and the count that it is divided by, so that micro-batches and devices add up.

        Here: next-token cross-entropy over the target tokens. chunk: positions of a row whose logits exist at once.

        Returns:
          float32[], float32[], and the intermediates with "aux_loss"; a loss over words adds "words", the two factors of
          the logits that `hidden` returns.
        """
        hidden, words, seen = self.hidden(batch)
        return *chunked_cross_entropy(hidden, words, batch, chunk), {**seen, "words": (hidden, words)}

    def prefill(
        self,
        tokens: jax.Array,
        length: jax.Array,
        image_start: jax.Array,
        encoded: Encoded,
        cache: Cache,
        chunk: int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts into the cache.

        Args:
          tokens: int32[B, T], padded on the right; length: int32[B], tokens of each prompt.
          chunk: positions that are read at a time; 0: all.

        Returns:
          float32[B, W] logits of the position after each prompt, and the cache.
        """
        b, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        real = positions < length[:, None]
        return self.read(tokens, positions, real, length - 1, length, image_start, encoded, cache, chunk)

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
        chunk: int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Reads texts with images into the cache, from its first position on.

        Args:
          tokens: int32[B, T]; positions: int32[B, T], rotary ones; real: bool[B, T], False at padding.
          last: int32[B], where in T each text ends; length: int32[B], its number of tokens.
          chunk: positions that are read at a time; 0: all. A chunk may end within an image.

        Returns:
          float32[B, W] logits of the position after `last`, and the cache.
        """
        t = tokens.shape[1]
        size = min(chunk or t, t)

        def part(model: SparseCut, cache: Cache, first: Any, size: int, fill: bool) -> tuple[jax.Array, Cache]:
            """Reads `size` positions from `first` on; returns [B, D] at `last`, if that is among them, and the cache."""
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 1)
            place = first + jnp.arange(size)
            mask = (place[:, None] >= jnp.arange(t)) & real[:, None, :]
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, cache.k.shape[3] - t)))
            start = None if size == t else jnp.asarray(first, jnp.int32)
            x = model.embed(cut(tokens), image_start, encoded, start)
            # Each row is one text, with its padding: an image without positions may be the last of it.
            sources = model.sources(encoded, image_start, jnp.ones_like(tokens), start, size)
            x, cache, _ = model.llm(x, cut(positions), mask, sources, cache, length[:, None], fill)
            at = jnp.clip(last - first, 0, size - 1)
            return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0], cache

        # The first chunk is the odd one; the others, of equal size, are one compiled loop.
        odd = t - (t - 1) // size * size
        hidden, cache = part(self, cache, 0, odd, True)

        def step(model: SparseCut, carry: tuple, first: jax.Array) -> tuple:
            hidden, cache = carry
            new, cache = part(model, cache, first, size, False)
            return (jnp.where((last >= first)[:, None], new, hidden), cache), None

        if odd < t:
            over = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
            (hidden, cache), _ = over(self, (hidden, cache), jnp.arange(odd, t, size))
        return self.llm.logits(hidden[:, None])[:, 0], cache

    def decode(
        self, token: jax.Array, position: jax.Array, visible: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads one more token, int32[B], at rotary position int32[B], which sees `visible`, bool[B, S], of the cache.

        Returns float32[B, W] logits of the position after it, and the cache. The keys of earlier positions stay as they
        are, also where longrope asks for other factors from this token on: `inference/decoding.py` sees to that.
        """
        x = self.llm.embed(token[:, None], self.dtype)
        lengths, sources = position[:, None] + 1, None
        if cache.sources is not None:
            look = (cache.image_start != EMPTY_SLOT)[:, None, :]  # all images stand before a generated token
            sources = Sources(None, cache.image_start, look, look, self.fusion.site_weights())
        x, cache, _ = self.llm(x, position[:, None], visible[:, None, :], sources, cache, lengths, fill=False)
        return self.llm.logits(x)[:, 0], cache
