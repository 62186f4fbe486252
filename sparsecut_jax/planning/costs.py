"""What every way of fusing costs under the settings of one config: parameters, FLOPs, memory and the roofline of a step.

All read the same sample: one image, and as much text as a sequence of the config holds beside an image of its own way. So the
sequences of a way whose images take fewer positions are shorter.

At equal resolution all see the same detail: ways that read the low-res view alone get it as large as the picture that the
crops of the others make up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from sparsecut_jax import checks
from sparsecut_jax.data.batches import spec_of
from sparsecut_jax.models import levels, ways
from sparsecut_jax.models.parameters import unflatten
from sparsecut_jax.planning import compiling, generation, memory, work
from sparsecut_jax.planning.collectives import gathered_activations, weight_shapes
from sparsecut_jax.planning.memory import Bytes, Parameters
from sparsecut_jax.planning.search import During, step_products
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.settings import Config, MeshConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import UserError

PROMPT = 64  # positions of text in a prompt, beside its image


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of one way; all but `way` and `refusal` are unknown if the config cannot have it.

    Attributes:
      way: its name.
      refusal: why the config cannot have it, in a sentence; "" if it can.
      image_size: side of a view in pixels; views: of an image (V); positions: of an image in the LLM (S).
      parameters: of the fusion, with those of its way of injecting.
      flops: {"vision", "fusion", "llm": model FLOPs of one sample of a training step}; the loss counts as the LLM's.
      prefill: FLOPs of a prompt of one image and PROMPT positions of text, tower and fusion included.
      decode: FLOPs of one more token.
      bytes: memory per chip by the analytic model; compiled: by the compiler, if it was asked and found room.
      too_large: the compiler's refusal, in its words.
      gathered: activations that the compiled step gathers over chips, as text.
      roofline: seconds of a step; bound: which of its times is the longest. 0 and "" where no peak rate is published.
    """

    way: str
    refusal: str = ""
    image_size: int = 0
    views: int = 0
    positions: int = 0
    parameters: int = 0
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    prefill: float = 0.0
    decode: float = 0.0
    bytes: float = 0.0
    compiled: float = 0.0
    too_large: str = ""
    gathered: list[str] | None = None
    roofline: float = 0.0
    bound: str = ""


def costs(
    cfg: Config,
    name: str,
    topology: Topology,
    chosen: Iterable[str],
    compiled: bool = False,
    equal_resolution: bool = False,
    during: During = contextlib.nullcontext,
) -> dict[str, Any]:
    """The costs of the ways `chosen`, as JSON-compatible data. What is slow runs inside `during(what it is)`.

    Args:
      cfg: the config, whose own way decides how much text a sample has.
      name, topology: its stage, and the chips.
      compiled: compile the step of every way, too, which takes minutes each; `topology` is of TPUs.
      equal_resolution: see the module.

    Raises:
      UserError: there is no TPU compiler, or the config can have none of the ways.
    """
    if compiled:
        compiling.check_installed()
    opened = setup.open_here(cfg, name)
    cfg = opened.config
    text = cfg.stages[name].seq_len - ways.positions(cfg)
    found = []
    for way in chosen:
        try:
            with during(f"counting   {way}"):
                planned = _with_mesh(with_way(cfg, name, way, text, equal_resolution), topology)
                cost, expected = _cost(planned, name, topology)
            if compiled:
                with during(f"compiling  {way} for {topology.text}"):
                    cost = dataclasses.replace(cost, **_compiled(planned, name, topology, expected))
        except UserError as error:
            cost = Cost(way, refusal=str(error))
        found.append(cost)
    if all(cost.refusal for cost in found):
        raise UserError(found[0].refusal)
    return {
        "stage": name,
        "topology": topology.text,
        "chips": topology.chips,
        "memory": topology.memory,
        "batch_size": cfg.stages[name].batch_size,
        "text": text,
        "prompt": PROMPT,
        "image_size": cfg.vision.image_size,
        "grid": list(cfg.fusion.grid),
        "equal_resolution": equal_resolution,
        "notes": opened.notes,
        "ways": [dataclasses.asdict(cost) for cost in found],
    }


def with_way(cfg: Config, name: str, way: str, text: int, equal_resolution: bool = False) -> Config:
    """The config with another way of fusing, in sequences of one image and `text` positions of text in stage `name`.

    Raises UserError if the way is impossible under the other settings.
    """
    cfg = dataclasses.replace(
        cfg,
        fusion=dataclasses.replace(cfg.fusion, name=way),
        data=dataclasses.replace(cfg.data, max_images=1),
    )
    if equal_resolution and not ways.wiring_of(cfg).grid:
        side = round(levels.side(cfg) * math.sqrt(math.prod(cfg.fusion.grid)))
        vision = dataclasses.replace(cfg.vision, image_size=side * cfg.vision.patch_size)
        cfg = dataclasses.replace(cfg, vision=vision)
    cfg = cfg.with_stage(name, seq_len=text + ways.positions(cfg), buckets=(), slots=0)
    checks.check_values(cfg)
    return cfg


def _with_mesh(cfg: Config, topology: Topology) -> Config:
    """The config with no "auto" settings left, and the sizes of its mesh. Raises UserError if it does not fit the chips."""
    platform = topology.chip.platform
    cfg = backends.resolve(cfg, platform)
    sizes = sharding.mesh_sizes(dataclasses.asdict(cfg.mesh), topology.chips, platform)
    setup.check_mesh(cfg, sizes)
    return dataclasses.replace(cfg, mesh=MeshConfig(**sizes))


def _cost(cfg: Config, name: str, topology: Topology) -> tuple[Cost, Bytes]:
    """The costs of the config's way, and its memory by kind."""
    sizes, stage, wiring = dataclasses.asdict(cfg.mesh), cfg.stages[name], ways.wiring_of(cfg)
    parameters = Parameters(cfg, name)
    products = step_products(cfg, name, parameters)
    expected = memory.estimate(cfg, name, sizes, topology.chip.platform, parameters)
    line = work.roofline(cfg, name, topology, sizes, products, parameters) if topology.chip.flops else None
    part = {part: done.model / stage.batch_size for part, done in work.by_part(products).items()}
    prompt = PROMPT + wiring.positions
    read = generation.of_prefill(cfg, name, parameters.shapes, 1, prompt)
    model = build_model(dataclasses.replace(cfg, attention="xla"))
    params = {path: jax.ShapeDtypeStruct(shape, model.dtype) for path, shape in parameters.shapes.items()}
    cache = generation.cache_of(model, unflatten(params), spec_of(cfg, 1, prompt, 1), 1)
    cost = Cost(
        cfg.fusion.name,
        image_size=cfg.vision.image_size,
        views=ways.view_count(wiring),
        positions=wiring.positions,
        parameters=sum(math.prod(s) for path, s in parameters.shapes.items() if path.startswith("fusion/")),
        flops={"vision": part["vision"], "fusion": part["fusion"], "llm": part["llm"] + part["loss"]},
        prefill=sum(p.flops for p in read),
        decode=sum(p.flops for p in generation.of_decode(model, parameters.shapes, cache)),
        bytes=expected.total,
        roofline=line.seconds if line else 0.0,
        bound=line.bound if line else "",
    )
    return cost, expected


def _compiled(cfg: Config, name: str, topology: Topology, expected: Bytes) -> dict[str, Any]:
    """What `Cost` has of the compiler."""
    needed, step = compiling.ask(cfg, name, topology, expected)
    if isinstance(needed, compiling.TooLarge):
        return {"too_large": needed.reason}
    weights = weight_shapes(Parameters(cfg, name), dataclasses.asdict(cfg.mesh))
    gathered = [f"{each.shapes} in {each.origin}" for each in gathered_activations(step, weights)]
    return {"compiled": needed.total, "gathered": gathered}
