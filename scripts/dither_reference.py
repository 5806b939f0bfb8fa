"""Blur the 16-level grid that a model from a GGUF Q4_1 file sits on, so that 4-bit grids cannot just find it again.

    python scripts/dither_reference.py FOLDER OUT [--seed 0] [--block 32]

Q4_1 rounds every 32 consecutive weights of a row to 16 levels. Each weight of a decoder linear gets uniform noise of up
to half such a level, (max - min) / 30 of its 32. Results on the dithered model are only comparable with its own dense
perplexity, which has to be measured anew.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def dither(weight: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """`weight` `[N, K]` (K divisible by `block`) with noise of half a level, in its own dtype."""
    blocks = weight.float().unflatten(1, (-1, block))
    half = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 30
    noise = torch.rand(blocks.shape, generator=generator) * 2 - 1
    return (blocks + noise * half).flatten(1).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dither the decoder linears of a dense checkpoint.")
    parser.add_argument("model", type=Path, help="dense Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", type=int, default=32, help="weights that shared a level in the GGUF file")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(args.seed)
    shutil.copytree(args.model, args.out)
    changed = 0
    for file in sorted(args.out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if ".layers." in name and tensor.ndim == 2:
                tensors[name] = dither(tensor, args.block, generator)
                changed += 1
        save_file(tensors, file, {"format": "pt"})
    print(f"{args.out}: {changed} linears dithered with seed {args.seed}")


if __name__ == "__main__":
    main()
