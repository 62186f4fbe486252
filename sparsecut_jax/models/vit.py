"""Vision transformer that returns the outputs of any of its blocks.

Source: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343; no class token, no pre-norm) and DINOv2 (arXiv 2304.07193;
LayerScale), as computed by the Hugging Face models of these names. Level i is the output of block i, 0-based (HF
`hidden_states[i + 1]`), without class token and post-layernorm; level -1 is the input of the first block (HF
`hidden_states[0]`). Blocks above the highest requested level do not exist: they have no parameters and cost nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from sparsecut_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, MultiHeadAttention, normal, ones, weight
from sparsecut_jax.models.remat import LAYER_INPUT, rematted
from sparsecut_jax.runtime.sharding import constrain
from sparsecut_jax.settings import VisionConfig


class Block(nn.Module):
    """Pre-norm transformer block that also writes its output into the bank of levels.

    carry: (x[I, P, C], bank[K + 1, I, P, C]), P tokens including the class token; row: int32[], row of the bank for this
    block's output (K, the spare row, if it is not a requested level).
    """

    config: VisionConfig
    attention: str

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array], row: jax.Array):
        cfg, (x, bank) = self.config, carry
        x = checkpoint_name(x, LAYER_INPUT)
        y = LayerNorm(cfg.norm_eps, name="norm1")(x)
        y = MultiHeadAttention(cfg.heads, self.attention, name="attention")(y)
        x += self.scaled("scale1", y)
        y = LayerNorm(cfg.norm_eps, name="norm2")(x)
        y = constrain(Linear(cfg.mlp_dim, ("embed", "mlp"), name="fc1")(y), "batch", "length", "act_mlp")
        y = Linear(cfg.width, ("mlp", "embed"), name="fc2")(ACTIVATIONS[cfg.activation](y))
        x = constrain(x + self.scaled("scale2", y), "batch", "length", "act_embed")
        bank = jax.lax.dynamic_update_index_in_dim(bank, x, row, 0)
        return (x, bank), None

    def scaled(self, name: str, y: jax.Array) -> jax.Array:
        """y with LayerScale (arXiv 2103.17239), if the tower has it."""
        if not self.config.layer_scale:
            return y
        return y * weight(self, name, (self.config.width,), ("norm",), ones).astype(y.dtype)


class VisionTower(nn.Module):
    """Normalised images float[I, S, S, 3] -> outputs of the blocks in `levels`.

    Attributes:
      config: shape of the whole tower.
      levels: 0-based blocks whose outputs are returned, without duplicates; -1 is the first block's input.
      attention: backend, see models/attention.py.
    """

    config: VisionConfig
    levels: tuple[int, ...]
    attention: str = "xla"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the levels in the order of `self.levels`: [K, I, N, C] in the dtype of `images`."""
        cfg = self.config
        patch, width = cfg.patch_size, cfg.width
        count, side = images.shape[0], cfg.image_size // cfg.patch_size

        # A convolution with stride = kernel size is a matmul over patches.
        # Pixels beyond the last whole patch are cut off: SigLIP so400m sees 378 of its 384 pixels.
        x = images[:, : side * patch, : side * patch].reshape(count, side, patch, side, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(count, side * side, patch * patch * 3)
        x = Linear(width, ("patch", "embed"), use_bias=cfg.patch_bias, name="patch_embedding")(x)
        if cfg.class_token:
            token = weight(self, "class_embedding", (width,), ("norm",), normal(width**-0.5))
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (count, 1, width)), x], 1)
        position = weight(self, "position_embedding", (x.shape[1], width), (None, "embed"), normal(width**-0.5))
        x += position.astype(x.dtype)
        if cfg.pre_norm:
            x = LayerNorm(cfg.norm_eps, name="pre_norm")(x)
        x = constrain(x, "batch", "length", "act_embed")

        depth = max(self.levels) + 1
        spare = len(self.levels)
        rows = jnp.array([self.levels.index(i) if i in self.levels else spare for i in range(depth)])
        bank = constrain(jnp.zeros((spare + 1, *x.shape), x.dtype), "bank", "batch", "length", "act_embed")
        if -1 in self.levels:
            bank = bank.at[self.levels.index(-1)].set(x)
        (_, bank), _ = nn.scan(
            rematted(Block, cfg.remat, cfg.scan_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=depth,
            unroll=1 if cfg.scan_layers else depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.attention, name="blocks")((x, bank), rows)
        return bank[:spare, :, int(cfg.class_token) :]
