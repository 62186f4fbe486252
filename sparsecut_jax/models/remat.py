"""What a layer keeps from the forward to the backward pass, by name (`remat` of config.vision, .fusion and .llm)."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import linen as nn

LAYER_INPUT = "layer_input"  # the name that a layer gives its input (`jax.ad_checkpoint.checkpoint_name`)

POLICIES: dict[str, Callable | None] = {
    # its input alone; all else is computed again
    "full": None,
    # its input and the results of matrix products with weights, attention's own products not among them
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # as "full", and the input waits in the host's memory
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematted(module: type[nn.Module], name: str, scanned: bool = True) -> type[nn.Module]:
    """`module` with the policy `name`; "none" and an unresolved "auto" keep everything.

    scanned: it is the body of a loop, where XLA cannot take what is computed again for what was computed before.
    """
    if name not in POLICIES:
        return module
    return nn.remat(module, policy=POLICIES[name], prevent_cse=not scanned)
