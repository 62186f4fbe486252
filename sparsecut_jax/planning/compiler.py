"""Compiles a training step with the TPU compiler (libtpu), which runs on a CPU machine."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from sparsecut_jax.planning.collectives import Collective, collectives
from sparsecut_jax.planning.compile import lower_step
from sparsecut_jax.planning.hardware import GIB, Topology
from sparsecut_jax.planning.memory import Bytes
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to lock
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler's refusal. `bytes`: what it says a chip would need, 0 if it does not say."""

    reason: str
    bytes: float


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

    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
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
    return divided(compiled.memory_analysis(), expected), collectives(compiled.as_text())


def divided(found: Any, expected: Bytes) -> Bytes:
    """`memory_analysis()` by kind of memory. Padding of the arguments counts as code.

    Temporaries are the peak minus the arguments, since the compiler accepts a program by its peak. `temp_size_in_bytes`,
    which goes into `allocated`, is larger (docs/plan.md).
    """
    temporary = float(found.peak_memory_in_bytes - found.argument_size_in_bytes)
    gradients = min(expected.gradients, temporary)
    activations = min(expected.activations, temporary - gradients)
    return dataclasses.replace(
        expected,
        gradients=gradients,
        activations=activations,
        working=temporary - gradients - activations,
        code=found.generated_code_size_in_bytes + found.argument_size_in_bytes - expected.state,
        allocated=found.argument_size_in_bytes + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
    )


def too_large(message: str) -> TooLarge:
    """Parses the compiler's message, whose first sentence gives the sizes in units of 2^10."""
    first = " ".join(message.split("RESOURCE_EXHAUSTED:")[-1].split("\n")[0].split())
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)([KMGT])\b", first)]
    return TooLarge(first, max(sizes, default=0.0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what libtpu's C++ code writes to stderr, unless the block raises an unexpected error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            file.seek(0)
            os.write(kept, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
