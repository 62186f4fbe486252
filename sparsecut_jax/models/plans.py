"""Shortcut plans by name: `config.shortcuts.density=NAME` makes all pairs of tower level and LLM layer.

With a tower of R blocks and an LLM of L layers, "nearest" rounding halves up:

random       count levels and count layers, all different: the levels in random order, the layers from the lowest up
qwen3vl      count levels, the shallowest first, after layers 0, 1, ...: level i R // (count + 1) - 1, i from 1. For the
             published tower of 24 blocks and 3 levels these are Qwen3-VL's 5, 11 and 17; its tower of 27 blocks has 8, 16
             and 24, which follow no common rule: give these as explicit pairs
deepstack    DeepStack: the second-to-last block before layers 1, 2, ..., count of them
granite4     Granite 4 Vision: of 27 blocks 26, 20, 14 and 8 before layers 0, 3, 6 and 9 of 40, so the deepest comes first
             and all enter the lower part of the LLM. Other depths: hidden state nearest to h R / 27, layer nearest to l L / 40,
             and layers 0 to 3 of an LLM of less than 14, as the way of fusing of this name
lin_3_18_23  arXiv 2503.06063: hidden states s = 3, 18 and 23 of 24 blocks before layer int(s L / 24 - 1), one for each stage
             of the tower. Another depth: hidden state nearest to s R / 24

Hidden state h is the output of block h - 1. Levels that meet in a layer of a shallow LLM add up. Each plan raises UserError for
depths that it cannot join; models/shortcuts.py completes the sentence.
"""

from __future__ import annotations

import hashlib

from sparsecut_jax.settings import ShortcutConfig
from sparsecut_jax.types import UserError

Lists = tuple[list[int], list[int]]  # levels and layers, pair by pair


def random(cfg: ShortcutConfig, vit_depth: int, llm_depth: int) -> Lists:
    most = min(vit_depth, llm_depth)
    if not 1 <= cfg.count <= most:
        raise UserError(f"cannot pick shortcuts.count={cfg.count} different levels and layers (expected 1 to {most})")

    def drawn(what: str, depth: int) -> list[int]:
        # A hash gives the same plan with every version of every library.
        key = lambda i: hashlib.sha256(f"{cfg.seed} {what} {i}".encode()).digest()
        return sorted(range(depth), key=key)[: cfg.count]

    return drawn("level", vit_depth), sorted(drawn("layer", llm_depth))


def qwen3vl(cfg: ShortcutConfig, vit_depth: int, llm_depth: int) -> Lists:
    most = min(vit_depth - 1, llm_depth)
    if not 1 <= cfg.count <= most:
        raise UserError(
            f"cannot add shortcuts.count={cfg.count} levels below the last one after as many layers (expected 1 to {most})"
        )
    return [i * vit_depth // (cfg.count + 1) - 1 for i in range(1, cfg.count + 1)], list(range(cfg.count))


def deepstack(cfg: ShortcutConfig, vit_depth: int, llm_depth: int) -> Lists:
    if vit_depth < 2:
        raise UserError("needs 2 blocks or more")
    if not 1 <= cfg.count < llm_depth:
        raise UserError(
            f"cannot enter shortcuts.count={cfg.count} layers from layer 1 on (expected 1 to {llm_depth - 1} layers)"
        )
    return [vit_depth - 2] * cfg.count, list(range(1, cfg.count + 1))


def granite4(cfg: ShortcutConfig, vit_depth: int, llm_depth: int) -> Lists:
    if min(vit_depth, llm_depth) < 4:
        raise UserError("needs 4 blocks and 4 layers or more")
    levels = [rounded(h * vit_depth, 27) - 1 for h in (27, 21, 15, 9)]
    return levels, [rounded(3 * i * llm_depth, 40) if llm_depth >= 14 else i for i in range(4)]


def lin_3_18_23(cfg: ShortcutConfig, vit_depth: int, llm_depth: int) -> Lists:
    if vit_depth < 4:
        raise UserError("needs 4 blocks or more")
    states = (3, 18, 23)
    return [rounded(s * vit_depth, 24) - 1 for s in states], [max(0, s * llm_depth // 24 - 1) for s in states]


def rounded(dividend: int, divisor: int) -> int:
    """The integer nearest to dividend / divisor, halves up."""
    return (2 * dividend + divisor) // (2 * divisor)


NAMED = {plan.__name__: plan for plan in (random, qwen3vl, deepstack, granite4, lin_3_18_23)}
COUNTED = ("sparse", "random", "qwen3vl", "deepstack")  # plans that read shortcuts.count
AFTER = ("qwen3vl",)  # plans that add after the layer, whatever shortcuts.position
