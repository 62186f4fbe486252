"""Sparse shortcuts: which tower level enters which decoder layer, as a pure function of the two depths and the config.

Source: SparseCut (arXiv 2602.00505).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsecut_jax.models import plans
from sparsecut_jax.settings import ShortcutConfig
from sparsecut_jax.types import UserError

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Shortcuts:
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
    def entering(self) -> tuple[tuple[int, ...], ...]:
        """For each layer of the LLM, the places in `levels` of the levels that enter it."""
        rows = self.levels.index
        return tuple(tuple(rows(v) for v, layer in self.pairs if layer == i) for i in range(self.llm_depth))


def evenly(count: int, n: int) -> list[int]:
    """`count` of `n` indices, evenly spaced: floor(linspace(0, n-1, count) + 0.5). 5 of 7 are 0, 2, 3, 5, 6."""
    return [int(i) for i in np.floor(np.linspace(0, n - 1, count) + 0.5)]


def depths_text(vit_depth: int, llm_depth: int) -> str:
    """What the errors say of the depths."""
    return f"the vision tower has {vit_depth} blocks (0 to {vit_depth - 1}) and the LLM {llm_depth} layers (0 to {llm_depth - 1})"


def block_of(select_layer: int, vit_depth: int, depths: str) -> int:
    """The block whose output is HF's `hidden_states[select_layer]`. Raises UserError, with `depths`, if there is none."""
    block = select_layer - 1 if select_layer > 0 else vit_depth + select_layer
    if select_layer == 0 or not 0 <= block < vit_depth:
        raise UserError(
            f"vision.select_layer={select_layer} is no block's output: {depths}; expected -{vit_depth} to -1 or 1 to {vit_depth}"
        )
    return block


def wire_shortcuts(cfg: ShortcutConfig, vit_depth: int, llm_depth: int, select_layer: int = -2) -> Shortcuts:
    """Shortcuts from a tower of `vit_depth` blocks to an LLM of `llm_depth` layers.

    Args:
      select_layer: HF index of the main feature; -2 is the output of the second-to-last block.

    Raises:
      UserError: a level or layer that does not exist, a pair twice, lists of unequal length, more levels than
        layers; the sentence names both depths and the pair.
    """
    depths = depths_text(vit_depth, llm_depth)
    levels, layers = _lists(cfg, vit_depth, llm_depth, depths)
    if cfg.feature_order_reverse:
        levels = [vit_depth - 1 - level for level in levels]
    pairs = list(zip(levels, layers, strict=True))
    for level, layer in pairs:
        if not (0 <= level < vit_depth and 0 <= layer < llm_depth):
            raise UserError(f"shortcut (vit level {level}, llm layer {layer}) can never fire: {depths}")
        if pairs.count((level, layer)) > 1:
            raise UserError(f"shortcut (vit level {level}, llm layer {layer}) is there twice: {depths}")
    main = block_of(select_layer, vit_depth, depths)
    if cfg.feature_order_reverse:
        main = 0  # the output of the tower's first block, as the released code has it
    position = "post" if cfg.density in plans.AFTER else cfg.position
    return Shortcuts(tuple(sorted(pairs, key=lambda p: (p[1], p[0]))), main, vit_depth, llm_depth, position)


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
    if cfg.density in plans.NAMED:
        try:
            return plans.NAMED[cfg.density](cfg, vit_depth, llm_depth)
        except UserError as error:
            raise UserError(f"shortcuts.density={cfg.density!r} {error}: {depths}") from None
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
