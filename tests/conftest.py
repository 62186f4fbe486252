"""Eight CPU devices, whatever the machine has, and full float32 products; to be set before JAX starts.

Compiling is most of what the tests do, and LLVM's optimisations are half of that: they are off.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),  # wins over the line above
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest
from tiny import Tiny

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The tiny model with its default shortcuts (4,0) (2,3) (0,6), its parameters and one jitted forward pass."""
    return Tiny.build()
