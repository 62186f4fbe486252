"""How commands end. The commands themselves are run in test_train.py and test_convert.py."""

import json
import os
import re
from pathlib import Path

import jax
import pytest
from absl import flags

import runs
from sparsecut_jax import config
from sparsecut_jax.commandline import cli
from sparsecut_jax.commandline.help_text import Entry, of_flag
from sparsecut_jax.types import UserError


def fail(error: BaseException, monkeypatch, **how) -> int:
    monkeypatch.setattr(cli, "_parse", lambda arguments: [])
    monkeypatch.setattr("sys.argv", ["command"])
    flags.FLAGS.mark_as_parsed()

    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(command, "A command.", **how)
    return ended.value.code


def test_names_from_files_are_shown_and_not_obeyed(monkeypatch, capsys):
    """Line ends and escape codes in a tensor's name: still one line, and the terminal keeps its colours."""
    assert fail(UserError("tensor a\nb\x1b[31m is missing"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: tensor a\\nb\\x1b[31m is missing\n"


def test_only_what_resumes_says_so(monkeypatch, capsys):
    assert fail(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert fail(KeyboardInterrupt(), monkeypatch, resumes=True) == 130
    assert capsys.readouterr().err == "interrupted; run the same command to resume from the last checkpoint\n"


# ----------------------------------------------------------------------------------------------------------------------
# what one types, and what is said of it; each is (arguments, exit code, stdout's beginning or end, stderr)

BASE = "--config=configs/base.py"
HELP_OF_LAYERS = """\
settings, with the values of configs/base.py; --help=WORD shows only what contains WORD, such as
--help=config.llm

config.vision: Vision tower: CLIP, SigLIP or DINOv2, depending on its fields.
  --config.vision.layers=5  (int; default 12)
      Number of transformer blocks.
"""
NEXT_STEPS = {
    "__main__ trian": "'trian' is not a command; did you mean 'train'?; python -m sparsecut_jax lists them",
    "__main__ train": "the command is: python -m sparsecut_jax.train",
    "train --config.llm.layers=3": "--config.llm.layers changes a setting of a config file; name one, such as "
    "--config=configs/base.py",
    "train": "--config is missing; for example: python -m sparsecut_jax.train --config=configs/base.py",
    f"train {BASE} help": "unexpected argument 'help'; settings are written --config.KEY=VALUE (--help lists them)",
    f"train {BASE} --print_config --workdir=a --config.workdir=b": "--workdir=a and --config.workdir=b are different folders; give only one",
    "train --help=remta": "--help=remta: no flag or setting contains this; did you mean 'remat'?; --help shows them all",
    "evaluate": "--workdir is missing; for example: python -m sparsecut_jax.evaluate --workdir=runs/base",
    "generate --workdir=a": "--prompt is missing; for example: python -m sparsecut_jax.generate --workdir=a "
    "'--prompt=what color is the shape?'",
    "generate --workdir=a --prompt=": "--prompt is missing; for example: python -m sparsecut_jax.generate --workdir=a "
    "'--prompt=what color is the shape?'",
    "generate --workdir=a --prompt=b --image=https://c.d/e.png": "image https://c.d/e.png is a URL; download it, "
    "then name the file e.png: curl -LO https://c.d/e.png",
    "generate --workdir=a --prompt=b --image=s3://c/e.png": "image s3://c/e.png is a URL; download it, "
    "then name the file e.png",
    "generate --workdir=a --prompt=b --image=gs://c/e.png": "workdir 'a' does not exist",
    "convert": "no command given; expected from-hf (reads weights, for example: python -m sparsecut_jax.convert from-hf "
    "--model=llava-hf/llava-1.5-7b-hf --out=runs/llava) or to-hf (writes a run, for example: python -m "
    "sparsecut_jax.convert to-hf --workdir=runs/base --out=exported); --help explains both",
    "convert from-hf": "no weights are named; for example: python -m sparsecut_jax.convert from-hf "
    "--model=llava-hf/llava-1.5-7b-hf --out=runs/llava",
    "convert to-hf --workdir=a": "--out is missing; for example: python -m sparsecut_jax.convert to-hf --workdir=a "
    "--out=exported",
    f"convert to-hf {BASE}": "--config is a flag of from-hf, not of to-hf; --help lists the flags of to-hf",
    "data chekc": "unknown command 'chekc'; did you mean 'check'?; expected check, stats, preview, speed or build; "
    "for example: python -m sparsecut_jax.data check --config=configs/own.py:source=rows.json,images=pictures",
    "data stats": "--config is missing; for example: python -m sparsecut_jax.data stats --config=configs/base.py",
    f"plan {BASE}": "--topology is missing; for example: python -m sparsecut_jax.plan --config=configs/base.py "
    "--topology=v5e:8x8",
}


@pytest.fixture(scope="module")
def said():
    """What the commands say: {line: (exit code, stdout, stderr)}; all start in one process."""
    lines = [
        *NEXT_STEPS, "__main__", f"train {BASE} --help=vision.layers", "data check --help", f"train {BASE} --print_config "
        "--workdir=runs/a --config.llm.layers=3 --coordinator=localhost:1 --processes=2 --process=0", f"convert from-hf --print_config {BASE} --llm=tests/parity/qwen3",
    ]  # fmt: skip
    return dict(zip(lines, runs.each(*(line.split() for line in lines)), strict=True))


@pytest.mark.parametrize("line", NEXT_STEPS)
def test_each_mistake_names_the_next_step(said, line):
    assert said[line] == (2, "", f"error: {NEXT_STEPS[line]}\n")


def test_the_commands_are_listed(said):
    code, out, err = said["__main__"]
    assert (code, err) == (0, "")
    commands = {p.stem for p in Path(cli.__file__).parent.parent.glob("*.py") if "def run() -> None" in p.read_text()}
    listed = {
        line.split()[2].removeprefix("sparsecut_jax.") for line in out.splitlines() if "-m sparsecut_jax." in line
    }
    assert listed == commands - {"__main__"} | {"data"}


def test_help_shows_the_values_of_the_config_file(said):
    assert said[f"train {BASE} --help=vision.layers"] == (0, HELP_OF_LAYERS, "")


def test_a_flag_that_may_be_repeated_says_so_once():
    flag = flags.FlagValues()
    flags.DEFINE_multi_string("image", [], "Image to ask about.", flag_values=flag)
    assert of_flag(flag["image"], ()) == Entry("--image", None, "str, may be repeated", "Image to ask about.")


def test_help_of_a_word_shows_its_flags(said):
    code, out, err = said["data check --help"]
    assert (code, err) == (0, "")
    assert (
        "  --look=decode  (none, stat or decode)\n      Check of images: open each" in out and "--skip_bad" not in out
    )
    settings = re.findall(r"^  --config\.(\S+?)=.*\n      ", out, re.MULTILINE)
    assert len(settings) == len(set(settings)) > 150
    assert {"seed", "llm.rope.factor", "stages.align.lr", "data.mix.NAME.path"} <= set(settings)


def test_print_config(said):
    (line, other) = (line for line in said if "--print_config" in line and said[line][0] == 0)
    code, out, err = said[line]
    assert (code, err) == (0, "")
    cfg = config.check(json.loads(out))
    assert (cfg.workdir, cfg.llm.layers, cfg.vision.layers, cfg.data.flip) == ("runs/a", 3, 5, True)
    code, out, err = said[other]
    assert (code, err) == (0, "sizes are those of: tests/parity/qwen3\n")
    cfg = config.check(json.loads(out))
    assert (cfg.init.llm, cfg.llm.family, cfg.llm.qk_norm) == ("tests/parity/qwen3", "qwen3", True)


# ----------------------------------------------------------------------------------------------------------------------
# what has been compiled; that a second start compiles nothing is in test_train.py


@pytest.fixture
def kept(monkeypatch):
    """Function of environment variables: (folder, least seconds of a compilation) that JAX is told."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)

    def read(**variables) -> tuple[str | None, float | None]:
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        cli._keep_compiled()
        least = found.get("jax_persistent_cache_min_compile_time_secs")
        return found["jax_compilation_cache_dir"], least

    return read


def test_compiled_programs_are_kept_in_the_users_cache(kept, tmp_path):
    assert kept(HOME=tmp_path) == (f"{tmp_path}/.cache/sparsecut_jax/xla", 0.0)
    assert kept(HOME=tmp_path, XDG_CACHE_HOME=tmp_path / "xdg") == (f"{tmp_path}/xdg/sparsecut_jax/xla", 0.0)
    assert os.path.isdir(tmp_path / "xdg" / "sparsecut_jax" / "xla")


def test_jax_variables_say_where_and_which(kept, tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "a", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 2}
    assert kept(**given) == (f"{tmp_path}/a", None)
    assert kept(JAX_COMPILATION_CACHE_DIR="gs://bucket/a")[0] == "gs://bucket/a"
    assert not os.path.exists("gs:")


def test_a_cache_that_cannot_be_written_to_is_left_alone(kept, tmp_path):
    (tmp_path / "file").write_text("")
    assert kept(JAX_COMPILATION_CACHE_DIR=tmp_path / "file" / "a")[0] is None
