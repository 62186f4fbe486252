"""The real commands: golden cases in from their files, out again, and back; and what they refuse."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from golden_cases import FUSIONS, make_batch, numbers_of, sources_of, spec_of
from parity_cases import FOLDER
from runs import each
from sparsecut_jax.inference.decoding import encode_images, generate
from sparsecut_jax.models.losses import cross_entropy
from sparsecut_jax.runs.run import load_run


def from_hf(name: str, out: Path) -> tuple[str, ...]:
    """The command for a golden case."""
    spec = spec_of(name)
    parts = [f"--{part}={path}" for part, path in sources_of(name).items()]
    plan = ["--config.shortcuts.density=none"]
    if spec["vit_levels"]:
        plan = ["--config.shortcuts.density=explicit"]
        plan += [f"--config.shortcuts.{key}={tuple(spec[key])}" for key in ("vit_levels", "llm_layers")]
    fusion = f"--config.fusion.name={FUSIONS[spec['mm_projector_type']]}"
    return "convert", "from-hf", *parts, "--config=configs/base.py", fusion, *plan, f"--out={out}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Both golden cases: in, out with --verify, and in again; the folders and what the commands said."""
    folder = tmp_path_factory.mktemp("convert")
    cases = {"a": "a_cross_mlp_llama", "e": "e_plain_llava_llama"}
    commands = {f"{key}.run": from_hf(name, folder / f"{key}.run") for key, name in cases.items()}
    for key in cases:
        hf = f"{folder}/{key}.hf"
        commands[f"{key}.hf"] = ("convert", "to-hf", f"--workdir={folder}/{key}.run", f"--out={hf}", "--verify")
        commands[f"{key}.again"] = ("convert", "from-hf", f"--model={hf}", f"--out={folder}/{key}.again")
    said = {}
    for name, (code, out, err) in zip(commands, each(*commands.values()), strict=True):
        assert (code, err) == (0, ""), err
        said[name] = out
    return folder, said


@pytest.mark.parametrize("key, name", [("a", "a_cross_mlp_llama"), ("e", "e_plain_llava_llama")])
def test_golden_cases_through_the_command(converted, key, name):
    """Logits, loss and greedy ids of the reference."""
    run, io = load_run(str(converted[0] / f"{key}.run"), text=False), numbers_of(name)
    batch = make_batch(io)
    logits, _ = jax.jit(run.model.apply)({"params": run.params}, batch)
    off = np.abs(logits - io["logits"])[io["expanded_mask"] == 1]
    assert off.max() < 3e-5 and off.mean() < 5e-6
    total, count = cross_entropy(logits, batch)
    assert abs(float(total / count) - float(io["loss"])) < 5e-6
    length = batch.segments.sum(1).astype(np.int32)
    encoded = encode_images(run.model, run.params, batch.views)
    ids, _ = generate(run.model, run.params, batch.tokens, length, batch.image_start, encoded, 12)
    np.testing.assert_array_equal(ids, io["greedy_ids"])


def test_what_comes_back_is_bit_equal(converted):
    folder, _ = converted
    for key in "ae":
        runs = [load_run(str(folder / f"{key}.{step}"), text=False) for step in ("run", "again")]
        assert runs[0].model.wiring.shortcuts.pairs == runs[1].model.wiring.shortcuts.pairs
        assert runs[0].model.wiring.shortcuts.main_level == runs[1].model.wiring.shortcuts.main_level == 4
        first, again = (traverse_util.flatten_dict(run.params, sep="/") for run in runs)
        assert set(first) == set(again)
        for path, leaf in first.items():
            now = np.asarray(again[path])
            if key == "e" and path in ("llm/embedding", "llm/head"):  # llava has rows for its image token
                now = now[: leaf.shape[0], : leaf.shape[1]]
            assert now.tobytes() == np.asarray(leaf).tobytes(), path


def test_what_is_written(converted):
    folder, said = converted
    assert {"checkpoints", "config.json", "shortcuts.png"} <= set(os.listdir(folder / "a.run"))
    assert set(os.listdir(folder / "a.hf")) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert not [name for name in os.listdir(folder) if "partial" in name]
    config = json.loads((folder / "a.hf/config.json").read_text())
    assert (config["model_type"], config["vision_feature_layer"]) == ("sparsecut", -1)  # the tower's top block is gone
    assert config["fusion"] == {"name": "channel", "shared": True, "grid": [2, 2]}
    assert config["shortcuts"] == {"vit_levels": [0, 2, 4], "llm_layers": [0, 3, 6], "position": "pre"}
    assert config["vision_config"]["num_hidden_layers"] == 5
    llava = json.loads((folder / "e.hf/config.json").read_text())
    assert (llava["model_type"], llava["image_token_index"], llava["text_config"]["vocab_size"]) == ("llava", 300, 320)
    assert "fresh      0 arrays, 0 parameters" in said["a.run"]
    assert "blocks above 4, the highest one used: 16" in said["a.run"]
    assert "verified   37 arrays bit by bit, logits on a built-in batch differ by at most 0" in said["a.hf"]
    assert "as llava in float32" in said["e.hf"]


BAD = [
    (("from-hf",), "no weights are named; for example: "),
    (("from-hf", f"--llm={FOLDER}/llama2"), "--out is missing"),
    (("from-hf", f"--llm={FOLDER}/llama2", "--fusion=no.safetensors", "--out={}/x"), "config.init.fusion='no.safetensors' does not exist"),
    (("to-hf", "--workdir={}", "--out={}/x"), "holds no checkpoint"),
    (("sideways",), "unknown command 'sideways'; expected from-hf (reads weights"),
]  # fmt: skip


def test_bad_input_is_one_sentence(converted, tmp_path):
    dropped = ("to-hf", f"--workdir={converted[0]}/a.run", "--out={}/x", "--as=llava", "--drop-shortcuts")
    cases = [*BAD, (dropped, "reads hi-res views, which LLaVA does not have")]
    found = each(*(("convert", *(a.replace("{}", str(tmp_path)) for a in args)) for args, _ in cases))
    for (args, expected), (code, out, err) in zip(cases, found, strict=True):
        assert code == 2 and out == "", args
        assert err.startswith("error: ") and err.count("\n") == 1, args
        assert expected in err
    assert os.listdir(tmp_path) == []
