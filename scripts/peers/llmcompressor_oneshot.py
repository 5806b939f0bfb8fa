"""Run llm-compressor once: 2:4, int4 groups, or one after the other; started by compare_llmcompressor.py.

It runs in the peer's own environment and imports nothing of halfweight, so the environment needs only `llmcompressor`
(0.14). Calibration windows come ready-made as token ids, one window per row: nothing is tokenized, padded, truncated or
shuffled here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Settings worth a record.
WRITTEN = {"sparsity", "mask_structure", "targets", "ignore", "block_size", "dampening_frac", "config_groups"}
# What its GPTQ is asked for: symmetric, as its own preset `W4A16`, which has groups of 128 and so refuses some models.
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


def check_two_of_four(dense: Path, pruned: Path) -> dict[str, Any]:
    """Require 2:4 in every decoder linear of `pruned` and everything else as in `dense`; return the density.

    Norm weights may differ by rounding: llm-compressor rewrites Gemma's `1 + w` norms and restores them.
    """
    import torch
    from safetensors import safe_open

    def locate(folder: Path) -> dict[str, Any]:
        """Map each tensor name to the open safetensors file that holds it."""
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)

    before, after = locate(dense), locate(pruned)
    if before.keys() != after.keys():
        raise ValueError(f"{pruned}: tensor names differ: {sorted(before.keys() ^ after.keys())[:4]}")
    linears = kept = total = 0
    for name, file in after.items():
        weight = file.get_tensor(name)
        original = before[name].get_tensor(name).to(weight.dtype)
        if ".layers." in name and weight.ndim == 2:
            if int(weight.unflatten(1, (-1, 4)).count_nonzero(-1).max()) > 2:
                raise ValueError(f"{name}: a group of four has more than two nonzero weights")
            linears, kept, total = linears + 1, kept + int(weight.count_nonzero()), total + weight.numel()
        elif weight.ndim == 1:
            torch.testing.assert_close(weight, original, rtol=1e-5, atol=1e-5)
        elif not torch.equal(weight, original):
            raise ValueError(f"{name}: changed, but it is not a decoder linear")
    if not linears:
        raise ValueError(f"{pruned}: no decoder linears found")
    return {"linears": linears, "density": kept / total}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compress a model with llm-compressor.")
    parser.add_argument("model", type=Path, help="dense Hugging Face folder")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors, int64 `input_ids` [N, L]")
    parser.add_argument("--method", choices=["sparsegpt", "wanda", "w4-g64", "2of4-w4"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint with dense, exact weights")
    parser.add_argument("--precision", default="float32", help="what the model computes in; auto: as stored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, help="file for seconds, settings and versions")
    return parser.parse_args()


def save_dense(model: Any, dense: Path, out: Path) -> None:
    """Save the weights that `model` computes with under the dense checkpoint's names, beside its other files."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    state, tensors = model.state_dict(), {}
    for path in sorted(dense.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: state[name].contiguous() for name in file.keys()})  # noqa: SIM118 (no mapping)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for path in dense.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)


def main() -> None:
    args = parse_args()
    begun = time.perf_counter()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file

    torch.set_num_threads(args.threads)
    imported = time.perf_counter()

    ids = load_file(args.windows)["input_ids"]
    count, length = ids.shape
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})

    # The modifier looks a linear up as "name.", so the head needs a pattern: plain "lm_head" would not match.
    ignore = ["re:.*lm_head"]
    settings = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ignore}
    groups = {"group_0": {"targets": ["Linear"], "weights": INT4}}
    modifiers: list[Any] = []
    if args.method != "w4-g64":
        modifiers.append((WandaPruningModifier if args.method == "wanda" else SparseGPTModifier)(**settings))
    if args.method in ("w4-g64", "2of4-w4"):
        modifiers.append(GPTQModifier(config_groups=groups, ignore=ignore))

    seen: dict[str, int] = {}
    kind = type(modifiers[0])
    work = kind.compress_modules

    def count_then_work(self: Any) -> None:
        """Note how many windows reached each linear, then do as the stock modifier does."""
        seen.update({self._module_names[module]: int(windows) for module, windows in self._num_samples.items()})
        work(self)

    kind.compress_modules = count_then_work
    model = oneshot(
        model=str(args.model),
        precision=args.precision,
        recipe=modifiers,
        dataset=dataset,
        batch_size=1,
        num_calibration_samples=count,
        shuffle_calibration_samples=False,
        max_seq_length=length,
    )
    save_dense(model, args.model, args.out)
    seconds = time.perf_counter() - imported

    if not seen or set(seen.values()) != {count}:
        raise SystemExit(f"expected {count} windows at every linear, saw {sorted(set(seen.values()))}")
    record = {
        "seconds": seconds,
        "seconds_import": imported - begun,
        "tokens": count * length,
        "linears": len(seen),
        "threads": torch.get_num_threads(),
        "settings": [m.model_dump(mode="json", include=WRITTEN) for m in modifiers],
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
