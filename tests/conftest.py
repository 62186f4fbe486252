"""Eight CPU devices, whatever the machine has, and full float32 products; to be set before JAX starts.

Compiling is most of what the tests do, and LLVM's optimisations and XLA's newer loop emitters are most of that: they are
off. What one test or command has compiled the others find in a cache, which lives as long as the tests run.
"""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsecut_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "32"  # threads for eight devices that wait for one another; with few a busy machine locks up
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),  # wins over the line above
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest

from tiny import Tiny

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The tiny model with its default shortcuts (4,0) (2,3) (0,6), its parameters and one jitted forward pass."""
    return Tiny.build()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The run that tests/test_train.py looks at takes half a minute: it starts now, beside the tests before those."""
    if not session.config.option.collectonly and any("unbroken" in item.fixturenames for item in session.items):
        import test_train

        test_train.started_run()
