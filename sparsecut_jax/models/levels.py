"""Parts that ways of fusing share: one module for each level, the LLaVA projector, and where the crops' tokens belong."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Seen, Wiring
from sparsecut_jax.models.layers import ACTIVATIONS, Linear
from sparsecut_jax.models.remat import rematted
from sparsecut_jax.models.shortcuts import Shortcuts, block_of, depths_text, wire_shortcuts
from sparsecut_jax.settings import Config, FusionConfig

gelu = ACTIVATIONS["gelu"]  # the exact one


def patches(cfg: Config) -> int:
    """Tokens of one view (N)."""
    return (cfg.vision.image_size // cfg.vision.patch_size) ** 2


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


def each_level(module: type[nn.Module], count: int, config: FusionConfig) -> Any:
    """`module`, which maps one level [I, V, N, C] to [I, S, D], for `count` levels at once: [K, I, V, N, C] -> [K, I, S, D].

    With `config.fusion.shared` one set of weights serves all; otherwise parameters keep their names and get a leading axis, so that one
    table of names reads both forms.
    """
    # vmap, not a reshape to [K * I, ...]: merging the replicated axis of levels with the sharded axis of images would
    # all-gather the images.
    shared = config.shared
    return nn.vmap(
        rematted(module, config.remat, scanned=False),
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
    """Linear, GELU, Linear, both of output width `width`: LLaVA's `mlp2x_gelu`. [..., C] -> [..., D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(self.width, ("embed", "mlp"), name="fc1")(x)
        return Linear(self.width, ("mlp", "embed"), name="fc2")(gelu(x))
