"""Tiny random models with real tokenizers, so that tests run the product offline and fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import halfweight  # registers with transformers
import halfweight.cli
from artifacts import shards
from commands import Cli, Result
from runs import BLOCKS
from tiny import ARCHITECTURES, MIXTURES, WORDS, tiny_tokenizer


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
        config = AutoConfig.for_model(architecture, **{**(ARCHITECTURES | MIXTURES)[architecture], **changes})
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():  # transformers' initial weights are too small to tell methods apart
            if parameter.ndim >= 2:
                parameter.data.normal_(0, 0.3 / parameter.shape[-1] ** 0.25)
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


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `halfweight ARGUMENTS` in this process, through the real entry point."""
    from transformers.utils import logging

    # In a process of its own the command does this through the environment, before transformers is imported.
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(*arguments: Any) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["halfweight", *map(str, arguments)])
        code: Any = 0
        try:
            halfweight.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: Wanda 2:4 with four windows of 32 tokens of the test text."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(
        "description: for tests\n"
        f"calibration: {{data: {text_file}, samples: 4, seqlen: 32}}\n"
        "stages:\n- pass: wanda\n  pattern: '2:4'\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def compressed(llama: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    halfweight.compress_checkpoint(llama, recipe, out)
    return out


@pytest.fixture(scope="module")
def artifact(llama: Path, small_recipe: halfweight.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama at 2:4, one shard."""
    folder = tmp_path_factory.mktemp("artifact") / "llama-2of4"
    halfweight.compress_checkpoint(llama, small_recipe, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact, saved again in several shards."""
    folder = tmp_path_factory.mktemp("sharded") / "llama-2of4"
    halfweight.load(artifact, dtype="bfloat16").save_pretrained(folder, max_shard_size="12KB")
    assert len(shards(folder)) > 1
    return folder
