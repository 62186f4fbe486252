"""Builds the tokenizer that a GGUF file describes in its metadata, with the `tokenizers` library."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sparsecut_jax.text.tokenizer import Tokenizer, wrap
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.gguf import Header, read_header

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # token types
# The regex of GPT-4's tokenizer, with a placeholder for the number of digits that stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that the metadata describe. Its bos is -1 if texts do not start with one.

    transformers can build one too, but it reads the file with torch, and splits as GPT-2 does if `tokenizer.ggml.pre` is
    unknown to it: SmolLM's digits would stay together.

    Raises:
      UserError: not a GGUF file, or an unsupported kind of tokenizer.
    """
    header = read_header(path)
    get = lambda key, *args: header.get(f"tokenizer.ggml.{key}", *args)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = get("model", str)
    if model not in kinds:
        raise UserError(f"{path}: tokenizer.ggml.model is {model!r}; expected one of {', '.join(kinds)}")
    tokens = get("tokens", list)
    types = get("token_type", list, [1] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) == len(types):
        raise UserError(f"{path}: expected one token_type per distinct token, got {len(types)} for {len(vocab)} tokens")
    try:
        backend = kinds[model](header, vocab, types)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{path}: the tokenizer's vocabulary and merges do not fit together: {error}") from error
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind != USER_DEFINED) for token, kind in added])
    eos = get("eos_token_id", int)
    # If the file does not say whether texts start with a bos, llama.cpp adds it for these two.
    starts = get("add_bos_token", bool, model == "llama" or get("pre", str, "") == "llama-bpe")
    ids = {"pad": get("padding_token_id", int, eos), "bos": get("bos_token_id", int, -1) if starts else -1, "eos": eos}
    for name, i in ids.items():
        if not -1 <= i < len(tokens) or i == -1 and name != "bos":
            raise UserError(f"{path}: the {name} token has id {i}; expected one of the {len(tokens)} tokens")
    return wrap(backend, **ids, chat_template=header.get("tokenizer.chat_template", str, ""))


def _byte_level(header: Header, vocab: dict[str, int], types: list[int]) -> Backend:
    """BPE over bytes, each represented by one printable character."""
    by_words = lambda digits: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # llama.cpp writes "default" or nothing if it does not know how to split text; this is refused rather than guessed.
    splits = {
        "gpt-2": as_gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2]),
        "llama-bpe": by_words("{1,3}"),
        "qwen2": by_words(""),
    }
    pre = header.get("tokenizer.ggml.pre", str)
    if pre not in splits:
        raise UserError(f"{header.file}: tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(splits)}")
    merges = [tuple(merge.split(" ")) for merge in header.get("tokenizer.ggml.merges", list)]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splits[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: Header, vocab: dict[str, int], types: list[int]) -> Backend:
    """SentencePiece BPE: "▁" for a space, bytes for unknown characters.

    It has scores instead of merges: of the adjacent pieces that form a token, those with the best score merge first. Pairs
    for the same token are ordered by their ids, as in Hugging Face's conversion of Llama's tokenizer.
    """
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(vocab):
        raise UserError(f"{header.file}: expected tokenizer.ggml.scores of {len(vocab)} tokens, got {len(scores)}")
    # Text must never merge into an unknown, control or byte token.
    pieces = {token: i for token, i in vocab.items() if types[i] not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for token, i in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[i], i, pieces[left], pieces[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = next((token for token, i in vocab.items() if types[i] == UNKNOWN), None)
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefixed)
    return backend
