"""Compress checkpoints larger than memory, and compare time and peak memory against depth and against `plan`.

    python scripts/streaming.py --folder FOLDER --depths 12 24 48 --recipe 2of4-wanda --json streaming.json

Writes a Llama-shaped checkpoint of random bf16 weights in shards of four blocks (hidden size 2048, 8192 inside the MLP;
6.1 GB at 48 blocks) into FOLDER, once; shallower models are its first blocks. Each is compressed by the command line in
a process of its own, whose wall time and largest resident set the kernel reports, beside what `plan` says beforehand.
Random weights say nothing about quality: these runs are about time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from halfweight.eval.text import builtin_text

HIDDEN, INSIDE, HEADS, KEYS, VOCABULARY, BLOCKS_PER_SHARD = 2048, 8192, 32, 8, 65536, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INSIDE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for models and artifacts; needs 20 GB")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48], help="numbers of blocks")
    parser.add_argument("--recipe", default="2of4-wanda")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    arguments = parser.parse_args()
    deepest = max(arguments.depths)
    make_shards(arguments.folder / "shards", deepest)
    rows = []
    for depth in arguments.depths:
        model = make_model(arguments.folder, depth)
        settings = [
            "--recipe",
            arguments.recipe,
            "--samples",
            str(arguments.samples),
            "--seqlen",
            str(arguments.seqlen),
        ]
        rows.append(measure(model, settings, arguments.folder / f"out-{depth}"))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(rows, arguments.recipe)


def make_shards(folder: Path, blocks: int) -> None:
    """Write the embedding, the norm and `blocks` decoder blocks, a seed each; shards that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"q": HIDDEN, "k": HIDDEN // HEADS * KEYS, "v": HIDDEN // HEADS * KEYS, "o": HIDDEN}
    if not (folder / "ends.safetensors").is_file():
        write(
            folder / "ends.safetensors",
            {"model.embed_tokens.weight": normal((VOCABULARY, HIDDEN), -1)} | norm("model.norm"),
        )
    for first in range(0, blocks, BLOCKS_PER_SHARD):
        file = folder / shard_name(first)
        if file.is_file():
            continue
        tensors: dict[str, torch.Tensor] = {}
        for index in range(first, first + BLOCKS_PER_SHARD):
            prefix = f"model.layers.{index}"
            shapes = {f"{prefix}.self_attn.{name}_proj.weight": (n, HIDDEN) for name, n in rows.items()}
            shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INSIDE, HIDDEN) for name in ("gate", "up")}
            shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INSIDE)
            tensors |= {name: normal(shape, 16 * index + i) for i, (name, shape) in enumerate(shapes.items())}
            tensors |= norm(f"{prefix}.input_layernorm") | norm(f"{prefix}.post_attention_layernorm")
        write(file, tensors)


def normal(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def norm(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(file)


def shard_name(first: int) -> str:
    return f"blocks-{first:03d}.safetensors"


def make_model(folder: Path, depth: int) -> Path:
    """A checkpoint of the first `depth` blocks, its shards linked."""
    from safetensors import safe_open

    model = folder / f"model-{depth}"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    weight_map = {}
    for name in ["ends.safetensors", *(shard_name(first) for first in range(0, depth, BLOCKS_PER_SHARD))]:
        os.link(folder / "shards" / name, model / name)
        with safe_open(model / name, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), name)
    kept = {
        key: file
        for key, file in weight_map.items()
        if not key.startswith("model.layers.") or int(key.split(".")[2]) < depth
    }
    index = {"metadata": {}, "weight_map": kept}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": depth}, indent=2), encoding="utf-8")
    make_tokenizer().save_pretrained(model)
    return model


def make_tokenizer() -> Any:
    """Byte-level BPE over the text that ships with halfweight."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def measure(model: Path, settings: list[str], out: Path) -> dict[str, Any]:
    """Plan, then compress in a process of its own; sizes in 10^9 bytes, times in seconds."""
    command = [sys.executable, "-m", "halfweight"]
    planned = out.with_suffix(".plan.json")
    subprocess.run(
        [*command, "plan", str(model), *settings, "--json", str(planned)], check=True, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(out, ignore_errors=True)
    begin = time.monotonic()
    process = subprocess.Popen([*command, "compress", str(model), *settings, "--out", str(out), "--overwrite"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"compressing {model} ended with {os.waitstatus_to_exitcode(status)}")
    plan = json.loads(planned.read_text(encoding="utf-8"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "blocks": plan["blocks"],
        "checkpoint_gb": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9,
        "planned_peak_gb": plan["peak_memory_gb"],
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "planned_seconds": plan["seconds"],
        "seconds": time.monotonic() - begin,
        "verified": report["verification"]["relative_difference"],
    }


def show(rows: list[dict[str, Any]], recipe: str) -> None:
    table = Table(title=f"{recipe}, {os.cpu_count()} cores")
    for column in ("blocks", "checkpoint GB", "seconds", "s per block", "peak GB", "planned GB", "planned / peak"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["blocks"]),
            f"{row['checkpoint_gb']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / row['blocks']:.2f}",
            f"{row['peak_gb']:.2f}",
            f"{row['planned_peak_gb']:.2f}",
            f"{row['planned_peak_gb'] / row['peak_gb']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
