"""The benchmark: what it times and what it counts. Times themselves are never asserted."""

import json

import pytest

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.benchmarking.parts import Bench
from sparsecut_jax.benchmarking.peaks import Peak
from sparsecut_jax.planning import flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    runs.draw_rows(folder)
    return folder


def test_the_command(folder):
    config = runs.write_config(folder / "config.py", runs.small(folder, folder / "run"))
    args = ("benchmark", f"--config={config}", "--steps=2", "--new=3", f"--out={folder}/out")
    blocked = folder / "file"
    blocked.touch()
    (code, out, err), *refused = runs.each(
        args,
        (*args, "--parts=step,stpe"),
        (*args, "--parts="),
        (*args, "--steps=0"),
        (*args, f"--out={blocked}"),
        (*args, "--out=gs://bucket/x"),
        (*args, "--config.data.source=/nope"),
    )
    assert (code, err) == (0, "")
    for text in ("GFLOP/s in products", "batch      8 sequences of 32 positions, 1 images each", "tower forward",
                 "training step", "decode, a token", "input, a batch", "sequences/s", "MiB at most"):  # fmt: skip
        assert text in out, text
    written = json.loads((folder / "out" / "benchmark.json").read_text())
    assert [part["part"] for part in written["parts"]] == [
        "tower", "encode", "forward", "gradient", "step", "prefill", "decode", "input",
    ]  # fmt: skip
    assert all(len(part["seconds"]) == 2 for part in written["parts"][:7])
    assert written["peak"]["flops"] > 0 and written["peak_memory"] > 2**20
    for (code, out, err), sentence in zip(
        refused,
        (
            "--parts=step,stpe: 'stpe' is not one of tower, encode, forward",
            "--parts=: '' is not one of tower",
            "steps",
            f"--out='{blocked}' cannot be written to: File exists",
            "--out='gs://bucket/x': expected a folder on a file system, not in a bucket",
            "/nope",
        ),
        strict=True,
    ):
        assert code == 2 and sentence in err and "timing" not in out, (sentence, out, err)


def test_floors(folder, one_device):
    """FLOPs of the plan's count; bytes at least those of weights and of Adam's numbers."""
    cfg = config_lib.check(runs.small(folder, folder / "run"))
    bench = Bench(cfg, "instruct", 1, 2)
    peak = Peak(flops=1e9, bandwidth=1e9)
    timed = {part: bench.time(part, peak) for part in ("tower", "forward", "step", "prefill", "decode")}
    work = flops.work(flops.products(bench.cfg, "instruct", bench.shapes, 8, 32))
    words = 16 * bench.cfg.llm.vocab_size
    spared = 2 * words * 8 * 20  # of 32 positions 12 are to be predicted
    assert timed["tower"].flops == work["vision"].forward
    assert timed["forward"].flops == work["total"].forward - spared
    assert timed["step"].flops == work["total"].model - 3 * spared
    assert timed["step"].bytes > 7 * 4 * 20_000
    assert timed["prefill"].flops == (work["llm"].forward / 8) + 2 * words  # one row, logits of its last position
    for t in timed.values():
        assert t.floor == max(t.flops, t.bytes) / 1e9
        assert t.bound == ("compute" if t.flops > t.bytes else "memory")
    # a token: twice every weight of the LLM's matrices and head, and the scores of the 34 positions it sees
    weights = 3 * (4 * 16 * 16 + 3 * 16 * 32) + words
    assert timed["decode"].flops == 2 * weights + 4 * 3 * 16 * 34
    assert timed["decode"].bytes == 4 * (weights + 2 * 3 * 16 * 34)


def test_an_answer_too_short_to_tell(folder, one_device):
    bench = Bench(config_lib.check(runs.small(folder, folder / "run")), "instruct", 1, 2)
    bench._answers = {1: [9.0, 1.0, 1.2], 2: [9.0, 1.0, 1.1]}
    timed = bench.time("decode", Peak(flops=1e9, bandwidth=1e9))
    assert (timed.median, timed.floor, timed.rate) == (0, 0, "too short to tell: give a larger --new")
    bench._answers = {1: [9.0, 1.0], 2: [9.0, 1.5]}
    timed = bench.time("decode", Peak(flops=1e9, bandwidth=1e9))
    assert (timed.median, timed.rate) == (0.5, "2.0 tokens/s") and timed.floor > 0
