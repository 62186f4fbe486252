"""Searches meshes, remat policies and accumulation for settings that fit, on the analytic model; compiles the best."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from sparsecut_jax.planning import compiling, memory, work
from sparsecut_jax.planning.collectives import crossing
from sparsecut_jax.planning.jaxprs import Product
from sparsecut_jax.planning.memory import Bytes, Parameters, Sizes
from sparsecut_jax.planning.residuals import Residuals
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime.hardware import Topology, larger
from sparsecut_jax.settings import Config, MeshConfig
from sparsecut_jax.types import UserError

SHOWN = 6  # settings that a search returns
During = Callable[[str], contextlib.AbstractContextManager[Any]]
POLICIES = ("none", "dots", "full", "offload")
MOST_TENSOR = 8  # beyond that, the all-reduces in every layer dominate


@dataclasses.dataclass(frozen=True)
class Option:
    """A candidate setting.

    Attributes:
      sizes: size of each mesh axis.
      remat: remat policy of the LLM.
      accumulate: micro-batches per step.
      bytes: memory per chip.
      seconds: roofline of a step; 0 if no peak rate is published.
      flops: FLOPs of a step, recomputation included.
    """

    sizes: Sizes
    remat: str
    accumulate: int
    bytes: Bytes
    seconds: float
    flops: float

    @property
    def rank(self) -> tuple[float, float, int, float]:
        return self.seconds, self.flops, self.accumulate, self.bytes.total

    @property
    def flags(self) -> str:
        """The setting as command line flags, without the stage's accumulation."""
        axes = [f"--config.mesh.{axis}={n}" for axis, n in self.sizes.items() if axis != "replica" or n > 1]
        return " ".join([*axes, f"--config.llm.remat={self.remat}"])

    def as_json(self, name: str) -> dict[str, Any]:
        """name: the stage."""
        return {
            "mesh": dict(self.sizes),
            "remat": self.remat,
            "accumulate": self.accumulate,
            "bytes": self.bytes.total,
            "seconds": self.seconds,
            "flags": f"{self.flags} --config.stages.{name}.accumulate={self.accumulate}",
        }


def settings_that_fit(
    cfg: Config, name: str, topology: Topology, parameters: Parameters, checked: int, during: During
) -> dict[str, Any]:
    """Settings that fit, best first; if none fits, the next larger topology on which one does. JSON-compatible.

    checked: how many of them to compile at most, until one fits; TPUs only.
    """
    with during(f"searching  for settings that fit {topology.text}"):
        options = search(cfg, name, topology, parameters)[:SHOWN]
    answer: dict[str, Any] = {"options": [option.as_json(name) for option in options]}
    if topology.chip.platform == "tpu":
        for shown, option in list(zip(answer["options"], options, strict=True))[:checked]:
            tried = with_settings(cfg, name, option.sizes, option.accumulate, option.remat)
            with during(f"compiling  for {topology.text} with {option.flags}"):
                compiled, collectives = compiling.ask(tried, name, topology, option.bytes)
            shown["compiled"] = compiled.total if isinstance(compiled, Bytes) else compiled.reason
            if isinstance(compiled, Bytes):
                shown["compiled_seconds"] = max(option.seconds, crossing(collectives, topology)["seconds"])
                break
    if not options:
        larger = smallest(cfg, name, topology, parameters)
        answer["larger"] = larger and {
            "topology": larger[0].text,
            "chips": larger[0].chips,
            "option": larger[1].as_json(name),
        }
    return answer


def search(cfg: Config, name: str, topology: Topology, parameters: Parameters) -> list[Option]:
    """Settings that fit, the best one for each mesh, the fastest first. The batch size of a step does not change."""
    best: dict[tuple, Option] = {}
    for option in options(cfg, name, topology, parameters):
        key = tuple(option.sizes.values())
        if option.bytes.total <= topology.memory and (key not in best or option.rank < best[key].rank):
            best[key] = option
    return sorted(best.values(), key=lambda option: option.rank)


def options(cfg: Config, name: str, topology: Topology, parameters: Parameters) -> Iterator[Option]:
    """All candidate settings whose mesh and accumulation divide the model and the batch."""
    platform, batch = topology.chip.platform, cfg.stages[name].batch_size
    policies = [remat for remat in POLICIES if remat != "offload" or platform != "cpu"]
    micro_batches = [n for n in range(1, batch + 1) if batch % n == 0 and n & (n - 1) == 0]
    for remat in policies:
        with_remat = with_settings(cfg, name, remat=remat)
        products = step_products(with_remat, name, parameters)
        total = work.by_part(products)["total"]
        residuals = functools.cache(functools.partial(Residuals, with_remat, name))
        for sizes, accumulate in itertools.product(meshes(topology), micro_batches):
            tried = with_settings(cfg, name, sizes, accumulate, remat)
            try:
                setup.check_mesh(dataclasses.replace(tried, run_stages=(name,)), sizes)
                needed = memory.estimate(tried, name, sizes, platform, parameters, residuals(sizes["tensor"]))
            except UserError:
                continue
            line = work.roofline(tried, name, topology, sizes, products, parameters) if topology.chip.flops else None
            yield Option(sizes, remat, accumulate, needed, line.seconds if line else 0.0, total.model + total.again)


def step_products(cfg: Config, name: str, parameters: Parameters) -> tuple[Product, ...]:
    """The matmuls of a step, over all micro-batches."""
    stage = cfg.stages[name]
    return work.products(cfg, name, parameters.shapes, stage.batch_size, stage.seq_len)


def meshes(topology: Topology) -> Iterator[Sizes]:
    """Mesh sizes whose product is the number of chips; on TPUs, replica is the number of slices."""
    replica = topology.slices if topology.chip.platform == "tpu" else 1
    chips = topology.chips // replica
    for tensor in (n for n in (1, 2, 4, 8) if n <= MOST_TENSOR and chips % n == 0):
        for fsdp in (n for n in range(chips // tensor, 0, -1) if chips // tensor % n == 0):
            yield {"replica": replica, "data": chips // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def with_settings(cfg: Config, name: str, sizes: Sizes | None = None, accumulate: int = 1, remat: str = "") -> Config:
    """The config with the given mesh, accumulation and remat policy of the LLM."""
    return dataclasses.replace(
        cfg.with_stage(name, accumulate=accumulate),
        mesh=MeshConfig(**sizes) if sizes else cfg.mesh,
        llm=dataclasses.replace(cfg.llm, remat=remat),
    )


def smallest(cfg: Config, name: str, topology: Topology, parameters: Parameters) -> tuple[Topology, Option] | None:
    """The next larger topology of the same chip on which a setting fits, and the best setting there."""
    for bigger in larger(topology):
        if fitting := search(cfg, name, bigger, parameters):
            return bigger, fitting[0]
    return None
