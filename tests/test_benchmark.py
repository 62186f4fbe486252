"""The benchmark: what it times and what it counts. Times themselves are never asserted."""

import json

import jax
import jax.numpy as jnp
import pytest

import runs
from sparsecut_jax import benchmark
from sparsecut_jax import config as config_lib
from sparsecut_jax.benchmarking import where
from sparsecut_jax.benchmarking.parts import Bench, Timed
from sparsecut_jax.benchmarking.peaks import Peak
from sparsecut_jax.planning import work


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
        (*args, "--trace"),
        (*args, "--parts=step,stpe"),
        (*args, "--parts="),
        (*args, "--steps=0"),
        (*args, f"--out={blocked}"),
        (*args, "--out=gs://bucket/x"),
        (*args, "--config.data.source=/nope"),
    )
    assert (code, err) == (0, "")
    for text in ("GFLOP/s in matmuls", "batch      8 sequences of 32 positions, 1 images each", "tower forward",
                 "training step", "decode, per token", "input, per batch", "sequences/s", "MiB at the peak"):  # fmt: skip
        assert text in out, text
    written = json.loads((folder / "out" / "benchmark.json").read_text())
    assert [part["part"] for part in written["parts"]] == [
        "tower", "encode", "forward", "gradient", "step", "prefill", "decode", "input",
    ]  # fmt: skip
    assert all(len(part["seconds"]) == 2 for part in written["parts"][:7])
    assert "where the time goes, training step" in out
    for part in written["parts"]:
        assert bool(part["where"]) == (part["part"] not in ("prefill", "decode", "input"))
    step = {row["part"]: row for row in written["parts"][4]["where"]}
    assert {"llm attention", "llm MLP", "vision attention", "fusion", "loss", "update"} <= set(step)
    assert step["llm MLP"]["backward"] > 0 == step["loss"]["backward"]
    assert all(sum(row[key] for key in where.PASSES) == pytest.approx(row["all"]) for row in part["where"][:-1])
    assert written["peak"]["flops"] > 0 and written["peak_memory"] > 2**20
    for (code, out, err), sentence in zip(
        refused,
        (
            "--parts=step,stpe: unknown part 'stpe'; expected any of tower, encode, forward",
            "--parts=: unknown part ''; expected any of tower",
            "steps",
            f"--out='{blocked}' cannot be written to: File exists",
            "--out='gs://bucket/x': expected a folder on a file system, not in a bucket",
            "/nope",
        ),
        strict=True,
    ):
        assert code == 2 and sentence in err and "timing" not in out, (sentence, out, err)


def test_a_way_that_reads_the_question(folder, one_device):
    bench = Bench(config_lib.check(runs.small(folder, folder / "run", set={"fusion.name": "emma"})), "instruct", 1, 2)
    for part in ("encode", "prefill"):
        assert len(bench.time(part, Peak(flops=1e9, bandwidth=1e9)).seconds) == 1


def test_floors(folder, one_device):
    """FLOPs of the plan's count; bytes at least those of weights and of Adam's numbers."""
    cfg = config_lib.check(runs.small(folder, folder / "run"))
    bench = Bench(cfg, "instruct", 1, 2)
    bench._answers = {1: [9.0, 1.0], 2: [9.0, 1.5]}
    peak = Peak(flops=1e9, bandwidth=1e9)
    timed = {part: bench.time(part, peak) for part in ("tower", "forward", "step", "prefill", "decode")}
    flops = work.by_part(work.products(bench.cfg, "instruct", bench.shapes, 8, 32))
    words = 16 * bench.cfg.llm.vocab_size
    spared = 2 * words * 8 * 20  # of 32 positions 12 are to be predicted
    assert timed["tower"].flops == flops["vision"].forward
    assert timed["forward"].flops == flops["total"].forward - spared
    assert timed["step"].flops == flops["total"].model - 3 * spared
    assert timed["step"].bytes > 7 * 4 * 20_000
    assert timed["prefill"].flops == (flops["llm"].forward / 8) + 2 * words  # one row, logits of its last position
    for t in timed.values():
        assert t.floor == max(t.flops, t.bytes) / 1e9
        assert t.bound == ("compute" if t.flops > t.bytes else "memory")
    # a token: twice every weight of the LLM's matrices and head, and the scores of the 34 positions it sees
    weights = 3 * (4 * 16 * 16 + 3 * 16 * 32) + words
    assert timed["decode"].flops == 2 * weights + 4 * 3 * 16 * 34
    assert timed["decode"].bytes == 4 * (weights + 2 * 3 * 16 * 34)


def test_the_floor_of_decode_reads_what_injections_keep(folder, one_device):
    """layalign: in 3 layers, keys and values of 4 image tokens, by 2 heads of 8."""
    decoded = []
    for name in ("channel", "layalign"):
        cfg = config_lib.check(runs.small(folder, folder / "run", set={"fusion.name": name}))
        bench = Bench(cfg, "instruct", 1, 2)
        bench._answers = {1: [9.0, 1.0], 2: [9.0, 1.5]}
        decoded.append(bench.time("decode", Peak(flops=1e9, bandwidth=1e9)))
    without, kept = decoded
    assert kept.bytes - without.bytes == 3 * 2 * 4 * 2 * 8 * 4
    assert kept.flops - without.flops == 3 * 2 * 2 * 4 * 2 * 8


@pytest.mark.parametrize(
    ("floor", "bound", "column", "sentence"),
    [
        (0.9, "compute", "45%", ""),
        (1.5, "compute", "75% disturbed", "measure again when it is idle\n"),
        (3.0, "memory", "150% disturbed", "fit in the caches\n"),
        (0.0, "", "-", ""),
    ],
)
def test_a_part_faster_than_its_floor_is_marked(floor, bound, column, sentence, capsys):
    """Calls of 1, 2 and 3 seconds."""
    timed = Timed("step", "training step", [2.0, 1.0, 3.0], floor=floor, bound=bound)
    assert timed.as_json()["disturbed"] is bool(sentence)
    benchmark._show([timed])
    out = capsys.readouterr().out
    assert f" {column} " in out and out.endswith(sentence)
    assert out.count("disturbed  training step: faster than the floor") == bool(sentence)


def test_an_answer_too_short_to_tell(folder, one_device):
    bench = Bench(config_lib.check(runs.small(folder, folder / "run")), "instruct", 1, 2)
    bench._answers = {1: [9.0, 1.0, 1.2], 2: [9.0, 1.0, 1.1]}
    timed = bench.time("decode", Peak(flops=1e9, bandwidth=1e9))
    assert (timed.median, timed.floor, timed.rate) == (0, 0, "too short to measure; set a larger --new")
    bench._answers = {1: [9.0, 1.0], 2: [9.0, 1.5]}
    timed = bench.time("decode", Peak(flops=1e9, bandwidth=1e9))
    assert (timed.median, timed.rate) == (0.5, "2.0 tokens/s") and timed.floor > 0


def test_what_runs_together_shares_the_time():
    """a 0-4 ms, b 2-6, nothing to 7, c to 8; a loop that waits for them does not count."""
    operations = [(0, 4e6, "a"), (2e6, 6e6, "b"), (0, 8e6, "while.3"), (7e6, 8e6, "c")]
    seconds, idle = where.shares(operations)
    assert seconds == pytest.approx({"a": 0.003, "b": 0.003, "c": 0.001}) and idle == pytest.approx(0.001)
    assert where.shares([]) == ({}, 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("jit(f)/jvp(SparseCut.hidden)/llm/while/body/closed_call/layers/mlp/up/dot_general", ("llm MLP", "forward")),
        ("jit(f)/transpose(jvp(S.hidden))/llm/while/body/layers/attention/mul", ("llm attention", "backward")),
        (
            "jit(f)/transpose(jvp(S))/llm/while/body/checkpoint/rematted_computation/layers/norm1/mul",
            ("llm rest", "again"),
        ),
        ("jit(f)/jvp(S.encode)/vision/while/body/blocks/attention/transpose", ("vision attention", "forward")),
        ("jit(f)/vision/while/body/blocks/fc1/dot_general", ("vision MLP", "forward")),
        ("jit(f)/jvp(S)/fusion/vmap(fuse)/projector/fc1/dot_general", ("fusion", "forward")),
        ("jit(f)/jvp(loss)/while/body/dot_general", ("loss", "forward")),
        ("jit(f)/transpose(jvp(loss))/mul", ("loss", "forward")),
        ("jit(f)/update/mul", ("update", "forward")),
        ("", ("other", "forward")),
    ],
)
def test_the_place_of_a_line(path, expected):
    assert where.place(path) == expected


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[2,2], p.1: f32[2,2]) -> f32[2,2] {
  %p.0 = f32[2,2]{1,0} parameter(0)
  %p.1 = f32[2,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, metadata={op_name="jit(f)/llm/mlp/dot_general"}
}

%body (p.2: f32[2,2]) -> f32[2,2] {
  %p.2 = f32[2,2]{1,0} parameter(0)
  ROOT %copy.3 = f32[2,2]{1,0} copy(%p.2)
}

ENTRY %main (p.4: f32[2,2]) -> f32[2,2] {
  %p.4 = f32[2,2]{1,0} parameter(0)
  %fusion.5 = f32[2,2]{1,0} fusion(%p.4, %p.4), kind=kCustom, calls=%fused
  ROOT %while.6 = f32[2,2]{1,0} while(%fusion.5), condition=%less, body=%body, metadata={op_name="jit(f)/vision/while"}
}
"""


def test_where_operations_come_from():
    """Their own line, else that of what is fused into them, else that of the loop they are in."""
    found = where.origins(PROGRAM)
    assert found["fusion.5"] == ("jit(f)/llm/mlp/dot_general", True)
    assert found["copy.3"] == ("jit(f)/vision/while", False)
    assert found["p.4"] == ("", False)
    rows = where.summary({"fusion.5": 0.3, "copy.3": 0.1, "unknown": 0.05}, 0.05, PROGRAM)
    assert [(row["part"], row["all"], row.get("products")) for row in rows] == [
        ("llm MLP", 0.3, 0.3), ("vision rest", 0.1, 0.0), ("other", 0.05, 0.0), ("not traced", 0.05, None),
    ]  # fmt: skip
    assert where.text(rows).splitlines()[1].split() == ["llm", "MLP", "300.0", "-", "-", "300.0", "300.0", "60.0%"]


def test_a_real_trace(one_device):
    """Of a product of large matrices, which takes most of the time, and something else."""
    f = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.ones((600, 600))
    f(x)
    rows = where.summary(*where.shares(where.traced(f, x)), f.lower(x).compile().as_text())
    assert rows[0]["part"] == "other" and 0 < rows[0]["products"] <= rows[0]["all"] == rows[0]["forward"]
