"""The chips that a run can be planned for, and topologies such as "v5e:8x8", "2*v5p:4x4x4", "h100:16" or "cpu:8".

Rates are the vendors' peak figures per chip: bf16 TFLOP/s, memory, its bandwidth in GB/s, interconnect, network.
  v5e   docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s bf16, 16 GB HBM, 819 GB/s, ICI 1,600 Gb/s (400 GB/s in both
        directions together), data centre network 6.4 Tb/s for 256 chips
  v5p   docs.cloud.google.com/tpu/docs/v5p: 459, 95 GiB, 2,765, ICI 4,800 Gb/s (1,200 GB/s), network 50 Gb/s a chip
  v6e   docs.cloud.google.com/tpu/docs/v6e: 918, 32 GB, 1,638, ICI 3,200 Gb/s (800 GB/s), network 25.6 Tb/s for 256
  h100  NVIDIA H100 SXM datasheet: 989 without sparsity, 80 GB, 3,350, NVLink 900 GB/s in both directions together;
        DGX H100: one network adapter of 400 Gb/s a GPU
  h200  NVIDIA H200 SXM datasheet: 989, 141 GB, 4,800, the same interconnect
"""

from __future__ import annotations

import dataclasses
import math
import os
import re

from sparsecut_jax.types import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      platform: JAX's name: "tpu", "gpu" or "cpu".
      memory: bytes that a program may use; for TPUs the figure that libtpu's compiler reports.
      flops: peak bf16 FLOP/s; 0: not published, so no time is given.
      bandwidth: memory bandwidth, bytes/s.
      link: interconnect bandwidth into a chip from the others of its slice or node, bytes/s.
      network: bandwidth into a chip from other slices or nodes, bytes/s.
      shapes: existing slice shapes of TPUs; empty for GPUs and CPUs, of which any number is allowed.
      node: GPUs per node, joined by `link`.
    """

    name: str
    platform: str
    memory: float
    flops: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    shapes: tuple[str, ...] = ()
    node: int = 0


MOST_SLICES = 256
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 200e9, 6.4e12 / 8 / 256, FLAT),
        Chip("v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 600e9, 50e9 / 8, CUBES),
        Chip("v6e", "tpu", 31.25 * GIB, 918e12, 1638e9, 400e9, 25.6e12 / 8 / 256, FLAT),
        Chip("h100", "gpu", 80e9, 989e12, 3350e9, 450e9, 400e9 / 8, node=8),
        Chip("h200", "gpu", 141e9, 989e12, 4800e9, 450e9, 400e9 / 8, node=8),
        Chip("cpu", "cpu", 0.0),
    )
}
KINDS = ", ".join(CHIPS)
# JAX's names of the devices (`device_kind`)
NAMES = {
    "v5e": r"TPU v5 ?(lite|e)",
    "v5p": r"TPU v5p?",
    "v6e": r"TPU v6 ?(lite|e)",
    "h100": r"NVIDIA H100.*",
    "h200": r"NVIDIA H200.*",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: `slices` TPU slices or GPU nodes of `shape` each, joined by the network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def name(self) -> str:
        """The compiler's name of one slice: "v5e:8x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def text(self) -> str:
        """The topology as --topology takes it."""
        if self.chip.platform == "tpu":
            return (f"{self.slices}*" if self.slices > 1 else "") + self.name
        return f"{self.chip.name}:{self.chips}"

    @property
    def memory(self) -> float:
        """Bytes that a program may use per chip; for CPU devices an equal share of this machine's memory."""
        return self.chip.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.chips


def parse(text: str) -> Topology:
    """The topology that `text` names. Raises UserError for an unknown kind of chip or a slice that does not exist."""
    if not text:
        raise UserError(f"--topology is missing; for example --topology=v5e:8x8; known kinds: {KINDS}")
    match = re.fullmatch(r"(?:(\d+)\*)?([^:*]*)(?::(.*))?", text.strip().lower())
    slices, kind, shape = match.groups() if match else (None, text, None)
    if kind not in CHIPS:
        raise UserError(
            f"--topology={text!r}: unknown kind {kind!r}{nearest(kind, CHIPS)}; known: {KINDS}; for example v5e:8x8, "
            "2*v5e:16x16, v5p:4x4x4, h100:8 or cpu:8"
        )
    chip, count = CHIPS[kind], int(slices or 1)
    if chip.platform == "tpu":
        if not 1 <= count <= MOST_SLICES:
            raise UserError(
                f"--topology={text!r}: expected 1 to {MOST_SLICES} slices; for example 2*{kind}:{chip.shapes[-3]}"
            )
        if shape not in chip.shapes:
            flipped = "x".join(sorted((shape or "").split("x"), key=lambda n: int(n) if n.isdigit() else 0))
            near = f"; did you mean {flipped!r}?" if flipped in chip.shapes else ""
            raise UserError(
                f"--topology={text!r}: {kind} has no slice {shape or ''!r}{near}; expected one of {', '.join(chip.shapes)}"
            )
        return Topology(chip, tuple(map(int, shape.split("x"))), count)
    number = int(shape) if shape and shape.isdigit() else 0
    if not 1 <= number <= 2**16 or slices or (chip.node and number > chip.node and number % chip.node):
        whole = f", up to {chip.node} or a multiple of it (whole nodes)" if chip.node else ""
        stars = "; only TPUs take a number of slices (2*)" if slices else ""
        raise UserError(f"--topology={text!r}: expected {kind}:N for N devices{whole}{stars}; for example {kind}:8")
    nodes = number // chip.node if chip.node and number > chip.node else 1
    return Topology(chip, (number // nodes,), nodes)


def peak_flops(device_kind: str) -> float:
    """Peak bf16 FLOP/s of a device by its JAX name; 0 if unknown."""
    return next((CHIPS[chip].flops for chip, name in NAMES.items() if re.fullmatch(name, device_kind)), 0.0)


def larger(topology: Topology) -> list[Topology]:
    """Larger topologies of the same chip, the smallest first."""
    chip = topology.chip
    if chip.platform == "tpu":
        others = [Topology(chip, tuple(map(int, shape.split("x")))) for shape in chip.shapes]
        others += [dataclasses.replace(others[-1], slices=2**i) for i in range(1, 4)]
    elif chip.node:
        others = [Topology(chip, (n,)) for n in (1, 2, 4, 8)] + [Topology(chip, (8,), 2**i) for i in range(1, 9)]
    else:  # more CPU devices share the same memory
        others = []
    return [each for each in others if each.chips > topology.chips]
