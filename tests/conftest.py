"""Tiny random models with real tokenizers, so that tests run the product offline and fast."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import halfweight  # registers with transformers
from runs import BLOCKS
from tiny import ARCHITECTURES, WORDS, tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4,000 words of seeded nonsense with repeating structure."""
    generator = torch.Generator().manual_seed(0)
    words = WORDS.split()
    picks = torch.randint(0, len(words), (4000,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: a saved random checkpoint of an architecture (see ARCHITECTURES), with tokenizer; returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(
        architecture: str = "llama",
        dtype: torch.dtype = torch.bfloat16,
        bos: bool = False,
        max_shard_size: str = "1GB",
        **changes: Any,
    ) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():  # transformers' initial weights are too small to tell methods apart
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.3 / parameter.shape[1] ** 0.25)
        folder = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer(bos).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """A tiny random Llama in bf16."""
    return make_model("llama")


@pytest.fixture(scope="session")
def small_recipe(text_file: Path) -> halfweight.Recipe:
    """Wanda 2:4 with eight calibration windows of 32 tokens."""
    return halfweight.Recipe.parse(
        {
            "name": "small",
            "calibration": {"data": str(text_file), "samples": 8, "seqlen": 32},
            "stages": [{"pass": "wanda", "pattern": "2:4"}],
        }
    )


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama of four blocks."""
    return make_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(dense: Path, small_recipe: halfweight.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = halfweight.compress_checkpoint(dense, small_recipe, out)
    assert report.blocks_resumed == 0
    return out
