"""The command `lab`: trains what is missing, records it, names what failed, and prints the tables again without training."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import runs
from sparsecut_jax.config import check

FILE = """
import json
from ml_collections import ConfigDict

ARMS = ("mlp", "gemel", "broken")

def get_config(arguments=""):
    config = ConfigDict(json.loads({raw!r}), convert_dict=True)
    tuples = lambda x: ConfigDict({{k: tuples(v) if isinstance(v, ConfigDict) else tuple(v) if isinstance(v, (list, tuple)) else v
                                   for k, v in x.items()}})
    config = tuples(config)
    config.fusion.name = arguments.removeprefix("way=")
    return config
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    runs.draw_rows(folder)
    quick = {
        "run_stages": ("instruct",),
        "stages.instruct.max_steps": 4,
        "checkpoint.every": 0,
        "stages.instruct.seq_len": 40,
    }
    (folder / "config.py").write_text(
        FILE.format(raw=json.dumps(runs.small(folder, folder / "run", set=quick).to_dict()))
    )
    return folder


def test_it_trains_each_arm_once_and_names_what_failed(lab):
    command = ("lab", f"--config={lab}/config.py", f"--out={lab}/out", "--seeds=1")
    code, out, err = runs.finish(runs.command(*command))
    assert code == 2
    assert err.startswith(
        "error: 1 of 3 runs failed; the first, broken with seed 0: error: config.fusion.name='broken': expected"
    )
    assert "0 of 3 runs are recorded" in out and "[3/3] broken, seed 0: failed" in out
    assert out.count("| `mlp` | 1 | ") == out.count("| `gemel` | 1 | ") == 1
    names = {path.name for path in (lab / "out").iterdir()}
    assert {"lab.md", "lab.png", "lab.jsonl", "mlp-0", "mlp-0.txt"} <= names
    assert not (lab / "out" / "mlp-0" / "checkpoints").exists()

    before = (lab / "out" / "mlp-0" / "results.json").stat().st_mtime_ns
    (again, table), (unknown, known) = (
        (code, out) if not code else (code, err)
        for code, out, err in runs.each((*command, "--arms=gemel,mlp"), (*command, "--table", "--arms=gemmel"))
    )
    assert (again, unknown) == (0, 2)
    assert "to go" not in table and "| `gemel` | 1 | " in table
    assert (lab / "out" / "mlp-0" / "results.json").stat().st_mtime_ns == before
    assert "--arms: " in known and "has no 'gemmel'; did you mean 'gemel'?; it has mlp, gemel, broken" in known


def test_other_settings_need_another_folder(lab):
    text = (lab / "config.py").read_text()
    (lab / "config.py").write_text(text.replace('"max_steps": 4', '"max_steps": 5'))
    [(code, _, err)] = runs.each(("lab", f"--config={lab}/config.py", f"--out={lab}/out", "--seeds=1"))
    assert code == 2 and "has a run of 'mlp' with other settings" in err and "choose another --out" in err


def test_a_config_without_arms_is_refused():
    [(code, _, err)] = runs.each(("lab", "--config=configs/base.py"))
    assert (code, err) == (
        2,
        "error: configs/base.py lists no ARMS to compare; expected a config file like configs/lab.py\n",
    )


def test_every_arm_of_the_shipped_config_is_a_config(monkeypatch):
    lab = importlib.import_module("configs.lab")
    monkeypatch.setattr(lab.smollm2, "file_of", lambda *_: "vit_s_focus.onnx")
    sizes = {}
    for arm in lab.ARMS:
        cfg = check(lab.get_config(f"way={arm}"))
        stage = cfg.stages["instruct"]
        sizes[arm] = (stage.max_steps, stage.lr, cfg.data.cache_features, cfg.fusion.norm_levels)
    assert set(sizes.values()) == {(280, 2e-3, "float16", True)}
    assert {"llava", "crops", "repeat", "concat", "dense", "channel"} <= sizes.keys()
