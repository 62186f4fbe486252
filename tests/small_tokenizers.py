"""Small tokenizers that cut text the ways large ones do."""

import json

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sparsecut_jax.text import tokenizer as tokenizers
from sparsecut_jax.text.tokenizer import Tokenizer

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: what is this? ASSISTANT: a red circle",
    "system user assistant", "what color is the circle?", "is it red?", "there is no blue shape", "yes", "no",
] * 3  # fmt: skip


def byte_level(*special: str, bos: str = "<s>", eos: str = "</s>", chat_template: str = "", **kind) -> Tokenizer:
    """Like GPT-2's, Llama 3's and Qwen's; `kind` says more of the special tokens (rstrip=True)."""
    backend = tokenizers.train(TEXTS, 400).backend
    backend.add_special_tokens([AddedToken(name, normalized=False, **kind) for name in (*special, eos, bos) if name])
    ids = {"bos": backend.token_to_id(bos) if bos else -1, "eos": backend.token_to_id(eos)}
    return tokenizers.wrap(backend, pad=0, **ids, chat_template=chat_template)


def llama(*special: str, chat_template: str = "") -> Tokenizer:
    """Like sentencepiece's of Llama 2, Vicuna and Mistral: "▁" for a space and in front of a text, bytes where needed."""
    words = Backend(models.BPE())
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training only
    words.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(words.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learnt["vocab"], "▁▁", "▁▁▁▁"]
    merges = [*map(tuple, learnt["merges"]), ("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = words.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>", *special)])
    return tokenizers.wrap(backend, pad=2, bos=1, eos=2, chat_template=chat_template)
