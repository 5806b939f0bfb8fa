"""What the dense model says about the next token, kept on disk: its most likely tokens, so that it can be freed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..blocks import BlockWalker
from ..writer import write_part

PART = "teacher.safetensors"
LOGITS = 2**24  # that exist at once, fp32: with fewer rows than 64, a large head is read once for every few tokens
_FLOOR = 1e-6  # of the probability of everything outside the top


def write_teacher(
    walker: BlockWalker, texts: Mapping[str, tuple[Iterable[Tensor], Sequence[Tensor]]], k: int, file: Path
) -> None:
    """Write the dense model's `k` most likely next tokens for every position but the last of the `texts`' windows.

    A text is its last block's outputs, in batches `[B, T, D]`, and its token windows `[T]`. Stored by text: `values`
    `[windows, T - 1, k]`, fp16 log probabilities, and `tokens`, int32 ids.
    """
    tensors: dict[str, Tensor] = {}
    k = min(k, walker.model.config.get_text_config().vocab_size)
    with walker.vocabulary(), torch.no_grad():
        for name, (hidden, windows) in texts.items():
            shape = (len(windows), len(windows[0]) - 1, k)
            values, tokens = torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.int32)
            rows = (row[None] for x in hidden for row in x)
            for number, (x, window) in enumerate(zip(rows, windows, strict=True)):
                output = walker.decoded(x, window)
                for keep in chunks(walker, len(window) - 1, LOGITS):
                    logits = walker.logits(output, window, keep)
                    top = (logits - logits.logsumexp(-1, keepdim=True)).topk(k)
                    values[number, keep.cpu()], tokens[number, keep.cpu()] = (
                        top.values.cpu().half(),
                        top.indices.cpu().int(),
                    )
            tensors |= {f"{name}.values": values, f"{name}.tokens": tokens}
    write_part(file, tensors)


class Teacher:
    """Reads what `write_teacher` wrote, a window at a time."""

    def __init__(self, file: Path, text: str, device: torch.device) -> None:
        self._file, self.device = safe_open(str(file), "pt"), device
        self._values, self._tokens = (self._file.get_slice(f"{text}.{part}") for part in ("values", "tokens"))

    def window(self, number: int) -> tuple[Tensor, Tensor]:
        """Log probabilities `[T - 1, k]` fp32 and token ids `[T - 1, k]` int64 of a window."""
        values, tokens = self._values[number], self._tokens[number]
        return values.to(self.device).float(), tokens.to(self.device).long()


def chunks(walker: BlockWalker, positions: int, logits: int) -> list[Tensor]:
    """Positions 0 to `positions` - 1 in pieces, each with at most `logits` logits but no fewer than 16 rows."""
    vocabulary = walker.model.config.get_text_config().vocab_size
    return list(torch.arange(positions, device=walker.device).split(max(16, logits // vocabulary)))


class _LogProbabilities(torch.autograd.Function):
    """Few of a row's log probabilities; backward, too, makes one matrix as large as the logits, where log_softmax and
    the losses on top of it make five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total, tokens)
        return logits.gather(-1, tokens) - total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, total, tokens = ctx.saved_tensors
        found = (logits - total).exp_().mul_(-grads[0].sum(-1, keepdim=True))
        return found.scatter_add_(-1, tokens, grads[0]), None


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities `[n, k]` of `tokens` `[n, k]` (ids, which may repeat) under softmax(`logits` `[n, V]`)."""
    found: Tensor = _LogProbabilities.apply(logits, tokens)
    return found


def divergence(said: Tensor, values: Tensor) -> Tensor:
    """KL divergence `[n]` (nats) of a distribution that gives tokens the log probabilities `said` `[n, k]` from the one
    that gives them `values` `[n, k]`, with all other tokens taken together as one."""
    rest, said_rest = ((1 - part.exp().sum(-1)).clamp(min=_FLOOR) for part in (values, said))
    return (values.exp() * (values - said)).sum(-1) + rest * (rest.log() - said_rest.log())
