"""What the real TPU compiler says of the paper's runs. It is libtpu, and runs on a CPU machine.

`python -m pytest -m plan` compiles the whole models, minutes each; otherwise models of two layers are compiled.
"""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import pytest

from runs import command, finish
from sparsecut_jax.planning.hardware import GIB

installed = importlib.util.find_spec("libtpu") is not None
pytestmark = pytest.mark.skipif(not installed, reason='needs the TPU compiler: pip install "jax[tpu]"')

FINETUNE = "--config=configs/sparsecut.py:size={},stage=finetune"
TWO_LAYERS = (
    "--config.llm.layers=2", "--config.vision.layers=2", "--config.vision.select_layer=-1", "--config.shortcuts.count=2",
)  # fmt: skip


@functools.cache
def planned(size, topology, *flags, rows=64):
    """(exit code, plan.json, stdout, stderr) of the command for that many rows a step."""
    batch = f"--config.stages.instruct.batch_size={rows}"
    with tempfile.TemporaryDirectory() as folder:
        process = command(  # XLA_FLAGS: those of tests/conftest.py are for the CPU's compiler
            "plan", FINETUNE.format(size), f"--topology={topology}", batch, f"--out={folder}", *flags, XLA_FLAGS=""
        )
        code, out, err = finish(process, timeout=3000)
        return code, json.loads(Path(folder, "plan.json").read_text()) if code == 0 else None, out, err


def state_of(plan):
    return sum(plan["bytes_per_chip"][kind] for kind in ("parameters", "optimizer"))


# --- models of two layers, of the same widths ---


@pytest.fixture(scope="module")
def two_layers():
    return planned("7b", "v5e:8x8", *TWO_LAYERS)


def test_the_command_asks_the_compiler(two_layers):
    code, plan, out, err = two_layers
    assert code == 0 and err == ""
    assert plan["bytes_per_chip"]["source"].startswith("TPU compiler")
    assert plan["bytes_per_chip"]["fits"] and plan["bytes_per_chip"]["code"] > 2**20
    assert "fits" in out and plan["settings"]["attention"] == "splash"


def test_arguments_are_those_of_the_analytic_model(two_layers):
    """What arguments take beyond their numbers, and the program, is less than a tenth of a GiB."""
    assert two_layers[1]["bytes_per_chip"]["code"] < 0.1 * GIB


# --- the whole models ---


@pytest.mark.plan
@pytest.mark.parametrize("size, most", [("7b", 4), ("13b", 7)])
def test_full_fine_tuning_on_64_chips(size, most):
    """All that the compiler lists: five views, eight shortcuts, one row of 2,048 positions a chip."""
    code, plan, _, _ = planned(size, "v5e:8x8")
    assert code == 0
    assert plan["settings"]["batch_size"] == 64 and plan["settings"]["accumulate"] == 1
    assert plan["bytes_per_chip"]["fits"]
    assert plan["bytes_per_chip"]["total"] <= plan["bytes_per_chip"]["allocated"] <= most * GIB


@pytest.mark.plan
def test_accumulation_takes_at_most_one_more_copy_of_the_gradients():
    once = planned("7b", "v5e:8x8")[1]["bytes_per_chip"]
    turns = planned("7b", "v5e:8x8", "--config.stages.instruct.accumulate=2", rows=128)[1]["bytes_per_chip"]
    assert 0.1 * once["gradients"] < turns["total"] - once["total"] < 1.1 * once["gradients"]


@pytest.mark.plan
def test_state_falls_with_the_chips():
    """From 16 to 256 chips: a sixteenth within 5 %. The compiler's arguments are the state and its padding."""
    per_chip = {}
    for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256)):
        code, plan, _, _ = planned("7b", topology, rows=chips)
        assert code == 0
        per_chip[chips] = state_of(plan)
    assert per_chip[16] / per_chip[256] == pytest.approx(16, rel=0.05)


@pytest.mark.plan
def test_seven_billion_do_not_fit_on_four_chips():
    code, plan, out, _ = planned("7b", "v5e:2x2", rows=4)
    assert code == 0
    assert not plan["bytes_per_chip"]["fits"]
    assert "does not fit in 15.75 GiB" in out and "Ran out of memory" in plan["bytes_per_chip"]["refusal"]
    assert plan["search"]["options"] == []
    assert "no setting fits on 4 x v5e; v5e:" in out
