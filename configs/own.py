"""Your own rows and pictures: LLaVA's two stages (captions first, if you have any), with packed sequences.

    python -m sparsecut_jax.data check --config=configs/own.py:source=rows.json,images=pictures
    python -m sparsecut_jax.train --config=configs/own.py:source=rows.json,images=pictures
    python -m sparsecut_jax.train --config=configs/own.py:source=rows.json,images=pictures,captions=blip.json,caption_images=DIR

One row in twenty is held out, and the run ends with a test on these rows; --config.data.test=test.json names other test
rows, with their pictures in --config.data.test_images where these are in another folder.

It trains the small model of configs/base.py from scratch, as a first look at your data on a laptop; with
--config.init.vision and --config.init.llm it trains pretrained parts. The template is this project's shortest one; for a
pretrained LLM use the LLM's own: --config.stages.instruct.template=tokenizer.
"""

from ml_collections import ConfigDict

from configs import base
from sparsecut_jax.config import variant_arguments
from sparsecut_jax.types import UserError


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, source="", images="", captions="", caption_images="")
    if not args.source:
        raise UserError("configs/own.py needs a source: --config=configs/own.py:source=rows.json,images=DIR")
    if args.caption_images and not args.captions:
        raise UserError("configs/own.py has caption_images but no captions; give both or neither")
    config = base.get_config()

    config.workdir = "runs/own"
    # No flips or shifts: questions may ask about left and right.
    config.data.update(source=args.source, images=args.images, flip=False, shift=0, holdout=-1)
    config.eval.max_new_tokens = 0  # by the answers of the test rows
    config.tokenizer.vocab_size = 4096

    config.stages.instruct.update(seq_len=512, batching="packed", batch_size=8, epochs=1.0, lr=1e-3)
    config.run_stages = ("instruct",)
    if args.captions:
        config.data.mix = {
            "captions": {"path": args.captions, "images": args.caption_images or args.images, "weight": 1.0},
            "rows": {"path": args.source, "images": args.images, "weight": 1.0},
        }
        config.run_stages = ("align", "instruct")
        config.stages.align.update(sources=("captions",), batching="packed", seq_len=256, batch_size=8, epochs=1.0)
        config.stages.instruct.sources = ("rows",)
    return config
