"""How a parameter is named and laid out in foreign files: one rule each.

Torch stores a linear weight as (out, in); here kernels are (in, out), attention kernels have separate head axes, and the
layers of a stack share one array with a leading axis. A change of layout is an einops pattern, theirs -> ours.

A way of fusing has its own tables, `RULES: Tables`: by the prefix of the tensors in a file, rules whose names go on after
the prefix and a dot. Parameters that no table names, also those of a way without RULES, are tensors "fusion.<path with
dots>", as they are. A way with the table LLAVA can be written for LLaVA's readers, if it fuses the low-res view alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LINEAR = "o i -> i o"
HEADS_IN, HEADS_BIAS, HEADS_OUT = "(q h) c -> c q h", "(q h) -> q h", "c (q h) -> q h c"
LLAVA = "multi_modal_projector"  # prefix of llava-hf's projector, and of ours
LLAVA_OFFICIAL = "mlp2x_gelu"  # its `mm_projector_type` in official files


@dataclass(frozen=True)
class Rule:
    """One parameter and the tensor that holds it. Rules with the same name share its rows, in the order of their table.

    Attributes:
      path: path of the parameter.
      name: short name of the tensor (`weights.families.part_and_name`); {i} is the layer or level of a stacked parameter.
      layout: einops pattern, theirs -> ours; "" if they are the same.
      sizes: axes of the pattern whose sizes do not follow from the parameter's shape.
      repeated: the parameter is stacked, but the name has no {i}: the tensor fills every row.
    """

    path: str
    name: str
    layout: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    repeated: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading axis that the tensor does not have."""
        return self.repeated or "{i}" in self.name


Tables = Mapping[str, Sequence[Rule]]


def norm(path: str, name: str) -> list[Rule]:
    """Scale and bias of a LayerNorm."""
    return [Rule(f"{path}/scale", f"{name}.weight"), Rule(f"{path}/bias", f"{name}.bias")]


def linear(path: str, name: str) -> list[Rule]:
    """Kernel and bias of a linear layer."""
    return [Rule(f"{path}/kernel", f"{name}.weight", LINEAR), Rule(f"{path}/bias", f"{name}.bias")]


def attention(path: str, names: Mapping[str, str]) -> list[Rule]:
    """Kernels and biases of `layers.MultiHeadAttention`; names: {"q", "k", "v" or "out": name of the linear layer}."""
    rules = []
    for ours, theirs in names.items():
        kernel, bias = (HEADS_OUT, "") if ours == "out" else (HEADS_IN, HEADS_BIAS)
        rules.append(Rule(f"{path}/{ours}_kernel", f"{theirs}.weight", kernel))
        rules.append(Rule(f"{path}/{ours}_bias", f"{theirs}.bias", bias))
    return rules


def packed_attention(path: str, name: str) -> list[Rule]:
    """The same, in the tensors of PyTorch's nn.MultiheadAttention: q, k and v share one matrix and one bias."""
    return [
        *(Rule(f"{path}/{n}_kernel", f"{name}.in_proj_weight", HEADS_IN) for n in "qkv"),
        *(Rule(f"{path}/{n}_bias", f"{name}.in_proj_bias", HEADS_BIAS) for n in "qkv"),
        *attention(path, {"out": f"{name}.out_proj"}),
    ]


def projector(*more: Rule) -> Tables:
    """Tables of a fusion that ends in `levels.Projector`, and of its further rules.

    "mm_projector" is official (LLaVA's and SparseCut's), LLAVA is llava-hf's and ours.
    """
    both = lambda fc1, fc2: [
        *linear("fusion/fuse/projector/fc1", fc1),
        *linear("fusion/fuse/projector/fc2", fc2),
        *more,
    ]
    return {"mm_projector": both("0", "2"), LLAVA: both("linear_1", "linear_2")}
