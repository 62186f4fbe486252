"""The paper's runs: SparseCut on CLIP ViT-L/14-336 and Vicuna 1.5, size=7b or 13b, one stage per run.

    python -m sparsecut_jax.train --config=configs/sparsecut.py:size=7b,stage=pretrain
    python -m sparsecut_jax.train --config=configs/sparsecut.py:size=7b,stage=finetune
    python -m sparsecut_jax.train --config=configs/sparsecut.py:size=7b,stage=lora
    python -m sparsecut_jax.plan --config=configs/sparsecut.py:size=7b,stage=finetune --topology=v5e:8x8

"pretrain" aligns the fusion on captions; "finetune" trains fusion and LLM on conversations; "lora" trains the fusion and
LoRA adapters of the LLM. The latter two load the fusion from pretrain's workdir (--config.init_from). plan=paper spreads 8
levels evenly, the deepest into the earliest layer; plan=released is the plan of the published scripts, for 13b only. Plans of
other models are settings: --config.shortcuts.density=granite4, qwen3vl, lin_3_18_23 or random (models/plans.py).

Rows and pictures are LLaVA-1.5's, in the folders that its authors describe, or
--config.data.source=rows.json --config.data.images=DIR. As in LLaVA, a batch has rows of similar length, one per sequence.
batching="packed" is faster, but puts several rows into a sequence and so trains on more of them per step.

Tower and LLM are hub ids or folders (--config.init.vision, --config.init.llm) with safetensors and, for the LLM, its
tokenizer. A repository with only pickles is refused; on a machine with PyTorch, convert it with transformers'
`from_pretrained(ID).save_pretrained(DIR)` of the model and, for the LLM, of the tokenizer.
"""

from ml_collections import ConfigDict

from sparsecut_jax.config import default, variant_arguments
from sparsecut_jax.types import UserError

STAGES = ("pretrain", "finetune", "lora")
VICUNA = {
    "7b": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008},
    "13b": {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp_dim": 13824},
}
RELEASED = {"vit_levels": (0, 3, 6, 9, 12, 15, 18, 21), "llm_layers": (4, 9, 14, 19, 24, 29, 34, 39)}


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, size=tuple(VICUNA), stage=STAGES, plan=("paper", "released"))
    config = default()
    clip_and_vicuna(config, args.size)
    config.fusion.name = "channel"
    config.shortcuts.update(density="sparse", count=8, distribution="uniform", order="u")
    if args.plan == "released":
        if args.size != "13b":
            raise UserError(
                f"config variant plan=released uses LLM layers up to {RELEASED['llm_layers'][-1]}, but size={args.size} "
                f"has layers 0 to {config.llm.layers - 1}; expected size=13b or plan=paper"
            )
        config.shortcuts.update(density="explicit", **RELEASED)
    recipe(config, f"sparsecut_{args.size}" + ("_released" if args.plan == "released" else ""), args.stage)
    return config


def clip_and_vicuna(config: ConfigDict, size: str) -> None:
    """Sets tower and LLM, including their sizes, so that a run can be planned without their files."""
    config.vision.update(
        family="clip", image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_dim=4096,
        activation="quick_gelu", select_layer=-2,
    )  # fmt: skip
    config.llm.update(family="llama", vocab_size=32000, head_dim=128, norm_eps=1e-5, max_positions=4096, **VICUNA[size])
    config.init.update(vision="openai/clip-vit-large-patch14-336", llm=f"lmsys/vicuna-{size}-v1.5")


def recipe(config: ConfigDict, name: str, stage: str, template: str = "vicuna_v1") -> None:
    """Sets LLaVA-1.5's two stages (arXiv 2310.03744), and the LoRA variant of the second."""
    config.workdir = f"runs/{name}_{stage}"
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    # Rows held out for the held-out loss: one batch of the first stage, two of the second. There is no test split.
    config.data.update(holdout=256, image_fit="pad")
    config.eval.update(every=500, test=False)

    for each in config.stages.values():
        each.update(batching="buckets", seq_len=2048, epochs=1.0, warmup=0.03, final_lr=0.0, weight_decay=0.0)
    config.stages.align.update(
        rows="captions", template="plain", trainable=("fusion/.*",), lr=1e-3, batch_size=256, buckets=(640, 896)
    )
    config.stages.instruct.update(
        rows="conversations", template=template, lr=2e-5, batch_size=128, buckets=(768, 1024, 1536)
    )
    if stage == "pretrain":
        config.run_stages = ("align",)
        folder = "playground/data/LLaVA-Pretrain"
        config.data.update(source=f"{folder}/blip_laion_cc_sbu_558k.json", images=f"{folder}/images")
        return
    config.run_stages = ("instruct",)
    config.data.update(source="playground/data/llava_v1_5_mix665k.json", images="playground/data")
    config.init_from = f"runs/{name}_pretrain"
    config.init_parts = ("fusion/.*",)
    config.stages.instruct.trainable = ("fusion/.*", "llm/.*")
    if stage == "lora":
        config.lora.update(rank=128, alpha=256.0, dropout=0.05)  # the dropout is LLaVA-1.5's
        config.stages.instruct.update(trainable=("fusion/.*", "llm/.*_lora_[ab]"), lr=2e-4, lr_of={"fusion": 2e-5})
