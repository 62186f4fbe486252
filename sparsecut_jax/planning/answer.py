"""The plan of a stage on a topology (memory, FLOPs, time, price), as plain data."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from sparsecut_jax import checks
from sparsecut_jax.planning import compiler, flops, memory, steps
from sparsecut_jax.planning.collectives import Collective
from sparsecut_jax.planning.hardware import Topology
from sparsecut_jax.planning.memory import Bytes, Parameters
from sparsecut_jax.planning.roofline import Roofline, roofline
from sparsecut_jax.planning.search import Option, search, smallest, step_products, with_settings
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import Config, MeshConfig
from sparsecut_jax.training.optimizer import checked_rates
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.claims import adopt_here

SHOWN = 6  # settings that a search returns
MOST_ROWS = 10**12
During = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Question:
    """What to plan, besides the config.

    Attributes:
      topology: the chips.
      stage: name of a stage of the config.
      mfu: assumed share of the peak rate, 0.001 to 1.
      rows: rows of the dataset; 0: counted, see `steps`.
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


def answer(cfg: Config, question: Question, during: During = contextlib.nullcontext) -> dict[str, Any]:
    """The plan of one stage, as JSON-compatible data. What is slow runs inside `during(what it is)`.

    Raises:
      UserError: the topology does not support the mesh, batch, remat policy or backend, or its compiler is missing.
    """
    name, topology = question.stage, question.topology
    platform = topology.chip.platform
    cfg, notes = prepared(cfg, name)
    found = steps.steps_of(cfg, name, question.rows)
    cfg = backends.resolve(cfg, platform).with_stage(name, slots=found.slots)
    sizes = sharding.mesh_sizes(dataclasses.asdict(cfg.mesh), topology.chips, platform)
    sharding.check_mesh(cfg, sizes)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**sizes))
    if platform == "tpu":
        compiler.check_installed()
    parameters = Parameters(cfg, name)
    checked_rates(parameters.shapes, cfg.stages[name], name)
    expected = memory.estimate(cfg, name, sizes, platform, parameters)
    needed, source, crossing = _needed(cfg, question, expected, during)
    fits = isinstance(needed, Bytes) and needed.total <= topology.memory
    work = flops.work(products := step_products(cfg, name, parameters))
    line = roofline(cfg, name, topology, sizes, products, parameters) if topology.chip.flops else None
    made = {
        "stage": name,
        "topology": topology.text,
        "chips": topology.chips,
        "chip": {key: value for key, value in dataclasses.asdict(topology.chip).items() if key != "shapes"},
        "mesh": dict(sizes),
        "settings": _settings(cfg, name),
        "bytes_per_chip": _bytes(needed, expected, topology, source, fits),
        "flops_per_step": {part: dataclasses.asdict(w) for part, w in work.items()},
        "collectives": _collectives(crossing, topology) if crossing is not None else {},
        "time": _time(cfg, question, work["total"].model, line, parameters, found) if line else {},
        "notes": notes + _share_note(topology, needed) + _time_note(topology),
    }
    if question.search or not fits:
        made["search"] = _search(cfg, question, parameters, during)
    return made


def prepared(cfg: Config, name: str) -> tuple[Config, list[str]]:
    """The config as a run would resolve it, as far as its files are on this machine, and notes on what is assumed."""
    cfg, told, _, away = adopt_here(cfg)
    notes = [" ".join(line.split()) for line in told]
    notes += [f"not on this machine, so the config's sizes are used: {', '.join(away)}"] if away else []
    if not cfg.llm.vocab_size:
        vocabulary = -(-cfg.tokenizer.vocab_size // 64) * 64
        notes.append(f"config.llm.vocab_size comes from the tokenizer; {vocabulary} is assumed")
        cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=vocabulary))
    cfg = dataclasses.replace(cfg, run_stages=(name,))
    checks.check_room(cfg)
    return cfg, notes


def _needed(
    cfg: Config, question: Question, expected: Bytes, during: During
) -> tuple[Bytes | compiler.TooLarge, str, list[Collective] | None]:
    """Memory of the step, the source of that figure, and the step's collectives, if it was compiled."""
    if question.topology.chip.platform != "tpu":
        return expected, "analytic model", None
    began = time.monotonic()
    with during(f"compiling  for {question.topology.text}"):
        found, crossing = compiler.ask(cfg, question.stage, question.topology, expected)
    return found, f"TPU compiler, {time.monotonic() - began:.0f} s", crossing


def _collectives(found: list[Collective], topology: Topology) -> dict[str, Any]:
    """Bytes received per chip and step, by kind of collective, and the seconds that takes at the interconnect's rate."""
    by_kind = collections.defaultdict(float)
    for each in found:
        by_kind[each.kind] += each.bytes * each.times
    total = sum(by_kind.values())
    return {"bytes": dict(by_kind), "total": total, "seconds": total / topology.chip.link}


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
    needed: Bytes | compiler.TooLarge, expected: Bytes, topology: Topology, source: str, fits: bool
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
    cfg: Config, question: Question, total: float, line: Roofline, parameters: Parameters, found: steps.Steps
) -> dict[str, Any]:
    """Seconds per step, tokens/s, hours and price. `total`: model FLOPs per step."""
    name, topology = question.stage, question.topology
    stage, peak = cfg.stages[name], topology.chips * topology.chip.flops
    most_mfu = total / peak / line.seconds
    mfu = min(question.mfu, most_mfu)
    at_mfu = lambda model: model / (peak * mfu)
    made = {
        "roofline": {**dataclasses.asdict(line), "seconds": line.seconds, "bound": line.bound},
        "most_mfu": most_mfu,
        "asked_mfu": question.mfu,
        "mfu": mfu,
        "seconds": at_mfu(total),
        "tokens_per_second": stage.batch_size * stage.seq_len / at_mfu(total),
        "rows": found.rows,
        "rows_from": found.source,
        "steps": found.steps,
        "lengths": found.lengths,
    }
    if found.steps:
        model = flops.of_batch(cfg, name, parameters.shapes, stage.slots)
        hours = found.steps * sum(share * at_mfu(model(n)) for n, share in found.lengths.items()) / 3600
        made |= {"hours": hours, "chip_hours": hours * topology.chips}
        if question.price:
            made["price"] = hours * topology.chips * question.price
    return made


def _share_note(topology: Topology, needed: Bytes | compiler.TooLarge) -> list[str]:
    """A note if the step needs more than the three quarters of a GPU's memory that JAX reserves by default."""
    if topology.chip.platform != "gpu" or not 0.75 * topology.memory < needed.total <= topology.memory:
        return []
    return ["JAX reserves only 75 % of a GPU's memory by default; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"]


def _time_note(topology: Topology) -> list[str]:
    return [] if topology.chip.flops else [f"{topology.chip.name} has no published peak rate: no time and no price"]


def _search(cfg: Config, question: Question, parameters: Parameters, during: During) -> dict[str, Any]:
    """Settings that fit, best first; if none fits, the next larger topology on which one does."""
    name, topology = question.stage, question.topology
    with during(f"searching  for settings that fit {topology.text}"):
        options = search(cfg, name, topology, parameters)[:SHOWN]
    made: dict[str, Any] = {"options": [_option(option, name) for option in options]}
    if topology.chip.platform == "tpu":
        for shown, option in list(zip(made["options"], options, strict=True))[: question.checked]:
            tried = with_settings(cfg, name, option.sizes, option.accumulate, option.remat)
            with during(f"compiling  for {topology.text} with {option.flags}"):
                found, crossing = compiler.ask(tried, name, topology, option.bytes)
            shown["compiled"] = found.total if isinstance(found, Bytes) else found.reason
            if isinstance(found, Bytes):
                shown["compiled_seconds"] = max(option.seconds, _collectives(crossing, topology)["seconds"])
                break
    if not options:
        larger = smallest(cfg, name, topology, parameters)
        made["larger"] = larger and {
            "topology": larger[0].text,
            "chips": larger[0].chips,
            "option": _option(larger[1], name),
        }
    return made


def _option(option: Option, name: str) -> dict[str, Any]:
    return {
        "mesh": dict(option.sizes),
        "remat": option.remat,
        "accumulate": option.accumulate,
        "bytes": option.bytes.total,
        "seconds": option.seconds,
        "flags": f"{option.flags} --config.stages.{name}.accumulate={option.accumulate}",
    }


def default_stage(cfg: Config, asked: str) -> str:
    """The stage to plan: `asked`, or the last one. Raises UserError if the config does not run `asked`."""
    if asked and asked not in cfg.run_stages:
        raise UserError(
            f"--stage={asked!r} is not in config.run_stages; expected {' or '.join(cfg.run_stages)}"
            f"{checks.nearest(asked, cfg.run_stages)}"
        )
    return asked or cfg.run_stages[-1]
