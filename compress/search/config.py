"""The recipe's `search` section."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["evolution", "descent", "tpe", "cma", "random"]

# What a user may choose on the command line.
CHOICES: tuple[str, ...] = ("none", "evolution", "descent", "tpe", "cma", "random")


class Search(BaseModel):
    """How the bytes that linears with a `selection` read are divided, by trying: all candidates read as many bytes as
    the recipe, which is the first trial.

    Neighbouring blocks form `groups`. What may `vary` per group is the `sparsity`, by up to `spread`, and the share of
    `channels`, down to `least_channels`, where a stage has a branch. A trial costs a forward pass of `samples` windows
    of `seqlen` tokens of the dev set. The `objective` is the divergence (`kl`) from the dense model's predictions, or
    the perplexity.

    `evolution` keeps the best `population` trials and crosses and mutates them; `descent` measures what each group's
    reading is worth and moves bytes to where they are worth most; `tpe` and `cma` model what is good (they need the
    package optuna); `random` is the control that a search has to beat.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "evolution"
    trials: int = Field(default=64, ge=2)
    samples: int = Field(default=4, ge=1)
    seqlen: int = Field(default=512, ge=2)
    objective: Literal["kl", "perplexity"] = "kl"
    vary: tuple[Literal["sparsity", "channels"], ...] = Field(default=("sparsity", "channels"), min_length=1)
    groups: int = Field(default=10, ge=1)
    spread: float = Field(default=0.25, gt=0, lt=1)
    least_channels: float = Field(default=0.5, ge=0, le=1)
    population: int = Field(default=12, ge=2)
    seed: int = Field(default=0, ge=0)
