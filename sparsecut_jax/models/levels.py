"""Parts that ways of fusing share: one module for each level, the LLaVA projector, blocks of tokens, and the crops' cells."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Seen, Wiring
from sparsecut_jax.models.layers import ACTIVATIONS, Linear
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.shortcuts import Shortcuts, block_of, depths_text, wire_shortcuts
from sparsecut_jax.settings import Config, FusionConfig
from sparsecut_jax.types import UserError

gelu = ACTIVATIONS["gelu"]  # the exact one


def patches(cfg: Config) -> int:
    """Tokens of one view (N)."""
    return side(cfg) ** 2


def side(cfg: Config) -> int:
    """Rows, and columns, of the tokens of one view (h; N = h * h)."""
    return cfg.vision.image_size // cfg.vision.patch_size


def heads_of(width: int) -> int:
    """Attention heads of 64 channels each, at least one."""
    return max(1, width // 64)


def main_level(cfg: Config) -> int:
    """Block whose output is the main feature (`vision.select_layer`). Raises UserError if there is none."""
    depth = cfg.vision.layers
    return block_of(cfg.vision.select_layer, depth, depths_text(depth, cfg.llm.layers))


def shortcut_wiring(cfg: Config, grid: tuple[int, ...] | None) -> Wiring:
    """Wiring of a way that fuses each level on its own, by `config.shortcuts`. Raises UserError if these are impossible."""
    shortcuts = wire_shortcuts(cfg.shortcuts, cfg.vision.layers, cfg.llm.layers, cfg.vision.select_layer)
    return wiring_of_shortcuts(shortcuts, patches(cfg), grid)


def wiring_of_shortcuts(shortcuts: Shortcuts, positions: int, grid: tuple[int, ...] | None = None) -> Wiring:
    """The main feature stands at an image's positions, the levels of the shortcuts are injected."""
    return Wiring(
        levels=(shortcuts.main_level, *shortcuts.levels),
        positions=positions,
        entering=shortcuts.entering,
        names=tuple(f"vit{level}" for level in shortcuts.levels),
        grid=grid,
        position=shortcuts.position,
        shortcuts=shortcuts,
    )


def wiring_after_first_layers(setting: str, levels: tuple[int, ...], positions: int, cfg: Config) -> Wiring:
    """Wiring of a way whose k-th level enters after LLM layer k, beside the main feature at the image's positions.

    setting: name of the setting that holds the levels, for the errors.

    Raises UserError for a level that is no block's output or that is named twice, and for more levels than LLM layers.
    """
    depth, layers = cfg.vision.layers, cfg.llm.layers
    if len(set(levels)) < len(levels) or not all(0 <= level < depth for level in levels):
        raise UserError(f"{setting}={levels}: expected different blocks of the vision tower, from 0 to {depth - 1}")
    if len(levels) > layers:
        raise UserError(
            f"{setting}={levels}: {len(levels)} levels enter after one LLM layer each, but the LLM has {layers} layers"
        )
    return Wiring(
        levels=(main_level(cfg), *levels),
        positions=positions,
        entering=tuple((layer,) if layer < len(levels) else () for layer in range(layers)),
        names=tuple(f"vit{level}" for level in levels),
        position="post",
    )


def each_level(module: type[nn.Module], count: int, config: FusionConfig) -> Any:
    """`module`, which maps one level [I, V, N, C] to [I, S, D], for `count` levels at once: [K, I, V, N, C] -> [K, I, S, D].

    With `config.fusion.shared` one set of weights serves all; otherwise parameters keep their names and get a leading axis, so that one
    table of names reads both forms.
    """
    return stack(module, count, config.remat, config.shared)


def stack(module: type[nn.Module], count: int, remat: str, shared: bool = False) -> Any:
    """`module` for `count` inputs at once, along a leading axis of every input: one set of weights each, or one for all."""
    # vmap, not a reshape to [K * I, ...]: merging the replicated axis of levels with the sharded axis of images would
    # all-gather the images.
    return nn.vmap(
        rematted(module, remat, scanned=False),
        in_axes=0,
        axis_size=count,
        variable_axes={"params": None if shared else 0},
        split_rngs={"params": not shared},
        metadata_params={} if shared else {nn.PARTITION_NAME: "layers"},
    )


def level_per_source(fused: jax.Array, seen: Seen) -> Fused:
    """Fused levels [K, I, S, D]: the first stands at the image's positions, the others are the sources."""
    count, images, *sizes = fused.shape
    # Split before it is cut: the other way round XLA copies the bank.
    fused = fused.reshape(count, images // seen.slots, seen.slots, *sizes)
    return Fused(fused[0], fused[1:] if count > 1 else None)


def merge_blocks(x: jax.Array, size: int) -> jax.Array:
    """Each block of size x size tokens as one token of many channels: [..., N, C] -> [..., N / size^2, size^2 * C].

    N = h * h tokens in row-major order, h a multiple of `size`. Blocks are in row-major order, and so are the tokens of a
    block along the channels. This is Qwen3-VL's merge as well as Idefics' pixel shuffle.
    """
    *lead, n, c = x.shape
    blocks = math.isqrt(n) // size
    x = x.reshape(*lead, blocks, size, blocks, size, c)
    return x.swapaxes(-4, -3).reshape(*lead, blocks * blocks, size * size * c)


def crops_to_cells(crops: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Aligns the tokens of the crops with the low-res token that covers the same place.

    A grid of r x s crops (each h x h tokens) forms a canvas of rh x sh tokens. Low-res token (y, x) covers the r x s
    canvas cells from (ry, sx) on: (2y, 2x), (2y, 2x+1), (2y+1, 2x), (2y+1, 2x+1) for 2 x 2.

    Args:
      crops: [..., r*s, N, C], N = h*h; crops and their tokens in row-major order.
      grid: (r, s).

    Returns:
      [..., N, r*s, C], the covered cells in row-major order.
    """
    *lead, _, n, c = crops.shape
    r, s = grid
    h = round(n**0.5)
    i = len(lead)
    canvas = crops.reshape(*lead, r, s, h, h, c).swapaxes(i + 1, i + 2).reshape(*lead, h, r, h, s, c)
    return canvas.swapaxes(i + 1, i + 2).reshape(*lead, n, r * s, c)


class Projector(nn.Module):
    """Linear to `hidden` channels, GELU, Linear to `width`: LLaVA's `mlp2x_gelu`. [..., C] -> [..., D]. hidden=0: `width`, as in LLaVA."""

    width: int
    hidden: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(self.hidden or self.width, ("embed", "mlp"), name="fc1")(x)
        return Linear(self.width, ("mlp", "embed"), name="fc2")(gelu(x))
