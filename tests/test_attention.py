"""Attention by chunks against transformers' own, over whole squares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import halfweight
from halfweight.compress.attention import banded_attention
from halfweight.compress.blocks import BlockWalker
from halfweight.serving.checkpoint import Checkpoint
from tiny import ARCHITECTURES

T = 300  # two chunks and a part of one
AT = torch.arange(T)
CAUSAL = AT[:, None] >= AT
MASKS = {
    "causal": CAUSAL,
    "window": CAUSAL & (AT[:, None] - AT < 40),
    "everything": torch.ones(T, T, dtype=torch.bool),
    "two documents": CAUSAL & ((AT[:, None] < 150) == (AT < 150)),
}


class Attention(nn.Module):
    """What transformers' attention functions read from the module that calls them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


@pytest.mark.parametrize("name", [*MASKS, "float", "none", "per head"])
def test_bands_equal_the_whole_square(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, T, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, T, 16, generator=generator)
    mask = MASKS[name][None, None] if name in MASKS else None
    if name == "float":
        mask = torch.randn(1, 1, T, T, generator=generator)
    elif name == "per head":
        mask = CAUSAL.expand(1, 4, T, T)
    module = Attention(groups=2)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    found, _ = banded_attention(module, query, key, value, mask, scaling=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_keys_out_of_sight_are_not_read() -> None:
    key = torch.randn(1, 1, T, 8)
    key[:, :, :80] = torch.nan  # the last chunk, of queries 256 to 299, sees none of these
    found, _ = banded_attention(Attention(groups=1), torch.randn(1, 1, T, 8), key, key, MASKS["window"][None, None])
    assert torch.isfinite(found[:, 256:]).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walkers_attend_in_bands(architecture: str, make_model: Callable[..., Path]) -> None:
    walker = BlockWalker(Checkpoint(make_model(architecture)), torch.device("cpu"), torch.float32)
    assert walker.model.config._attn_implementation == "halfweight_banded"


def test_a_walk_over_long_sliding_windows_equals_the_plain_forward_pass(make_model: Callable[..., Path]) -> None:
    folder = make_model("gemma3_text", max_position_embeddings=T)
    window = torch.arange(3, 3 + T) % 60
    walker = BlockWalker(Checkpoint(folder), torch.device("cpu"), torch.float32)
    hidden = walker.embed([window])
    for index in range(walker.n_blocks):
        with walker.block(index) as block:
            hidden = [walker.run(index, block, x) for x in hidden]
    logits = halfweight.load(folder, dtype="float32")(window[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
    torch.testing.assert_close(walker.losses(hidden, [window])[0], expected, rtol=1e-5, atol=1e-5)
