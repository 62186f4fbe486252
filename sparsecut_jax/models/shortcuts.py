"""Sparse shortcuts: which tower level enters which decoder layer, and how.

A plan is a pure function of the two depths and the config. `inject` adds fused levels from the bank to the image positions
of the hidden state. Source: SparseCut (arXiv 2602.00505).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.settings import ShortcutConfig
from sparsecut_jax.types import EMPTY_SLOT, UserError

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shortcuts of a model.

    Attributes:
      pairs: (vit_level, llm_layer), both 0-based, sorted by layer.
      main_level: tower block whose fused output fills the image positions of the input embeddings.
      vit_depth, llm_depth: blocks of the tower, layers of the LLM.
      position: "pre" adds before the layer runs, "post" after it.
    """

    pairs: tuple[Pair, ...]
    main_level: int
    vit_depth: int
    llm_depth: int
    position: str = "pre"

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct levels of the shortcuts, in the order of the bank's rows."""
        return tuple(dict.fromkeys(level for level, _ in self.pairs))

    @property
    def route(self) -> np.ndarray:
        """int32[L, A], A >= 1: rows of the bank that enter each layer, -1 for none."""
        entering = [[self.levels.index(v) for v, layer in self.pairs if layer == i] for i in range(self.llm_depth)]
        widest = max(1, *(len(rows) for rows in entering)) if entering else 1
        return np.array([rows + [-1] * (widest - len(rows)) for rows in entering], np.int32)


def evenly(count: int, n: int) -> list[int]:
    """`count` of `n` indices, evenly spaced: floor(linspace(0, n-1, count) + 0.5). 5 of 7 are 0, 2, 3, 5, 6."""
    return [int(i) for i in np.floor(np.linspace(0, n - 1, count) + 0.5)]


def plan_shortcuts(cfg: ShortcutConfig, vit_depth: int, llm_depth: int, select_layer: int = -2) -> Plan:
    """Plan for a tower of `vit_depth` blocks and an LLM of `llm_depth` layers.

    Args:
      select_layer: HF index of the main feature; -2 is the output of the second-to-last block.

    Raises:
      UserError: a level or layer that does not exist, a pair twice, lists of unequal length, more levels than
        layers; the sentence names both depths and the pair.
    """
    depths = f"the vision tower has {vit_depth} blocks (0 to {vit_depth - 1}) and the LLM {llm_depth} layers (0 to {llm_depth - 1})"
    levels, layers = _lists(cfg, vit_depth, llm_depth, depths)
    if cfg.feature_order_reverse:
        levels = [vit_depth - 1 - level for level in levels]
    pairs = list(zip(levels, layers, strict=True))
    for level, layer in pairs:
        if not (0 <= level < vit_depth and 0 <= layer < llm_depth):
            raise UserError(f"shortcut (vit level {level}, llm layer {layer}) can never fire: {depths}")
        if pairs.count((level, layer)) > 1:
            raise UserError(f"shortcut (vit level {level}, llm layer {layer}) is there twice: {depths}")
    main = select_layer - 1 if select_layer > 0 else vit_depth + select_layer
    if cfg.feature_order_reverse:
        main = 0  # the output of the tower's first block, as the released code has it
    if select_layer == 0 or not 0 <= main < vit_depth:
        raise UserError(
            f"vision.select_layer={select_layer} is no block's output: {depths}; expected -{vit_depth} to -1 or 1 to {vit_depth}"
        )
    return Plan(tuple(sorted(pairs, key=lambda p: (p[1], p[0]))), main, vit_depth, llm_depth, cfg.position)


def _lists(cfg: ShortcutConfig, vit_depth: int, llm_depth: int, depths: str) -> tuple[list[int], list[int]]:
    """Levels and layers of a plan, pair by pair, not yet checked against the depths."""
    if cfg.density == "none":
        return [], []
    if cfg.density == "explicit":
        if len(cfg.vit_levels) != len(cfg.llm_layers) or not cfg.vit_levels:
            raise UserError(
                f"shortcuts.vit_levels has {len(cfg.vit_levels)} entries and shortcuts.llm_layers {len(cfg.llm_layers)}; "
                f"expected two lists of equal length, at least 1: {depths}"
            )
        return list(cfg.vit_levels), list(cfg.llm_layers)
    count = vit_depth if cfg.density == "dense" else cfg.count
    if not 1 <= count <= vit_depth:
        raise UserError(f"shortcuts.count={count} levels cannot be picked: {depths}; expected 1 to {vit_depth}")
    if cfg.distribution != "uniform" and count > llm_depth:
        which = "first" if cfg.distribution == "bottom" else "last"
        raise UserError(
            f"shortcuts.distribution={cfg.distribution!r} enters the {which} {count} layers, one level each: {depths}; "
            f"expected at most {llm_depth} levels, or shortcuts.distribution='uniform'"
        )
    levels = evenly(count, vit_depth)
    if cfg.distribution == "uniform":
        layers = evenly(count, llm_depth)
    else:
        first = 0 if cfg.distribution == "bottom" else llm_depth - count
        layers = [first + i for i in range(count)]
    return (levels[::-1] if cfg.order == "u" else levels), layers


def write_slots(hidden: jax.Array, values: jax.Array, image_start: jax.Array, add: bool) -> jax.Array:
    """Writes (or adds) the tokens of every image to its run of positions.

    Uses one windowed update per slot rather than a scatter: under a mesh, a scatter made XLA all-gather the activations.
    An empty slot writes back what it read.

    Args:
      hidden: [B, T, D].
      values: [B, M, N, D].
      image_start: int32[B, M], first position of each run, -1 for an empty slot.
      add: whether to add to the hidden state rather than overwrite it.

    Returns:
      [B, T, D] in the dtype of `hidden`; unchanged if T < N, as in a short text without image.
    """
    if hidden.shape[1] < values.shape[2]:
        return hidden
    for m in range(values.shape[1]):
        hidden = jax.vmap(_write_slot, in_axes=(0, 0, 0, None))(
            hidden, values[:, m].astype(hidden.dtype), image_start[:, m], add
        )
    return hidden


def _write_slot(row: jax.Array, value: jax.Array, start: jax.Array, add: bool) -> jax.Array:
    filled = start != EMPTY_SLOT
    start = jnp.maximum(start, 0)
    old = jax.lax.dynamic_slice_in_dim(row, start, value.shape[0], 0)
    new = old + value if add else value
    return jax.lax.dynamic_update_slice_in_dim(row, jnp.where(filled, new, old), start, 0)


def read_slots(hidden: jax.Array, image_start: jax.Array, length: int) -> jax.Array:
    """[B, T, D] -> [B, M, N, D], N = length: the runs that `write_slots` writes to; zeros for empty slots."""
    read = jax.vmap(jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, length, 0), (None, 0)))
    runs = read(hidden, jnp.maximum(image_start, 0))
    return jnp.where((image_start != EMPTY_SLOT)[..., None, None], runs, 0)


def inject(hidden: jax.Array, bank: jax.Array, route: jax.Array, image_start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """hidden[image positions] += the sources of this layer. A plain add as in the reference: no gate, no weights.

    Args:
      hidden: [B, T, D].
      bank: [R, B, M, N, D].
      route: int32[A], rows of the bank for this layer, -1 for none.
      image_start: int32[B, M].

    Returns:
      hidden, and float32[A]: norm of the added values over norm of the values before, over the whole batch (0 where
      nothing was added).
    """
    ratios = []
    if hidden.shape[1] < bank.shape[-2]:  # too short to contain an image
        return hidden, jnp.zeros(route.shape[0])
    for a in range(route.shape[0]):
        on = route[a] >= 0
        source = jnp.where(on, bank[jnp.maximum(route[a], 0)], 0)
        filled = (image_start != EMPTY_SLOT)[..., None, None]
        stood = read_slots(jax.lax.stop_gradient(hidden), image_start, source.shape[-2])
        added = jnp.where(filled, jax.lax.stop_gradient(source), 0)
        ratios.append(_norm(added) / jnp.maximum(_norm(stood), 1e-30))
        hidden = write_slots(hidden, source, image_start, add=True)
    return hidden, jnp.stack(ratios)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
