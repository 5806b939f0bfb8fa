"""A Hugging Face tokenizer as GGUF metadata: byte-level BPE, and the BPE of SentencePiece with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...serving.errors import InputError
from ...serving.load import load_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizers that llama.cpp knows by name, by the expression they split at.
_EXPRESSIONS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}


def add_tokenizer(out: Any, path: Path, config: Any) -> None:
    """Add the tokenizer of the checkpoint at `path` to the GGUF writer; raises InputError for an unknown kind."""
    import gguf

    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{path}: GGUF export needs a tokenizer.json")
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{path}: GGUF export knows BPE tokenizers, not {model.get('type')}; use --to dense")

    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, _kind(token, model)
    for added in state["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)

    if model.get("byte_fallback"):
        out.add_tokenizer_model("llama")
        out.add_token_scores([-float(i) for i in range(len(tokens))])  # earlier tokens merge first
        out.add_add_space_prefix('"Prepend"' in json.dumps(state.get("normalizer")))
    else:
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(_pre_tokenizer(state.get("pre_tokenizer"), path))
        out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(out, f"add_{name}_token_id")(number)
    first = tokenizer("a")["input_ids"][:1]
    out.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if getattr(tokenizer, "chat_template", None):
        out.add_chat_template(tokenizer.chat_template)


def _kind(token: str, model: dict[str, Any]) -> int:
    import gguf

    if token == model.get("unk_token"):
        return int(gguf.TokenType.UNKNOWN)
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(gguf.TokenType.BYTE)
    return int(gguf.TokenType.NORMAL)


def _pre_tokenizer(state: dict[str, Any] | None, path: Path) -> str:
    """llama.cpp's name for how a byte-level BPE splits text first."""
    steps = [] if state is None else state.get("pretokenizers", [state])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _EXPRESSIONS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise InputError(
        f"{path}: GGUF export does not know how its tokenizer splits text ({', '.join(kinds) or 'nothing'})"
    )
