"""The folder of a run: its lock, and its files other than checkpoints and metrics."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import IO

from sparsecut_jax import config as config_lib
from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.runs.wiring_plot import save_wiring
from sparsecut_jax.runtime import hosts
from sparsecut_jax.runtime.folders import make_folder, print_files, write_json
from sparsecut_jax.settings import Config
from sparsecut_jax.text.templates import begins_with_bos
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError, nearest


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Creates the workdir and locks it until the block or the process ends.

    Raises:
      UserError: it cannot be written to or is an exported model, another run is using it, or the processes of this run
        do not share it.
    """
    if kind := _exported(workdir):
        raise UserError(
            f"config.workdir={workdir!r} is a model in Hugging Face layout; choose another folder, and start from the "
            f"model with --config.init.{kind}={workdir}"
        )
    make_folder("config.workdir", workdir)
    try:
        file = open(os.path.join(workdir, ".lock"), "a+")  # noqa: SIM115 - held open for the whole run
    except OSError as error:
        raise UserError(f"config.workdir={workdir!r} cannot be written to: {error.strerror}") from error
    with file:
        try:
            if hosts.first():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"config.workdir={workdir!r} is in use by another run; choose another or wait") from error
        if hosts.several():
            _check_shared(workdir, file)
        yield


def _check_shared(workdir: str, file: IO[str]) -> None:
    """Raises UserError if `file` is not the same file as that of process 0."""
    if hosts.first():
        written = f"{hosts.name()} {time.time_ns()}"
        file.truncate(0)
        file.write(written)
        file.flush()
        os.fsync(file.fileno())
        hosts.tell("workdir", written)
        return
    expected = hosts.hear("workdir")
    file.seek(0)
    if file.read() != expected:
        raise UserError(f"config.workdir={workdir!r} is not the folder of process 0; expected one that all hosts share")


def no_run(folder: str, setting: str = "") -> str:
    """Why `folder`, given as a workdir or as `setting`, holds no run to read, and what to type instead."""
    name = f"{setting}={folder!r}" if setting else f"workdir {folder!r}"
    above, last = os.path.split(os.path.normpath(folder))
    inside = os.path.join(*parts) if (parts := _before(folder, "checkpoints")) else ""
    if inside and is_run(inside):
        return f"{name} is inside a run; give its workdir, {inside}"
    if not os.path.isdir(folder):
        runs = sorted(each for each in _listed(above) if is_run(os.path.join(above, each)))
        known = f"; {above or 'this folder'} has {', '.join(runs)}" if runs else ""
        return f"{name} does not exist{nearest(last, runs)}{known}"
    if "adapter_config.json" in _listed(folder):
        return f"{name} holds adapters alone; give the workdir of the run that they come from, or to-hf --merge it"
    if kind := _exported(folder):
        if setting:
            return f"{name} is a model in Hugging Face layout, not a run; give it as --config.init.{kind} instead"
        joined = f"{os.path.normpath(folder)}_run"
        return (
            f"{name} is a model in Hugging Face layout, not a run; make one of it: python -m sparsecut_jax.convert from-hf "
            f"--{kind}={folder} --out={joined}, then --workdir={joined}"
        )
    return f"{name} holds no checkpoint; expected a folder that sparsecut_jax.train or convert from-hf has written"


def is_run(folder: str) -> bool:
    """Whether there is a checkpoint in it."""
    return any(name.isdecimal() for name in _listed(os.path.join(folder, "checkpoints")))


def _exported(folder: str) -> str:
    """Which source of from-hf a folder in Hugging Face layout is: model, llm or vision; "" for another folder."""
    try:
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict) or "model_type" not in config:
        return ""
    if "text_config" in config and "vision_config" in config:
        return "model"
    return "llm" if "vocab_size" in config else "vision"


def _before(path: str, part: str) -> tuple[str, ...]:
    """The parts of a path that stand before `part`; () where it is not among them."""
    parts = pathlib.PurePath(path).parts
    return parts[: parts.index(part)] if part in parts else ()


def _listed(folder: str) -> list[str]:
    return os.listdir(folder or ".") if os.path.isdir(folder or ".") else []


def update_results(folder: str, step: int, results: dict) -> None:
    """Writes results.json. What it held stays if it is of the same step."""
    path, before = os.path.join(folder, "results.json"), None
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        before = json.load(file)
    same_step = before if isinstance(before, dict) and before.get("step") == step else {}
    write_json(path, {**same_step, "step": step, **results})


def write_run_files(workdir: str, cfg: Config, tokenizer: Tokenizer | None, wiring: Wiring) -> None:
    """Writes config.json (resolved), the tokenizer, and shortcuts.png."""

    with open(os.path.join(workdir, "config.json"), "w") as file:
        file.write(config_lib.to_json(cfg) + "\n")
    if tokenizer is not None:
        tokenizer.save(os.path.join(workdir, "tokenizer"), begins_with_bos(cfg.stages[cfg.run_stages[-1]].template))
    save_wiring(os.path.join(workdir, "shortcuts.png"), wiring)


def print_written(workdir: str, seconds: float, question: str, images: list[str]) -> None:
    """Lists what a run has left, and the command that asks it a question about images."""
    install = "" if importlib.util.find_spec("tensorboard") else ' (after pip install tensorboard, the extra "loggers")'
    what = {
        "results.json": "these figures",
        "answers.jsonl": "every test question with its references and the model's answer",
        "metrics.jsonl": "loss, norms and speed by step",
        "loss.png": "the loss curve",
        "shortcuts.png": "the wiring as a picture",
        "bad_samples.jsonl": "rows that were left out, and why",
        "config.json": "every setting",
        "tokenizer": "for transformers' AutoTokenizer",
        "tensorboard": f"the same for TensorBoard: tensorboard --logdir={shlex.quote(workdir)}{install}",
        "checkpoints": "latest and best",
    }
    print(f"\nwritten to {workdir} in {seconds:.0f} s:")
    print_files(workdir, what)
    asked = [f"--workdir={workdir}", *(f"--image={image}" for image in images), f"--prompt={question}"]
    print(f"\nask it:  python -m sparsecut_jax.generate {' '.join(map(_quoted, asked))}")


def _quoted(flag: str) -> str:
    """As a shell takes it, --name='some value'."""
    name, _, value = flag.partition("=")
    return f"{name}={shlex.quote(value)}"
