"""Loads what `convert to-hf` wrote with transformers and PyTorch, and compares with the fixtures beside this file.

    pip install torch transformers safetensors        in an environment of its own
    for every case of make_fixtures.py:
        python -m sparsecut_jax.convert from-hf --llm=tests/parity/qwen2 --out=RUNS/qwen2    (--vision, --model)
        python -m sparsecut_jax.convert to-hf --workdir=RUNS/qwen2 --as=llm --out=EXPORTS/qwen2    (vision, llava)
    python tests/parity/check_exports.py EXPORTS

Prints, for every folder of EXPORTS, the tensors that transformers missed or did not expect and the largest difference
of logits (LLM, llava) or hidden states (towers). The tests of the project need neither this file nor PyTorch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

FOLDER = Path(__file__).parent
TOWERS = {
    "clip_vision_model": hf.CLIPVisionModel, "siglip_vision_model": hf.SiglipVisionModel,
    "siglip2_vision_model": hf.Siglip2VisionModel, "dinov2": hf.Dinov2Model,
}  # fmt: skip


def difference(model, kind: str, io: dict[str, np.ndarray], config: dict) -> float:
    pixels = torch.tensor(io["pixel_values"]) if "pixel_values" in io else None
    if kind == "llava":
        ids = np.where(io["input_ids"] == 95, config["image_token_index"], io["input_ids"])
        found = model(input_ids=torch.tensor(ids).long(), pixel_values=pixels).logits[..., :96]
        return float(np.abs(found.numpy() - io["logits"]).max())
    if kind not in TOWERS:
        ends = [end for end in ("", "_long") if f"input_ids{end}" in io]
        found = {end: model(torch.tensor(io[f"input_ids{end}"]).long()).logits.numpy() for end in ends}
        return float(max(np.abs(found[end] - io[f"logits{end}"]).max() for end in ends))
    inputs = (pixels,)
    if kind == "siglip2_vision_model":  # patches, as its image processor cuts them
        b = len(pixels)
        patches = pixels.reshape(b, 3, 4, 7, 4, 7).permute(0, 2, 4, 3, 5, 1).reshape(b, 16, 147)
        inputs = (patches, torch.ones(b, 16), torch.tensor([[4, 4]] * b))
    states = torch.stack(model(*inputs, output_hidden_states=True).hidden_states).numpy()
    return float(np.abs(states - io["hidden_states"]).max())


def main(exports: Path) -> None:
    for folder in sorted(path for path in exports.iterdir() if (path / "config.json").exists()):
        config = json.loads((folder / "config.json").read_text())
        kind = config["model_type"]
        known = {**TOWERS, "llava": hf.LlavaForConditionalGeneration}.get(kind, hf.AutoModelForCausalLM)
        model, info = known.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        wrong = {what: sorted(names) for what, names in info.items() if names}
        with np.load(FOLDER / folder.name / "io.npz") as io, torch.no_grad():
            print(f"{folder.name:<16} {type(model).__name__:<32} {difference(model, kind, dict(io), config):g} {wrong}")


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
