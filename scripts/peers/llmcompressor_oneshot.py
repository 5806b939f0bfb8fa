"""Run one llm-compressor 2:4 pruning pass; started by compare_llmcompressor.py in the peer's environment.

It imports nothing of halfweight, so the environment needs only `llmcompressor` (0.14). Calibration windows
come ready-made as token ids, one window per row: nothing is tokenized, padded, truncated or shuffled here.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


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
    parser = argparse.ArgumentParser(description="Prune a model to 2:4 with llm-compressor.")
    parser.add_argument("model", type=Path, help="dense Hugging Face folder")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors, int64 `input_ids` [N, L]")
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned dense checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, help="file for seconds, settings and versions")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    begun = time.perf_counter()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file

    torch.set_num_threads(args.threads)
    imported = time.perf_counter()

    ids = load_file(args.windows)["input_ids"]
    count, length = ids.shape
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})

    # The modifier looks a linear up as "name.", so the head needs a pattern: plain "lm_head" would not match.
    settings = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]

    seen: dict[str, int] = {}
    prune = kind.compress_modules

    def count_then_prune(self: Any) -> None:
        """Note how many windows reached each linear, then prune as the stock modifier does."""
        seen.update({self._module_names[module]: windows for module, windows in self._num_samples.items()})
        prune(self)

    kind.compress_modules = count_then_prune
    modifier = kind(**settings)
    oneshot(
        model=str(args.model),
        precision="float32",
        recipe=modifier,
        dataset=dataset,
        batch_size=1,
        num_calibration_samples=count,
        shuffle_calibration_samples=False,
        max_seq_length=length,
        output_dir=str(args.out),
    )
    seconds = time.perf_counter() - imported

    if not seen or set(seen.values()) != {count}:
        raise SystemExit(f"expected {count} windows at every linear, saw {sorted(set(seen.values()))}")
    record = {
        "seconds": seconds,
        "seconds_import": imported - begun,
        "tokens": count * length,
        "linears": len(seen),
        "threads": torch.get_num_threads(),
        "settings": modifier.model_dump(include={*settings, "block_size", "dampening_frac"}),
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
