"""The plan of a stage on a topology (memory, FLOPs, time, price), as plain data.

The steps of a stage are estimated without reading its rows. LLaVA's mixes are recognised by file name. Lengths are sampled
from the distribution in docs/data.md: text beside an image log-normal around 180 tokens (a caption: around 20), text alone
(6 % of the conversations) around 500. A batch plan of a few thousand such rows, laid out as in a run, shows how they fall
into buckets or packed sequences.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import time
from typing import Any

import numpy as np

from sparsecut_jax.data.batch_plan import Lengths, make_plan
from sparsecut_jax.data.sources import load_source
from sparsecut_jax.models import ways
from sparsecut_jax.planning import compiling, memory, work
from sparsecut_jax.planning.collectives import Collective, crossing
from sparsecut_jax.planning.memory import Bytes, Parameters
from sparsecut_jax.planning.search import During, settings_that_fit, step_products
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.settings import Config, MeshConfig
from sparsecut_jax.training.optimizer import checked_rates
from sparsecut_jax.types import UserError, nearest

MOST_ROWS = 10**12
KNOWN = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
DRAWN = 16_384  # number of sampled rows


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What to plan, besides the config.

    Attributes:
      topology: the chips.
      stage: name of a stage of the config.
      mfu: assumed share of the peak rate, 0.001 to 1.
      rows: rows of the dataset; 0: counted, see `steps_of`.
      price: price of a chip-hour; 0: no price is given.
      search: look for other settings even if the config's fit.
      checked: how many of those settings to compile at most, until one fits.

    Raises:
      UserError: mfu, rows or price out of range.
    """

    topology: Topology
    stage: str
    mfu: float = 0.4
    rows: int = 0
    price: float = 0.0
    search: bool = False
    checked: int = 2

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("mfu", 0.001 <= self.mfu <= 1, "a share of the peak rate, 0.001 to 1"),
            ("rows", 0 <= self.rows <= MOST_ROWS, f"0 to {MOST_ROWS:,}"),
            ("price", 0 <= self.price < math.inf, "0 or more"),
        ):
            if not ok:
                raise UserError(f"--{name}={getattr(self, name)}: expected {expected}")


def answer(cfg: Config, request: PlanRequest, during: During = contextlib.nullcontext) -> dict[str, Any]:
    """The plan of one stage, as JSON-compatible data. What is slow runs inside `during(what it is)`.

    Raises:
      UserError: the topology does not support the mesh, batch, remat policy or backend, or its compiler is missing.
    """
    name, topology = request.stage, request.topology
    platform = topology.chip.platform
    opened = setup.open_here(cfg, name)
    cfg = opened.config
    steps = steps_of(cfg, name, request.rows)
    cfg = backends.resolve(cfg, platform).with_stage(name, slots=steps.slots)
    sizes = sharding.mesh_sizes(dataclasses.asdict(cfg.mesh), topology.chips, platform)
    setup.check_mesh(cfg, sizes)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**sizes))
    if platform == "tpu":
        compiling.check_installed()
    parameters = Parameters(cfg, name)
    checked_rates(parameters.shapes, cfg.stages[name], name)
    expected = memory.estimate(cfg, name, sizes, platform, parameters)
    needed, source, collectives = _needed(cfg, request, expected, during)
    fits = isinstance(needed, Bytes) and needed.total <= topology.memory
    flops = work.by_part(products := step_products(cfg, name, parameters))
    line = work.roofline(cfg, name, topology, sizes, products, parameters) if topology.chip.flops else None
    plan = {
        "stage": name,
        "topology": topology.text,
        "chips": topology.chips,
        "chip": {key: value for key, value in dataclasses.asdict(topology.chip).items() if key != "shapes"},
        "mesh": dict(sizes),
        "settings": _settings(cfg, name),
        "bytes_per_chip": _bytes(needed, expected, topology, source, fits),
        "flops_per_step": {part: dataclasses.asdict(w) for part, w in flops.items()},
        "collectives": crossing(collectives, topology) if collectives is not None else {},
        "time": _time(cfg, request, flops["total"].model, line, parameters, steps) if line else {},
        "notes": opened.notes + _share_note(topology, needed) + _time_note(topology),
    }
    if request.search or not fits:
        plan["search"] = settings_that_fit(cfg, name, topology, parameters, request.checked, during)
    return plan


def _needed(
    cfg: Config, request: PlanRequest, expected: Bytes, during: During
) -> tuple[Bytes | compiling.TooLarge, str, list[Collective] | None]:
    """Memory of the step, the source of that figure, and the step's collectives, if it was compiled."""
    if request.topology.chip.platform != "tpu":
        return expected, "analytic model", None
    began = time.monotonic()
    with during(f"compiling  for {request.topology.text}"):
        compiled, collectives = compiling.ask(cfg, request.stage, request.topology, expected)
    return compiled, f"TPU compiler, {time.monotonic() - began:.0f} s", collectives


def _settings(cfg: Config, name: str) -> dict[str, Any]:
    stage = cfg.stages[name]
    return {
        "dtype": cfg.dtype,
        "attention": cfg.attention,
        "llm_remat": cfg.llm.remat,
        "vision_remat": cfg.vision.remat,
        "fusion_remat": cfg.fusion.remat,
        "loss_chunk": cfg.loss_chunk,
        "batch_size": stage.batch_size,
        "accumulate": stage.accumulate,
        "seq_len": stage.seq_len,
        "slots": stage.slots,
    }


def _bytes(
    needed: Bytes | compiling.TooLarge, expected: Bytes, topology: Topology, source: str, fits: bool
) -> dict[str, Any]:
    shown = needed if isinstance(needed, Bytes) else expected
    return {
        "source": source if isinstance(needed, Bytes) else f"analytic model; rejected by the {source}",
        **dataclasses.asdict(shown),
        "total": shown.total,
        "memory": topology.memory,
        "fits": fits,
        "refusal": None if isinstance(needed, Bytes) else needed.reason,
    }


def _time(
    cfg: Config, request: PlanRequest, total: float, line: work.Roofline, parameters: Parameters, steps: Steps
) -> dict[str, Any]:
    """Seconds per step, tokens/s, hours and price. `total`: model FLOPs per step."""
    name, topology = request.stage, request.topology
    stage, peak = cfg.stages[name], topology.chips * topology.chip.flops
    most_mfu = total / peak / line.seconds
    mfu = min(request.mfu, most_mfu)
    at_mfu = lambda model: model / (peak * mfu)
    answer = {
        "roofline": {**dataclasses.asdict(line), "seconds": line.seconds, "bound": line.bound},
        "most_mfu": most_mfu,
        "asked_mfu": request.mfu,
        "mfu": mfu,
        "seconds": at_mfu(total),
        "tokens_per_second": stage.batch_size * stage.seq_len / at_mfu(total),
        "rows": steps.rows,
        "rows_from": steps.source,
        "steps": steps.steps,
        "lengths": steps.lengths,
    }
    if steps.steps:
        model = work.flops_of_batch(cfg, name, parameters.shapes, stage.slots)
        hours = steps.steps * sum(share * at_mfu(model(n)) for n, share in steps.lengths.items()) / 3600
        answer |= {"hours": hours, "chip_hours": hours * topology.chips}
        if request.price:
            answer["price"] = hours * topology.chips * request.price
    return answer


def _share_note(topology: Topology, needed: Bytes | compiling.TooLarge) -> list[str]:
    """A note if the step needs more than the three quarters of a GPU's memory that JAX reserves by default."""
    if topology.chip.platform != "gpu" or not 0.75 * topology.memory < needed.total <= topology.memory:
        return []
    return ["JAX reserves only 75 % of a GPU's memory by default; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"]


def _time_note(topology: Topology) -> list[str]:
    return [] if topology.chip.flops else [f"{topology.chip.name} has no published peak rate: no time and no price"]


def default_stage(cfg: Config, asked: str) -> str:
    """The stage to plan: `asked`, or the last one. Raises UserError if the config does not run `asked`."""
    if asked and asked not in cfg.run_stages:
        raise UserError(
            f"--stage={asked!r} is not in config.run_stages; expected {' or '.join(cfg.run_stages)}"
            f"{nearest(asked, cfg.run_stages)}"
        )
    return asked or cfg.run_stages[-1]


# --- steps of a stage ---


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one stage.

    Attributes:
      rows: rows of the dataset, None if unknown.
      source: where `rows` comes from.
      steps: optimizer steps of the whole stage; None if `rows` is unknown.
      lengths: {positions per sequence: share of the steps}.
      slots: image slots per sequence.
    """

    rows: int | None
    source: str
    steps: int | None
    lengths: dict[int, float]
    slots: int


def steps_of(cfg: Config, name: str, rows: int = 0) -> Steps:
    """The steps of stage `name`. rows: rows of its dataset; 0: those of a known file or of the source in config.data."""
    stage = cfg.stages[name]
    count, source = (rows, "--rows") if rows else _count(cfg, name)
    lengths = _drawn(stage.rows, ways.positions(cfg), stage.seq_len)
    once = dataclasses.replace(stage, epochs=1.0, max_steps=0, batch_size=min(stage.batch_size, DRAWN // 8))
    plan = make_plan(lengths, [(np.arange(DRAWN), 1.0)], once, cfg.data.max_images, 0)
    sequences = len(plan) * once.batch_size / DRAWN  # per row
    steps = stage.max_steps or (math.ceil(count * stage.epochs * sequences / stage.batch_size) if count else None)
    shares = collections.Counter(plan.lengths.values.tolist())
    return Steps(count, source, steps, {length: n / len(plan) for length, n in sorted(shares.items())}, plan.slots)


def _drawn(kind: str, image_tokens: int, seq_len: int) -> Lengths:
    """Sampled lengths of DRAWN rows of `kind`, "captions" or "conversations"."""
    rng = np.random.default_rng(0)
    images = (rng.random(DRAWN) >= (0.06 if kind == "conversations" else 0)).astype(np.int32)
    middle, width = (180, 0.7) if kind == "conversations" else (20, 0.4)
    seen = np.exp(rng.normal(np.log(middle), width, DRAWN)).clip(4, 1400)
    alone = np.exp(rng.normal(np.log(500), 0.9, DRAWN)).clip(20, seq_len)
    text = np.where(images, seen, alone).astype(np.int32)
    return Lengths(np.minimum(text + image_tokens * images, seq_len), images)


def _count(cfg: Config, name: str) -> tuple[int | None, str]:
    known = os.path.basename(cfg.data.source)
    if not cfg.data.mix and known in KNOWN:
        return KNOWN[known], known
    try:
        source = load_source(cfg)
        return len(source.stage(cfg.stages[name])), source.name
    except (UserError, OSError):
        return None, ""
