"""The recipe's `tuning` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What may be trained: kept weights, scales and zero points of integers, low-rank branches, the blocks' norms.
Part = Literal["weights", "scales", "zeros", "branch", "norms"]

# What a user may choose -> the stages that run.
CHOICES: dict[str, tuple[str, ...]] = {
    "none": (),
    "block": ("block",),
    "end-to-end": ("end_to_end",),
    "both": ("block", "end_to_end"),
}


class Rates(BaseModel):
    """Learning rates of AdamW, each relative to what it moves: `weights` in steps of the integer grid or, at 16 bits,
    in the matrix's root mean square, as `branch` (of codes: in theirs) and `norms` are; `scales` in themselves; `zeros`
    in codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: float = Field(default=0.003, gt=0, lt=1)
    scales: float = Field(default=1e-3, gt=0, lt=1)
    zeros: float = Field(default=0.01, gt=0, lt=1)
    branch: float = Field(default=1e-3, gt=0, lt=1)
    norms: float = Field(default=1e-3, gt=0, lt=1)


class TrainingSettings(BaseModel):
    """Settings both stages share: AdamW over `epochs` of the tuning windows, `batch` windows per step.

    The rates rise over the first tenth of the steps and fall to a twentieth along a cosine. The dev set is looked at
    `evaluations` times, evenly spread; training stops after `patience` looks without a gain, and the best look wins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[Part, ...] = Field(min_length=1)
    epochs: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    rates: Rates = Rates()
    evaluations: int = Field(default=4, ge=1)
    patience: int = Field(default=2, ge=1)


class BlockTuning(TrainingSettings):
    """Stage 1: every block is trained to give, on the compressed model's inputs, what the dense block gave on its own.

    Masks stay; integer codes move by straight-through rounding. `units` trains the whole block at once, or the
    attention first and the rest after it, each with half of the epochs' steps.
    """

    train: tuple[Part, ...] = Field(default=("weights", "scales", "zeros", "branch"), min_length=1)
    units: Literal["together", "separately"] = "together"


class EndToEndTuning(TrainingSettings):
    """Stage 2: the whole model is trained on `1 - distill` of the language-model loss and `distill` of the divergence
    from the dense model's `top_k` most likely tokens.

    Masks and the weights' integer codes stay; `weights` are those of 16-bit schemes; `branch` moves its codes, too. A
    checkpoint is written every `checkpoint_every` steps.
    """

    train: tuple[Part, ...] = Field(default=("weights", "scales", "branch"), min_length=1)
    distill: float = Field(default=0.9, ge=0, le=1)
    top_k: int = Field(default=64, ge=1)
    checkpoint_every: int = Field(default=16, ge=1)


class Tuning(BaseModel):
    """Which stages run after the passes, and on how many windows: the calibration windows, and when `samples` is
    larger, more from the same part of the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int | None = Field(default=None, ge=1)
    block: BlockTuning | None = None
    end_to_end: EndToEndTuning | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> Tuning:
        if self.block is None and self.end_to_end is None:
            raise ValueError("tuning needs `block`, `end_to_end` or both ({} takes the defaults)")
        return self


def tuning_fields(path: list[str]) -> Mapping[str, Any]:
    """The fields of the section at `path` inside `tuning`, for messages about unknown keys."""
    if path[-1:] == ["rates"]:
        return Rates.model_fields
    sections: dict[str, type[BaseModel]] = {"block": BlockTuning, "end_to_end": EndToEndTuning}
    return sections.get(path[0], Tuning).model_fields if path else Tuning.model_fields
