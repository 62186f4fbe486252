"""Eight CPU devices, whatever the machine has, and full float32 products; to be set before JAX starts.

Compiling is most of what the tests do, and LLVM's optimisations and XLA's newer loop emitters are most of that: they are
off. What one test or command has compiled the others find in a cache, which lives as long as the tests run.
"""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have it from who starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparsecut_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["COLUMNS"] = "100"  # --help is as wide as the terminal
os.environ["NPROC"] = "32"  # threads for eight devices that wait for one another; with few a busy machine locks up
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        # It reorders collectives, and devices whose branches have some then wait for one another for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        os.environ.get("XLA_FLAGS", ""),  # wins over the line above
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest

import runs
from tiny import Tiny

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The tiny model with its default shortcuts (4,0) (2,3) (0,6), its parameters and one jitted forward pass."""
    return Tiny.build()


@pytest.fixture
def one_device(monkeypatch):
    runs.take_one_device(monkeypatch)


HEAVY = (
    "test_train",
    "test_tour",
    "test_hosts",
    "test_sharding",
    "test_convert",
    "test_lora",
    "test_state",
    "test_api",
    "test_ways",
    "test_new_way",
    "test_own_tasks",
    "test_layalign",
    "test_features",
    "test_lab",
)
# Files that compile whole models or start whole commands: not part of `-m quick`.
SLOW = (
    *HEAVY,
    *("test_attention", "test_benchmark", "test_checkpoint", "test_cli", "test_compare", "test_data_command"),
    *("test_decoding", "test_easy_vqa", "test_generate", "test_golden", "test_install", "test_launch", "test_load"),
    *(
        "test_parity",
        "test_pipeline",
        "test_batch_plan",
        "test_planning_answer",
        "test_planning_residuals",
        "test_planning_work",
        "test_planning_memory",
    ),
    *("test_planning_tables", "test_planning_shortcuts", "test_scenes_controls", "test_sparsecut", "test_step"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, so that two workers end at about the same time; what is quick is marked so."""
    items.sort(key=lambda item: HEAVY.index(item.path.stem) if item.path.stem in HEAVY else len(HEAVY))
    for item in items:
        if item.path.stem not in SLOW and not item.get_closest_marker("plan"):
            item.add_marker("quick")
