"""Tables of the ways of fusing."""

from __future__ import annotations

from sparsecut_jax.models.rules import Tables, linear, norm, packed_attention, projector

FUSIONS: dict[str, Tables] = {
    "channel": projector(),
    "mlp": projector(),
    "cross_attention": projector(
        *packed_attention("fusion/fuse/attention", "attn"),
        *norm("fusion/fuse/norm1", "norm1"),
        *norm("fusion/fuse/norm2", "norm2"),
        *linear("fusion/fuse/ffn1", "ffn.0"),
        *linear("fusion/fuse/ffn2", "ffn.2"),
    ),
}
