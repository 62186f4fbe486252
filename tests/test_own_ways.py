"""Ways of fusing and injecting that nothing but their own files knows: written, read back and verified, with settings."""

import json
import subprocess
import sys

import pytest

from runs import ROOT

FUSING = """
import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Wiring
from sparsecut_jax.models.layers import normal, ones, weight
from sparsecut_jax.models.levels import patches
from sparsecut_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Settings:
    layers: tuple[int, ...] = setting((0,), "Layers that it enters.")
    scale: float = setting(1.0, "Factor.")


IGNORES = ("shortcuts.", "fusion.grid", "fusion.shared")


def wiring(settings, cfg):
    entering = tuple((0,) if i in settings.layers else () for i in range(cfg.llm.layers))
    level = cfg.vision.layers // 2  # of a tower cut to the blocks that are used it would be another one
    return Wiring((level,), patches(cfg) + 1, entering, names=("toy",), injecting="toy")


class Fuse(Fusing):
    @nn.compact
    def __call__(self, seen, question=None):
        x = seen.levels[0, :, 0]
        gate = weight(self, "gate", (), (), ones)
        mix = weight(self, "mix", (2, 1, x.shape[-1], self.width), ("levels", None, "embed", "mlp"), normal(0.1))
        x = gate * self.settings.scale * jnp.einsum("INC,LOCD->IND", x, mix)
        tokens = jnp.concatenate([x, x.mean(1, keepdims=True)], 1)
        return Fused(tokens, tokens[None])
"""

INJECTING = """
import dataclasses

from sparsecut_jax.models.layers import normal, weight
from sparsecut_jax.settings import setting

in_decode = False


@dataclasses.dataclass(frozen=True)
class Settings:
    power: int = setting(1, "Exponent of the gate.")


def weights(module, sites, llm):
    return {"gate": weight(module, "gate", (sites,), ("sites",), normal(0.5))}


def before(settings, x, here):
    return x * (1 + here.weights["gate"].astype(x.dtype) ** settings.power), None
"""

WRITE = """
import dataclasses, json, sys
from sparsecut_jax.models import fusing, injecting
fusing.__path__.append(sys.argv[1] + "/fusing")
injecting.__path__.append(sys.argv[1] + "/injecting")
sys.path.insert(0, "tests")
import jax, numpy as np
from parity_cases import join
from sparsecut_jax.exporting import adapter, export, verify
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.types import UserError

out = sys.argv[1] + "/out"
settings = {
    "fusion.name": "toy", "fusion.toy.layers": (0, 2), "fusion.toy.scale": 0.5, "injecting.toy.power": 3,
    "llm.vocab_size": 96,
}
asked = join(settings=settings)
mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
run = Run("runs/x", 7, asked.cfg, mesh, build_model(asked.cfg), asked.params, None, None)
try:
    export.write(run, out, "llava", drop_shortcuts=False)
except UserError as error:
    refused = str(error)
as_what = export.write(run, out, "auto", drop_shortcuts=False)
verified = verify.verify(run, out, drop_shortcuts=False)
export.write(run, out + "/tower", "vision", drop_shortcuts=False)
assert "arrays bit by bit" in verify.verify(run, out + "/tower", drop_shortcuts=False)
again = join(model=out)
old, new = flatten(asked.params), flatten(again.params)
assert old.keys() == new.keys()
assert again.cfg.fusion == asked.cfg.fusion and again.cfg.injecting == asked.cfg.injecting
assert again.model.wiring == asked.model.wiring
assert all(np.asarray(old[path]).tobytes() == np.asarray(new[path]).tobytes() for path in old)
adapted = join(settings=settings | {"lora.rank": 2, "stages.instruct.trainable": (".*_lora_[ab]", "fusion/.*")}).cfg
adapted = dataclasses.replace(adapted, run_stages=("instruct",))
beside = dataclasses.replace(run, config=adapted, params=join(settings=settings | {"lora.rank": 2}).params)
adapter.write_adapter(beside, out)
alone = flatten(join(fusion=out + "/fusion.safetensors", settings=settings).params)
fusion = {path: leaf for path, leaf in flatten(beside.params).items() if path.startswith("fusion/")}
assert all(np.asarray(leaf).tobytes() == np.asarray(alone[path]).tobytes() for path, leaf in fusion.items())
kept = join(model=out, settings={"fusion.toy.scale": 2.0}, keep=("fusion.toy.scale",)).cfg
print(json.dumps({
    "refused": refused, "as_what": as_what, "verified": verified, "kept": [kept.fusion.toy.scale, kept.fusion.toy.layers],
    "shapes": {path: leaf.shape for path, leaf in old.items() if path.startswith("fusion/")},
}))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    for kind, text in (("fusing", FUSING), ("injecting", INJECTING)):
        (folder / kind).mkdir()
        (folder / kind / "toy.py").write_text(text)
    (folder / "out/tower").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder / "out"


def test_parameters_and_settings_come_back(written):
    """A scalar, a stack of four axes, a gate per site; the levels are those of the whole tower, though it was cut."""
    report, folder = written
    assert report["shapes"] == {"fusion/gate": [], "fusion/mix": [2, 1, 32, 32], "fusion/inject/gate": [2]}
    assert report["as_what"] == "runs/x, step 7, as sparsecut in float32"
    assert report["verified"].endswith("logits on a built-in batch differ by at most 0")
    assert report["kept"] == [2.0, [0, 2]]  # what the user gives wins, the rest is the file's
    config = json.loads((folder / "config.json").read_text())
    assert config["fusion"] == {
        "name": "toy", "shared": True, "grid": [2, 2], "toy": {"layers": [0, 2], "scale": 0.5},
    }  # fmt: skip
    assert config["injecting"] == {"toy": {"power": 3}}
    assert config["vision_config"]["num_hidden_layers"] == 4


def test_llava_is_refused_for_what_it_cannot_do(written):
    assert written[0]["refused"] == (
        "this model cannot be written as llava: an image takes 17 positions, in LLaVA one for each of its 16 patches; use "
        "--as=sparsecut"
    )
