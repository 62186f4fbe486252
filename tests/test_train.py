"""The real commands end to end: a run, its files, kill and resume, SIGTERM, divergence, meshes, evaluate, generate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from runs import assert_same, parameters
from sparsecut_jax import config as config_lib
from sparsecut_jax import train as train_lib
from sparsecut_jax.convert import to_hf
from sparsecut_jax.data.sources import open_tests
from sparsecut_jax.evaluation.accuracy import report_accuracy
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.train import locked, train
from sparsecut_jax.training.report import read_metrics
from sparsecut_jax.types import Exit, UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 good rows, and in front of them two whose pictures are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    runs.draw_rows_behind_broken_ones(folder, "page.png", "nowhere.png")
    return folder


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory) -> Path:
    """Workdir of a run of one device that nobody disturbed, made by the command itself."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = runs.write_config(folder / "config.py", runs.small(pictures, folder / "run"))
    code, out, err = runs.finish(runs.command("train", f"--config={config}"))
    assert (code, err) == (0, ""), err
    (folder / "stdout.txt").write_text(out)
    return folder / "run"


def losses(workdir: Path) -> dict[int, float]:
    return logged(workdir, "loss")


def logged(workdir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(str(workdir)) if "loss" in line}


def test_a_run_leaves_everything_in_its_workdir(unbroken):
    for name in ("config.json", "metrics.jsonl", "results.json", "loss.png", "shortcuts.png", "answers.jsonl"):
        assert (unbroken / name).stat().st_size > 0, name
    assert (unbroken / "tokenizer" / "tokenizer.json").is_file()
    assert list((unbroken / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (unbroken / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["row"], line["cause"]) for line in lines} == {
        (stage, row, cause)
        for stage in ("align", "instruct")
        for row, cause in ((0, "broken_image"), (1, "missing_image"))
    }
    results = json.loads((unbroken / "results.json").read_text())
    assert results["step"] == 12
    assert results["bad_samples"] == {"broken_image": 1, "missing_image": 1}
    assert results["cut_answers"] == {}
    assert results["rows/holdout/count"] == 16  # 8 held-out rows, 2 questions each
    assert 0 <= results["rows/holdout/accuracy"] <= 1
    lines = [line for line in read_metrics(str(unbroken)) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["stage"] for line in lines] == ["align"] * 4 + ["instruct"] * 8
    for line in lines:
        assert set(line["grad_norm_by_part"]) == {"vision", "fusion", "llm"}
        assert set(line["shortcut_ratio"]) == {"vit2_llm0", "vit0_llm2"}
        assert all(value > 0 for value in line["shortcut_ratio"].values())
        assert line["tokens_per_second"] > 0 and 0 <= line["input_wait"] <= 1
        assert 0 < line["seconds_per_step_median"] <= line["seconds_per_step_most"]
        assert line["model_flops_per_second"] > 0 and line["mfu"] is None  # no vendor states a CPU's rate


def test_nothing_recompiles_after_the_first_step_of_a_stage(unbroken):
    counts = {line["step"]: line["compilations"] for line in read_metrics(str(unbroken)) if "loss" in line}
    # Step 4 ends a stage: the held-out evaluation and the check before saving are compiled after it.
    assert counts[1] == counts[2]
    assert counts[7] == counts[8] and counts[10] == counts[11] == counts[12]


def test_the_start_shows_devices_parameters_and_plan(unbroken):
    out = (unbroken.parent / "stdout.txt").read_text()
    for text in ("devices    1 x cpu", "mesh       data=1 x fsdp=1 x tensor=1", "ViT block (of 3)  2  0",
                 "LLM layer (of 3)  0  2", "align 4/4", "instruct 8/8", "s per step (5th to 95th percentile: ", "s: imports", "sample question", "results.json", "answers.jsonl", "--prompt='what color?'\n"):  # fmt: skip
        assert text in out, text


def test_the_log_says_what_the_start_took(unbroken):
    (startup,) = [line["startup"] for line in read_metrics(str(unbroken)) if "startup" in line]
    assert list(startup) == ["imports", "devices", "data", "shapes", "rows", "parameters", "first step"]
    assert all(0 <= seconds < 240 for seconds in startup.values()) and startup["imports"] > 0.5


def test_loss_falls(unbroken):
    found = losses(unbroken)
    assert found[4] < found[1] and found[12] < found[5]


def test_killed_and_resumed_equals_unbroken(pictures, unbroken, tmp_path):
    """SIGKILL once in the middle of a save and once between saves."""
    config = runs.write_config(tmp_path / "config.py", runs.small(pictures, tmp_path / "run", set={"eval.test": False}))
    checkpoints = tmp_path / "run" / "checkpoints"

    def saving() -> bool:
        return checkpoints.is_dir() and any("tmp" in entry.name for entry in checkpoints.iterdir())

    def late() -> bool:
        return max(losses(tmp_path / "run"), default=0) >= 9

    for when in (saving, late):
        process = runs.command("train", f"--config={config}")
        while process.poll() is None and not when():
            time.sleep(0.0005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    code, _, err = runs.finish(runs.command("train", f"--config={config}"))
    assert (code, err) == (0, "")
    assert_same(parameters(tmp_path / "run"), parameters(unbroken))
    assert losses(tmp_path / "run") == losses(unbroken)
    supervised = logged(tmp_path / "run", "supervised_tokens")
    assert supervised == logged(unbroken, "supervised_tokens")
    assert 0 < supervised[8] < supervised[12]


def test_sigterm_saves_at_the_next_step_and_exits_with_3(pictures, unbroken, tmp_path):
    overrides = {"checkpoint.every": 0, "eval.test": False}
    config = runs.write_config(tmp_path / "config.py", runs.small(pictures, tmp_path / "run", set=overrides))
    process = runs.command("train", f"--config={config}")
    while process.poll() is None and max(losses(tmp_path / "run"), default=0) < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    code, _, err = runs.finish(process)
    assert code == 3, err
    assert "stopped by SIGTERM after saving step" in err and "Traceback" not in err
    code, _, err = runs.finish(runs.command("train", f"--config={config}"))
    assert (code, err) == (0, "")
    assert_same(parameters(tmp_path / "run"), parameters(unbroken))


def test_a_finished_run_started_again_trains_nothing_and_reports_the_same(unbroken, one_device):
    before = parameters(unbroken)
    results = json.loads((unbroken / "results.json").read_text())
    saved = config_lib.check(json.loads((unbroken / "config.json").read_text()))
    asked = saved.__class__(**{**vars(saved), "llm": saved.llm.__class__(**{**vars(saved.llm), "vocab_size": 0})})
    again = train(asked)
    assert again["step"] == 12
    assert again["rows/holdout/accuracy"] == results["rows/holdout/accuracy"]
    assert_same(parameters(unbroken), before)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_give_the_losses_and_gradients_of_one(pictures, unbroken, tmp_path, mesh):
    changes = {"profile": "1:2", "eval.test": False, **{f"mesh.{axis}": size for axis, size in mesh.items()}}
    config = runs.small(pictures, tmp_path / "run", set=changes)
    train(config_lib.check(config))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    one, eight = (
        [line for line in read_metrics(str(workdir)) if "loss" in line] for workdir in (unbroken, tmp_path / "run")
    )
    for a, b in zip(one[:4], eight[:4], strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
        for part, norm in a["grad_norm_by_part"].items():
            np.testing.assert_allclose(b["grad_norm_by_part"][part], norm, rtol=5e-4, err_msg=part)


def test_a_second_start_compiles_nothing(pictures, tmp_path, monkeypatch):
    """Of two runs of the same config the second takes all its programs from the user's cache."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changes = {"run_stages": ("instruct",), "stages.instruct.max_steps": 2, "eval.every": 0, "eval.test": False}
    found = []
    for name in ("first", "second"):
        config = runs.write_config(tmp_path / "config.py", runs.small(pictures, tmp_path / name, set=changes))
        code, _, err = runs.finish(runs.command("train", f"--config={config}"))
        assert (code, err) == (0, "")
        line = [line for line in read_metrics(str(tmp_path / name)) if "loss" in line][-1]
        kept = sorted(path.name for path in (tmp_path / "sparsecut_jax" / "xla").glob("*-cache"))
        found.append((line["compilations"], line["compilations_cached"], kept))
    assert found[0][1] < found[0][0]
    assert found[1][1] == found[1][0]
    assert found[1][2] == found[0][2]  # also what came after the last line


def test_evaluate_repeats_the_figure(unbroken, capsys):
    run = load_run(str(unbroken))
    with jax.set_mesh(run.mesh):
        again = report_accuracy(run, open_tests(run.config), str(unbroken))
    results = json.loads((unbroken / "results.json").read_text())
    assert again == {key: results[key] for key in again}
    answers = [json.loads(line) for line in (unbroken / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 16
    assert again["rows/holdout/accuracy"] == sum(a["expected"] == a["answer"] for a in answers) / 16
    assert again["rows/holdout/cut"] == sum(a["cut"] for a in answers)
    for answer in answers:
        (image,) = answer["images"]
        assert Path(image).is_file() and Path(image).stem == answer["row"]


def test_evaluate_on_a_file(unbroken, pictures, tmp_path):
    """Whatever the run was trained on; a length that cuts answers is honoured, and what it cuts is counted."""
    shutil.copytree(unbroken, tmp_path / "run")
    asked = {"id": "x", "image": "0.png", "answers": ["Red", "crimson"]}
    asked["conversations"] = [{"from": "human", "value": "<image>\nwhat\ncolor?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "mine.json").write_text(json.dumps([asked]))
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.png").symlink_to("../0.png")
    flags = [f"--workdir={tmp_path}/run", f"--data={tmp_path}/mine.json"]
    found = runs.each(
        ["evaluate", *flags, "--max_new_tokens=1"],
        ["evaluate", *flags, f"--images={tmp_path}", "--max_new_tokens=0"],
        ["evaluate", f"--workdir={tmp_path}/run", f"--images={tmp_path}"],
        ["evaluate", *flags, "--images=nowhere"],
        ["evaluate", *flags, f"--images={tmp_path}/links"],
        ["evaluate", *flags, f"--images={tmp_path}/links", "--follow_links"],
    )
    assert [code for code, _, _ in found] == [0, 0, 2, 2, 2, 0]
    assert "1 of 1 answers were cut at 1 tokens (config.eval.max_new_tokens, --max" in found[0][1]
    assert "mine/test: every question asked on its own" in found[1][1]
    assert "\n  what\\ncolor? " in found[1][1]  # one line of the table
    assert "error: --images=" in found[2][2] and "has no effect without --data" in found[2][2]
    assert "none of the 1 rows of mine/test can be read" in found[3][2]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["mine/test/count"] == 1 and results["rows/holdout/count"] == 16  # of the same step
    last = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[-1])
    assert (last["references"], last["images"]) == (["Red", "crimson"], [f"{tmp_path}/links/0.png"])


@pytest.fixture(scope="module")
def offspring(pictures, unbroken, tmp_path_factory):
    """A run of one step from parts of another, with two settings changed and no test rows: (exit code, stdout, stderr)
    of `train`, and of `evaluate` after it."""
    folder = tmp_path_factory.mktemp("offspring")
    changes = {
        "data.holdout": 0, "run_stages": ("instruct",), "stages.instruct.max_steps": 1, "init_from": str(unbroken),
        "shortcuts.position": "post",
    }  # fmt: skip
    config = runs.write_config(folder / "config.py", runs.small(pictures, folder / "run", set=changes))
    flags = [f"--config={config}", "--config.llm.rope_theta=5e5"]
    return runs.each(["train", *flags], ["evaluate", f"--workdir={folder}/run"])


def test_a_run_without_test_rows(offspring):
    """Training says so, in its last lines, and `evaluate` is a sentence and exit code 2."""
    (trained, said, _), (code, out, err) = offspring
    assert trained == 0 and "not tested: the run has no test rows, neither held out" in said
    assert (code, out) == (2, "")
    assert "the run has no test rows" in err and "--data=rows.json" in err and err.count("\n") == 1


def test_evaluate_and_generate_commands(unbroken, pictures):
    asked = ["--workdir=" + str(unbroken), f"--image={pictures}/0.png", "--prompt=what color?"]
    first, second = runs.command("evaluate", f"--workdir={unbroken}"), runs.command("generate", *asked)
    code, out, err = runs.finish(first)
    assert (code, err) == (0, "")
    assert "rows/holdout" in out and "accuracy" in out
    code, out, err = runs.finish(second)
    assert (code, err) == (0, "note: the answer was cut at --max_new_tokens=64\n")  # it has learnt little
    assert out.strip() != ""


def test_divergence_stops_with_4_and_saves_nothing_bad(pictures, tmp_path, one_device):
    config = runs.small(
        pictures,
        tmp_path / "run",
        set={"stages.align.lr": 1e30, "stages.align.warmup": 0.0, "stages.align.max_steps": 9},
    )
    with pytest.raises(Exit, match="not finite in 3 updates in a row") as stopped:
        train(config_lib.check(config))
    assert stopped.value.code == 4
    for name, value in parameters(tmp_path / "run").items():
        assert np.isfinite(value).all(), name


def test_init_from_takes_the_named_parts_and_says_what_is_fresh(pictures, unbroken, tmp_path, capsys, one_device):
    changes = {
        "init_from": str(unbroken), "init_parts": ("vision/.*", "fusion/.*"), "run_stages": ("instruct",),
        "stages.instruct.max_steps": 1, "stages.instruct.trainable": ("llm/.*",), "eval.test": False,
    }  # fmt: skip
    train(config_lib.check(runs.small(pictures, tmp_path / "run", set=changes)))
    out = capsys.readouterr().out
    assert "fresh:  llm/head" in out and "unused: llm/head" in out
    new, old = parameters(tmp_path / "run"), parameters(unbroken)
    for name in new:
        same = np.array_equal(new[name], old[name])
        assert same == ("llm" not in name), name


@pytest.fixture
def no_rows(monkeypatch):
    """Rows that nobody may walk, and weights that nobody may load."""
    monkeypatch.setattr(train_lib.inputs, "make_stage_plan", lambda *_: pytest.fail("rows are walked"))
    monkeypatch.setattr(train_lib, "initial_params", lambda *_: pytest.fail("weights are loaded"))


@pytest.fixture
def no_data(no_rows, monkeypatch):
    """Data that nobody may open either."""
    monkeypatch.setattr(train_lib.sources, "load_source", lambda *_: pytest.fail("data are opened"))


def sentence_of(pictures, workdir, given=(), **settings) -> str:
    raw = runs.small(pictures, workdir, set={name.replace("__", "."): value for name, value in settings.items()})
    with pytest.raises(UserError) as error:
        train(config_lib.asked(raw, given))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_from": "{}/nowhere"}, "config.init_from='{}/nowhere'"),
        ({"init_parts": ("fusion/.*", "fsion/.*")}, "config.init_parts='fsion/.*' matches no parameter of {}; paths look like "),
        (
            {"llm.rope_theta": 5e5, "llm.mlp_dim": 48},
            "{} has config.llm.mlp_dim=32, here 48; config.llm.rope_theta=10000.0, here 500000.0; with another value its "
            "weights would compute something else: set the same, or leave that part out of config.init_parts",
        ),
        ({"shortcuts.count": 4}, "shortcuts.count=4 levels cannot be picked: the vision tower has 3 blocks (0 to 2) and the LLM 3 layers (0 to 2); expected 1 to 3"),
        ({"profile": "5:13"}, "config.profile='5:13' ends after the last of the run's 12 steps"),
    ],
)  # fmt: skip
def test_what_needs_no_data_is_checked_before_they_are_opened(
    pictures, unbroken, tmp_path, one_device, no_data, changes, expected
):
    settings = {"init_from": str(unbroken), **changes}
    settings = {
        key: value.replace("{}", str(unbroken)) if key == "init_from" else value for key, value in settings.items()
    }
    found = sentence_of(pictures, tmp_path / "run", **{key.replace(".", "__"): v for key, v in settings.items()})
    assert found.startswith(expected.replace("{}", str(unbroken))), found


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"llm.vocab_size": 512}, "checkpoint {}/checkpoints/12 belongs to a different model: params/llm/embedding: expected float32["),
        ({"init_parts": ("fusion/.*",), "stages.instruct.trainable": ("fsion/.*",)}, "config.stages.instruct.trainable"),
        ({"init_from": "", "stages.align.lr_of": {"lm": 1e-3}}, "config.stages.align.lr_of='lm' matches the start of no"),
        ({"init_from": "", "stages.align.template": "tokenizer"}, "the tokenizer's chat template "),
    ],
)  # fmt: skip
def test_what_needs_a_tokenizer_is_checked_before_rows_are_walked(
    pictures, unbroken, tmp_path, one_device, no_rows, changes, start
):
    settings = {"init_from": str(unbroken), **changes}
    found = sentence_of(pictures, tmp_path / "run", **{key.replace(".", "__"): v for key, v in settings.items()})
    assert found.startswith(start.replace("{}", str(unbroken))), found


def test_a_flag_takes_the_parts_of_another_run_into_another_function(offspring):
    """As --config.llm.rope_theta does; what differs around the parts is told."""
    assert "  differs: config.shortcuts.position='post', there 'pre'" in offspring[0][1]


def test_a_run_starts_from_an_exported_model_and_resumes_without_it(pictures, unbroken, tmp_path, capsys, one_device):
    """What to_hf wrote decides sizes, plan and tokenizer of another run, whose config says otherwise."""
    exported = tmp_path / "exported"
    to_hf(str(unbroken), "latest", str(exported), "auto", drop_shortcuts=False, merge=False, check=False)
    changes = {
        "init.model": str(exported), "run_stages": ("instruct",), "stages.instruct.max_steps": 1, "llm.width": 64,
        "stages.instruct.trainable": ("fusion/.*",), "eval.test": False, "shortcuts.count": 1,
    }  # fmt: skip
    again = lambda: train(config_lib.check(runs.small(pictures, tmp_path / "run", set=changes)))
    again()
    out = capsys.readouterr().out
    assert "loaded     llm: 12 arrays" in out and "fresh      0 arrays" in out
    new, old = parameters(tmp_path / "run"), parameters(unbroken)
    assert set(new) == set(old)
    for name in new:
        assert np.array_equal(new[name], old[name]) == ("fusion" not in name), name
    shutil.rmtree(exported)
    assert again()["step"] == 1
    assert "resuming" in capsys.readouterr().out


BAD = [
    (["--config.llm.widht=3"], "config.llm.widht is not a setting; did you mean 'width'?"),
    (["--config.llm.width=wide"], "config.llm.width='wide': expected int"),
    (["--config.fusion.name=chanel"], "config.fusion.name='chanel': expected one of "),
    (
        ["--config.mesh.tensor=3"],
        "mesh(data=-1, fsdp=1, tensor=3) asks for a multiple of 3 devices, but there are 1 cpu devices",
    ),
    (["--config.loss_chunk=0"], "config.loss_chunk=0: expected at least 1"),
    (
        ["--config.llm.remat=offload"],
        "config.llm.remat='offload' moves activations to host memory, where a CPU already has them",
    ),
    (["--config.shortcuts.count=9"], "shortcuts.count=9 levels cannot be picked: the vision tower has 5 blocks"),
    (["--config.data.source=nowhere.json"], "data source 'nowhere.json' does not exist"),
    (["--confg=configs/base.py"], "unknown flag --confg; did you mean 'config'?"),
]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    base = lambda i: ["--config=configs/base.py", f"--config.workdir={tmp_path}/run{i}"]
    cases = [("train", [*base(i), *args], sentence) for i, (args, sentence) in enumerate(BAD)]
    cases += [
        ("train", ["--config=configs/bse.py"], "config file 'configs/bse.py' does not exist; configs has base.py"),
        ("train", ["--config=configs/base.py:smok"], "config variant 'smok' is not known; did you mean 'smoke'?"),
        ("evaluate", [f"--workdir={tmp_path}"], f"workdir '{tmp_path}' holds no checkpoint"),
        ("generate", [f"--workdir={tmp_path}", "--prompt=why?"], f"workdir '{tmp_path}' holds no checkpoint"),
    ]
    found = runs.each(*((module, *args) for module, args, _ in cases))
    for (_, _, sentence), (code, _, err) in zip(cases, found, strict=True):
        assert code == 2, err
        assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run5" / "checkpoints").exists()  # what the platform lacks is said before anything is made


def test_generate_names_the_file_that_is_no_image(unbroken, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    code, _, err = runs.finish(
        runs.command("generate", f"--workdir={unbroken}", f"--image={tmp_path}/page.png", "--prompt=what?")
    )
    assert code == 2 and f"image {tmp_path}/page.png cannot be read as an image" in err and err.count("\n") == 1


def test_resuming_with_a_changed_model_names_the_setting(pictures, unbroken):
    changed = runs.small(pictures, unbroken, set={"llm.layers": 4})
    with pytest.raises(UserError, match=r"config\.llm\.layers=3, now it is 4"):
        train(config_lib.check(changed))


def test_a_damaged_checkpoint_is_named(pictures, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "12" / "state"
    for path in state.rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="checkpoints/12"):
        load_run(str(tmp_path / "run"))


def test_damaged_parts_of_a_checkpoint_are_one_sentence(unbroken, tmp_path):
    damages = {
        "metrics/metrics": lambda path: path.write_text("{"),
        "meta/metadata": lambda path: path.write_text("{}"),
        "state/_METADATA": lambda path: path.unlink(),
    }
    for name, damage in damages.items():
        workdir = tmp_path / name.replace("/", "_")
        shutil.copytree(unbroken, workdir)
        damage(workdir / "checkpoints" / "12" / name)
        with pytest.raises(UserError, match=r"cannot be read") as caught:
            load_run(str(workdir), "best")
        assert "\n" not in str(caught.value)


def test_other_data_is_refused_on_resume(unbroken, tmp_path):
    rows = runs.draw_rows(tmp_path, 23)
    shutil.copytree(unbroken, tmp_path / "run")
    config = runs.small(tmp_path, tmp_path / "run", set={"data.source": str(rows)})
    saved = json.loads((unbroken / "checkpoints" / "12" / "meta" / "metadata").read_text())["asked"]["data"]
    with pytest.raises(UserError, match=r"config\.data\.source"):
        train(config_lib.check(config))
    original = Path(saved["source"])
    before = original.read_text()
    try:
        original.write_text(rows.read_text())
        config = runs.small(original.parent, tmp_path / "run")
        with pytest.raises(UserError, match=r"holds a run on 26 rows, sha256 .*, now there are 23 rows"):
            train(config_lib.check(config))
    finally:
        original.write_text(before)


def test_a_workdir_in_use_is_refused(pictures, tmp_path):
    with locked(str(tmp_path / "run")), pytest.raises(UserError, match="is in use by another run"):
        train(config_lib.check(runs.small(pictures, tmp_path / "run")))


def test_started_again_without_a_test_keeps_the_figures(pictures, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    config = runs.small(pictures, tmp_path / "run", set={"eval.test": False})
    train(config_lib.check(config))
    after = json.loads((tmp_path / "run" / "results.json").read_text())
    assert after["rows/holdout/accuracy"] == before["rows/holdout/accuracy"]


def test_a_profile_window_behind_the_last_step_is_refused(pictures, tmp_path):
    config = runs.small(pictures, tmp_path / "run", set={"profile": "3:13"})
    with pytest.raises(UserError, match="config.profile='3:13' ends after the last of the run's 12 steps"):
        train(config_lib.check(config))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh.tensor": 8}, "config.vision.heads=2 cannot be sharded over mesh axis tensor=8"),
        ({"mesh.data": 8, "stages.align.batch_size": 4}, r"stages.align.batch_size / accumulate = 4 rows .* 8 devices"),
        ({"mesh.fsdp": 3}, "asks for a multiple of 3 devices, but there are 8 cpu devices"),
    ],
)
def test_a_mesh_that_does_not_fit(pictures, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train(config_lib.check(runs.small(pictures, tmp_path / "run", set=changes)))


def test_a_batch_of_broken_rows_is_left_out(tmp_path, one_device):
    """Four in a row: it is no divergence, and the run finishes."""
    rows = runs.draw_rows(tmp_path, 12)
    for i in range(8, 12):
        (tmp_path / f"{i}.png").write_bytes(b"")
    changes = {
        "data.max_bad_fraction": 0.5, "data.holdout": 0, "eval.every": 0, "eval.test": False,
        "run_stages": ("instruct",), "stages.instruct.max_steps": 4,
    }  # fmt: skip
    table = json.loads(rows.read_text())
    rows.write_text(json.dumps(table[8:] * 8))
    results = train(
        config_lib.check(runs.small(tmp_path, tmp_path / "run", set={**changes, "data.max_bad_fraction": 1.0}))
    )
    assert results["step"] == 4 and results["bad_samples"] == {"broken_image": 32}
