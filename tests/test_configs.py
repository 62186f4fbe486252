"""The paper's runs: sizes, plans and hyper-parameters as they are published, and what a wrong argument is told."""

import dataclasses
import itertools
import re

import pytest
from flax import linen as nn

from configs import fusion, llava, siglip_qwen, sparsecut
from sparsecut_jax.checks import check_room
from sparsecut_jax.config import asked, check, check_override
from sparsecut_jax.models.ways import FUSING
from sparsecut_jax.runs.parameters import boxed_shapes
from sparsecut_jax.runtime import backends
from sparsecut_jax.settings import LoraConfig, StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training.report import count
from tiny import refusal

SIZES, STAGES = ("7b", "13b"), ("pretrain", "finetune", "lora")
RUNS = [
    *((sparsecut, f"size={size},stage={stage}") for size, stage in itertools.product(SIZES, STAGES)),
    *((sparsecut, f"size=13b,stage={stage},plan=released") for stage in STAGES),
    *((llava, f"size={size},stage={stage}") for size, stage in itertools.product(SIZES, STAGES)),
    *((siglip_qwen, f"stage={stage}") for stage in STAGES),
]
PRETRAIN = StageConfig(
    rows="captions", template="plain", batching="buckets", seq_len=2048, buckets=(640, 896), epochs=1.0,
    batch_size=256, trainable=("fusion/.*",), lr=1e-3, warmup=0.03, final_lr=0.0, weight_decay=0.0,
)  # fmt: skip
FINETUNE = StageConfig(
    rows="conversations", template="vicuna_v1", batching="buckets", seq_len=2048, buckets=(768, 1024, 1536), epochs=1.0,
    batch_size=128, trainable=("fusion/.*", "llm/.*"), lr=2e-5, warmup=0.03, final_lr=0.0, weight_decay=0.0,
)  # fmt: skip
LORA = dataclasses.replace(
    FINETUNE, trainable=("fusion/.*", "llm/.*_lora_[ab]"), lr=2e-4, lr_of={"fusion": 2e-5}
)  # fmt: skip


def config_of(file, arguments=""):
    return check(file.get_config(arguments))


def plan_of(arguments):
    return build_model(config_of(sparsecut, arguments)).wiring.shortcuts.pairs


@pytest.mark.parametrize(("file", "arguments"), RUNS)
def test_every_run(file, arguments):
    """One stage, with the recipe's numbers; the second stage takes the fusion from where the first leaves it."""
    cfg = config_of(file, arguments)
    given = dict(argument.split("=") for argument in arguments.split(","))
    stage = given["stage"]
    expected = {"pretrain": PRETRAIN, "finetune": FINETUNE, "lora": LORA}[stage]
    if file is siglip_qwen and stage != "pretrain":
        expected = dataclasses.replace(expected, template="chatml")
    assert [cfg.stages[name] for name in cfg.run_stages] == [expected]
    assert cfg.workdir.endswith(f"_{stage}")
    assert (cfg.init_from, cfg.init_parts) == (
        ("", ("vision/.*", "fusion/.*", "llm/.*"))
        if stage == "pretrain"
        else (config_of(file, arguments.replace(stage, "pretrain")).workdir, ("fusion/.*",))
    )
    assert (cfg.lora.rank, cfg.lora.alpha) == ((128, 256.0) if stage == "lora" else (0, LoraConfig.alpha))
    assert (cfg.dtype, cfg.data.image_fit, cfg.mesh.data, cfg.mesh.fsdp) == ("bfloat16", "pad", 1, -1)
    assert cfg.vision.select_layer == -2


def test_workdirs_differ():
    assert len({config_of(*run).workdir for run in RUNS}) == len(RUNS)


def test_the_plan_of_the_paper():
    """8 levels, evenly over all layers, the deepest to the earliest."""
    assert plan_of("size=13b,plan=paper") == (
        (23, 0), (20, 6), (16, 11), (13, 17), (10, 22), (7, 28), (3, 33), (0, 39),
    )  # fmt: skip
    assert plan_of("size=7b") == ((23, 0), (20, 4), (16, 9), (13, 13), (10, 18), (7, 22), (3, 27), (0, 31))


def test_the_plan_of_the_published_scripts():
    assert plan_of("size=13b,plan=released") == (
        (0, 4), (3, 9), (6, 14), (9, 19), (12, 24), (15, 29), (18, 34), (21, 39),
    )  # fmt: skip


def test_the_baseline_has_one_view_and_no_shortcuts():
    """And is like SparseCut in all else."""
    cfg, ours = config_of(llava, "size=7b,stage=finetune"), config_of(sparsecut, "size=7b,stage=finetune")
    assert (cfg.fusion.name, ours.fusion.name) == ("mlp", "channel")
    assert build_model(cfg).wiring.shortcuts.pairs == ()
    same = dict(fusion=ours.fusion, shortcuts=ours.shortcuts, workdir=ours.workdir, init_from=ours.init_from)
    assert dataclasses.replace(cfg, **same) == ours


@pytest.mark.parametrize(
    ("file", "arguments", "expected"),
    [
        # As transformers counts LlamaForCausalLM (Llama 2 7B and 13B) and CLIPVisionModel, less the norm behind its
        # last block; the blocks above the highest level that is used are not there.
        (sparsecut, "size=7b", {"vision": 303_505_408, "fusion": 37_756_928, "llm": 6_738_415_616}),
        (sparsecut, "size=13b,plan=released", {"vision": 290_909_184, "fusion": 52_439_040, "llm": 13_015_864_320}),
        (llava, "size=7b", {"vision": 290_909_184, "fusion": 20_979_712, "llm": 6_738_415_616}),
        (siglip_qwen, "", {"vision": 412_984_944, "fusion": 15_994_880, "llm": 1_720_574_976}),
    ],
)
def test_sizes(file, arguments, expected):
    cfg = backends.resolve(config_of(file, arguments), "cpu")
    model = build_model(cfg)
    shapes = boxed_shapes(model, cfg.data.max_images)
    assert {part: count(nn.meta.unbox(tree)) for part, tree in shapes.items()} == expected


@pytest.mark.parametrize("way", FUSING)
def test_every_way_of_fusing_on_scenes(way):
    """No setting is without effect, rows have room for images, and the model can be made; workdirs differ."""
    cfg = asked(fusion.get_config(f"way={way},smoke"), ())
    assert (cfg.fusion.name, cfg.data.source, cfg.workdir) == (way, "scenes", f"runs/scenes_smoke_{way}")
    assert [cfg.stages[name].max_steps for name in cfg.run_stages] == [20, 20]
    check_room(cfg)
    cfg = backends.resolve(dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=512)), "cpu")
    parts = boxed_shapes(build_model(cfg), cfg.data.max_images)
    assert set(parts) == {"vision", "fusion", "llm"}
    assert 5_000 < count(nn.meta.unbox(parts["fusion"])) < 600_000  # as the rest has


def test_other_rates_are_flags():
    check_override("config.stages.instruct.lr_of.fusion", "1e-5")
    raw = sparsecut.get_config("stage=lora")
    raw.stages.instruct.lr_of.fusion = 1e-5
    assert check(raw).stages["instruct"].lr_of == {"fusion": 1e-5}


@pytest.mark.parametrize("file", [sparsecut, llava, siglip_qwen])
def test_docstrings_are_launch_commands(file):
    """Each `--config=` in them names this file and arguments that it takes."""
    name = file.__name__.replace(".", "/") + ".py"
    commands = re.findall(r"python -m sparsecut_jax\.(train|plan) --config=(\S+?):(\S+)", file.__doc__)
    assert {command for command, _, _ in commands} == {"train", "plan"}
    for _, path, arguments in commands:
        assert path == name
        config_of(file, arguments)


@pytest.mark.parametrize(
    ("file", "arguments", "expected"),
    [
        (sparsecut, "siz=7b", "config variant 'siz' is not known; did you mean 'size'?; known: size, stage, plan"),
        (sparsecut, "smoke", "config variant 'smoke' is not known; known: size, stage, plan"),
        (sparsecut, "size=8b", "config variant size='8b': expected 7b or 13b; did you mean '7b'?"),
        (sparsecut, "size", "config variant size='': expected 7b or 13b"),
        (sparsecut, "stage=sft", "config variant stage='sft': expected pretrain or finetune or lora"),
        (
            sparsecut,
            "size=7b,plan=released",
            "config variant plan=released uses LLM layers up to 39, but size=7b has layers 0 to 31; expected size=13b "
            "or plan=paper",
        ),
        (llava, "plan=paper", "config variant 'plan' is not known; known: size, stage"),
        (siglip_qwen, "size=7b", "config variant 'size' is not known; known: stage"),
    ],
)
def test_wrong_arguments(file, arguments, expected):
    assert refusal(file.get_config, arguments) == expected
