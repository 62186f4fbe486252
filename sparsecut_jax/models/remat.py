"""Remat policies by name: what a layer keeps for the backward pass (`remat` of config.vision, .fusion and .llm)."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import linen as nn

LAYER_INPUT = "layer_input"  # checkpoint name of a layer's input (`jax.ad_checkpoint.checkpoint_name`)

POLICIES: dict[str, Callable | None] = {
    # its input; all else is recomputed
    "full": None,
    # its input and the outputs of matmuls with weights, not those of attention's own matmuls
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # as "full", with the input in host memory
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematted(module: type[nn.Module], name: str, scanned: bool = True) -> type[nn.Module]:
    """`module` with the remat policy `name`; "none" and an unresolved "auto" keep everything.

    scanned: whether it is the body of a scan, where XLA cannot merge the recomputation with the first computation.
    """
    if name not in POLICIES:
        return module
    return nn.remat(module, policy=POLICIES[name], prevent_cse=not scanned)
