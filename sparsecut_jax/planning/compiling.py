"""Lowers the training step of a config for devices that are not present, compiles it for TPUs, and reads its memory.

libtpu compiles for TPUs and runs on a CPU machine; jaxlib itself compiles for CPU devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from sparsecut_jax.data.batches import slots_of, spec_of
from sparsecut_jax.planning.collectives import Collective, collectives_of
from sparsecut_jax.planning.memory import Bytes
from sparsecut_jax.runs import setup
from sparsecut_jax.runtime import sharding
from sparsecut_jax.runtime.hardware import Topology
from sparsecut_jax.settings import Config
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import Batch, TrainState, UserError

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
