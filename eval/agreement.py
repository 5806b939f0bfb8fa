"""One model beside its dense original on the same text: losses, divergence, agreement, calibration, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .metrics import calibration_error, common_prefix, kl_divergence, token_agreement
from .perplexity import decode, logit_chunks


@dataclass(frozen=True)
class Reference:
    """A dense model with its decoder's outputs for every window, so that it runs once however many models are compared
    with it: `[T, hidden]` per window in the compute dtype."""

    model: Any
    outputs: list[Any]


@dataclass(frozen=True)
class TextScores:
    """Per window `[T - 1]`, on the CPU: next-token `losses` (nats), `confidence` of the most likely token, whether it
    was right (`hits`); against the dense model `divergence` (KL, nats) and `agreement`."""

    losses: list[Tensor]
    confidence: list[Tensor]
    hits: list[Tensor]
    divergence: list[Tensor]
    agreement: list[Tensor]

    def calibration_error(self) -> float:
        """Expected calibration error of the next token over all windows, 15 bins."""
        return calibration_error(torch.cat(self.confidence), torch.cat(self.hits))


def reference(model: Any, windows: Sequence[Tensor]) -> Reference:
    """Run the dense `model`'s decoder over `windows` of token ids `[T]`."""
    return Reference(model, [decode(model, window) for window in windows])


@torch.no_grad()
def score_window(model: Any, window: Tensor, output: Any, dense: tuple[Any, Any] | None) -> TextScores:
    """Scores of one window from its decoder `output`; `dense` is the dense model with its own output."""
    ids = window.to(model.device)
    columns: list[list[Tensor]] = [[], [], [], [], []]
    rivals = None if dense is None else logit_chunks(dense[0], window, dense[1])
    start = 1
    for logits in logit_chunks(model, window, output):
        targets = ids[start : start + len(logits)]
        start += len(logits)
        top = logits.softmax(-1).max(-1)
        found = [
            torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
            top.values,
            top.indices == targets,
        ]
        if rivals is not None:
            other = next(rivals)
            found += [kl_divergence(other, logits), token_agreement(other, logits)]
        for column, values in zip(columns, found, strict=False):
            column.append(values.cpu())
    return TextScores(*([torch.cat(column)] if column else [] for column in columns))


def join(scores: Sequence[TextScores]) -> TextScores:
    """The scores of several windows as one."""
    names = ("losses", "confidence", "hits", "divergence", "agreement")
    return TextScores(*([tensor for score in scores for tensor in getattr(score, name)] for name in names))


@torch.no_grad()
def generate(model: Any, windows: Sequence[Tensor], prompt: int, new: int) -> list[list[int]]:
    """`new` greedy tokens after the first `prompt` tokens of each window, end-of-text tokens notwithstanding."""
    ids = torch.stack([window[:prompt] for window in windows]).to(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    rows: list[list[int]] = output[:, prompt:].tolist()
    return rows


def shared_tokens(dense: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[int]:
    """Per prompt, how many greedy tokens two models share before they part."""
    return [common_prefix(a, b) for a, b in zip(dense, other, strict=True)]
