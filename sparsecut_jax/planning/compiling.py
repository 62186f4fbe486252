"""Lowers the training step of a config for devices that are not present, compiles it for TPUs, and reads the compiled step:
its memory, and its collectives from its HLO text.

libtpu compiles for TPUs and runs on a CPU machine; jaxlib itself compiles for CPU devices.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.planning.memory import Bytes
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import sharding
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.settings import Config
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import Batch, TrainState, UserError

WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
}  # fmt: skip
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%[\w.-]+ = (.+?) ({KINDS})(-start)?\(")
WHILE = re.compile(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)")
CALLED = re.compile(r"(?:calls|to_apply|called_computation)=(%[\w.-]+)|branch_computations=\{([^}]*)\}")
STEPS = 1000  # length of the schedule; only constants in the program depend on it
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to lock
    "TPU_LOG_DIR": "disabled",
}


def abstract_batch(cfg: Config, name: str, mesh: jax.sharding.Mesh) -> Batch:
    """A batch of stage `name` as `jax.ShapeDtypeStruct`s with shardings on `mesh`."""
    stage = cfg.stages[name]
    of_mesh = {"most_segments": int(stage.batching != "packed"), "sharding": sharding.batch_sharding(mesh)}
    return spec_of(cfg, stage.batch_size, stage.seq_len, slots_of(cfg, name), **of_mesh)


def lower_step(cfg: Config, name: str, devices: list[Any]) -> jax.stages.Lowered:
    """The jitted, donated step of stage `name` on a mesh of `devices`, ready to be compiled.

    Raises:
      UserError: the mesh does not fit the devices or the model, or the platform does not support a setting.
    """
    shaped = setup.shape(cfg, setup.mesh_of(cfg, devices))
    step, target = step_of(shaped, name)
    with jax.set_mesh(shaped.mesh):
        return step.lower(target, abstract_batch(shaped.config, name, shaped.mesh))


def step_of(shaped: setup.Shaped, name: str) -> tuple[Any, TrainState]:
    """The jitted, donated step of stage `name`, and the shapes of its state."""
    cfg, are_matrices, stage = shaped.config, shaped.matrices, shaped.config.stages[name]
    tx, rate = opt.adamw(stage, are_matrices), opt.schedule(stage, STEPS)
    target = state.abstract_state(shaped.abstract_at(name), stage.trainable, tx, shaped.mesh)
    step = make_train_step(shaped.model, are_matrices, stage, tx, rate, 0, cfg.seed, cfg.loss_chunk)
    return jax.jit(step, donate_argnums=0), target


# --- the TPU compiler ---


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler's refusal, in its words."""

    reason: str


def prepare() -> None:
    """Sets the environment. Call it before JAX initialises its devices, which are the CPU's."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")


def check_installed() -> None:
    """Raises UserError if there is no TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'the TPU compiler is not installed: pip install "jax[tpu]=={jax.__version__}" (the extra "tpu"; '
            "it runs on a CPU machine, no TPU is needed)"
        )


def devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, to compile for."""
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    options |= {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
    with quiet():
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)


def ask(
    cfg: Config, name: str, topology: Topology, expected: Bytes
) -> tuple[Bytes | TooLarge, list[Collective] | None]:
    """Compiles the real step of stage `name`.

    Args:
      cfg, name, topology: the step and the chips.
      expected: the analytic estimate, by which the compiler's temporaries are divided into kinds.

    Returns:
      Memory per chip and the step's collectives; or the compiler's refusal and None.
    """
    with quiet():
        lowered = lower_step(cfg, name, devices(topology))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return too_large(str(error)), None
    return divided(compiled.memory_analysis(), expected), collectives_of(compiled.as_text())


def divided(analysis: Any, expected: Bytes) -> Bytes:
    """`memory_analysis()` by kind of memory. Padding of the arguments counts as code.

    Temporaries are the peak minus the arguments, since the compiler accepts a program by its peak. `temp_size_in_bytes`,
    which goes into `allocated`, is larger (docs/plan.md).
    """
    temporary = float(analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)
    gradients = min(expected.gradients, temporary)
    activations = min(expected.activations, temporary - gradients)
    return dataclasses.replace(
        expected,
        gradients=gradients,
        activations=activations,
        working=temporary - gradients - activations,
        code=analysis.generated_code_size_in_bytes + analysis.argument_size_in_bytes - expected.state,
        allocated=analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
    )


def too_large(message: str) -> TooLarge:
    """The first sentence of the compiler's message."""
    return TooLarge(" ".join(message.split("RESOURCE_EXHAUSTED:")[-1].split("\n")[0].split()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what libtpu's C++ code writes to stderr, unless the block raises an unexpected error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            file.seek(0)
            os.write(stderr, file.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


# --- collectives of a compiled step ---

# The compiler splits one collective into several asynchronous instructions, which share a channel, and prints the body of a
# loop once. So each channel counts once per loop, times the loop's trip count, which is read from its condition.


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a step.

    Attributes:
      kind: name of the HLO operation, for example "all-gather".
      bytes: bytes that a chip receives each time, with a ring algorithm.
      times: how often it runs in a step.
    """

    kind: str
    bytes: float
    times: int


def collectives_of(hlo: str) -> list[Collective]:
    """All collectives of a program. hlo: the text of a compiled step (`jax.stages.Compiled.as_text()`)."""
    bodies = _computations(hlo)
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    entry = next(m[1] for m in map(COMPUTATION.match, hlo.splitlines()) if m and m[0].startswith("ENTRY"))
    known: dict[tuple[str, str, str], Collective] = {}

    def walk(name: str, loop: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := COLLECTIVE.match(line):
                shapes, kind, start = match.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                key = (loop, kind, channel[1] if channel else line)
                known.setdefault(key, Collective(kind, _incoming(kind, shapes, bool(start), _ways(line)), times))
        for called, trips in calls.get(name, ()):
            walk(called, called if trips else loop, times * (trips or 1))

    walk(entry, "", 1)
    return list(known.values())


def _computations(hlo: str) -> dict[str, list[str]]:
    """{name of a computation: its lines}."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            lines = bodies.setdefault(match[1], [])
        else:
            lines.append(line)
    return bodies


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation called by these lines, trip count of the loop that calls it; 0 if it is not a loop)."""
    for line in lines:
        if match := WHILE.search(line):
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            yield match[2], int(known[1]) if known else _trips(bodies[match[1]], bodies[match[2]])
            continue
        for one, several in CALLED.findall(line):
            yield from ((called, 0) for called in ([one] if one else re.findall(r"%[\w.-]+", several)))


def _trips(condition: list[str], body: list[str]) -> int:
    """Trip count of a loop that counts up to a constant; 1 if it is only known at run time.

    The step of the counter matters: windowed einsums handle several pieces of a matrix in one iteration.
    """
    before, after = (dict(re.findall(r"(%[\w.-]+) = (.*)", "\n".join(lines))) for lines in (condition, body))
    constant = lambda text: re.search(r"^[su]32\[\]\S* constant\((\d+)\)", text or "")
    compared = re.search(r"compare\((%[\w.-]+), (%[\w.-]+)\)", "\n".join(condition))
    limit = constant(before.get(compared[2])) if compared else None
    if not limit:
        return 1
    step, counter = 1, re.search(r"index=(\d+)", before.get(compared[1], ""))
    ends = re.search(r"^\s*ROOT .* tuple\(([^)]*)\)", "\n".join(body), re.MULTILINE)
    if counter and ends:
        named = re.findall(r"%[\w.-]+", ends[1])[int(counter[1])]
        added = re.search(r" add\(%[\w.-]+, (%[\w.-]+)\)", after.get(named, ""))
        increment = constant(after.get(added[1])) if added else None
        step = int(increment[1]) if increment else 1
    return -(-int(limit[1]) // step)


def _ways(line: str) -> int:
    """Number of chips in one group of the collective."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2  # a permutation lists pairs


def _incoming(kind: str, shapes: str, started: bool, n: int) -> float:
    """Bytes that a chip receives, from the shapes of the result; a `-start` also returns its operands."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * WIDTHS.get(dtype, 4)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shapes))
    ]
    if started and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[1:2]
    share = (n - 1) / n
    shares = {"all-gather": share, "all-reduce": 2 * share, "all-to-all": share, "reduce-scatter": n - 1}
    return shares.get(kind, 1.0) * sum(sizes)


def crossing(step: Sequence[Collective], topology: Topology) -> dict[str, Any]:
    """Bytes that a chip receives in a step, by kind of collective, and the seconds at the rate of the interconnect."""
    by_kind: dict[str, float] = collections.Counter()
    for each in step:
        by_kind[each.kind] += each.bytes * each.times
    total = sum(by_kind.values())
    return {"bytes": dict(by_kind), "total": total, "seconds": total / topology.chip.link}
