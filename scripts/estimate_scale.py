"""ESTIMATE what a compression of an 8B, 70B or 405B model takes on several GPUs. Nothing is measured on such models.

    python scripts/estimate_scale.py --recipe gqsa-w4s50 --processes 1,8,16 \
        --matmul-tflops 400 --solver-tflops 40 --network-gbs 100 --storage-gbs 2

Bytes and operations are those of `halfweight plan`, for the shapes of Llama 3.1 and calibration as the recipe says.
They are divided by throughputs that you measured: of 16-bit and of fp32 matmuls on one GPU (left out: measured on this
machine, as `plan` does it), between GPUs, and of the storage for each process. `--efficiency` is what runs of a smaller
model have kept of a linear speed-up. Processes share tokens evenly, and the linears of one input; every process reads
all weights, and the first writes. Prices are per GPU and hour. Tuning is left out: it does not spread.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from halfweight.compress.blocks import BlockWalker
from halfweight.compress.cost import Work, matmul_speed, work_of
from halfweight.compress.outline import Outline
from halfweight.compress.plan import plan
from halfweight.compress.recipe import Recipe
from halfweight.serving.load import resolve_device

# The shapes of meta-llama/Llama-3.1-8B, -70B and -405B.
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
# Bytes of the artifact move through the storage so often: as parts, read and written as shards, and reloaded.
_PASSES_OF_ARTIFACT = 4


def seconds(work: Work, written: float, rates: argparse.Namespace, processes: int) -> float:
    """Modelled seconds of one process; all of them take as long as the first, which writes `written` bytes."""
    computed = work.operations / rates.matmul + work.solvers / rates.solver
    kept = 1.0 if processes == 1 else rates.efficiency
    moved = work.exchanged / rates.network + (work.read + _PASSES_OF_ARTIFACT * written) / rates.storage
    return computed / kept + moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--recipe", default="gqsa-w4s50")
    parser.add_argument("--samples", type=int, help="calibration windows; default: the recipe's")
    parser.add_argument("--processes", default="1,8,16", help="numbers of GPUs to show")
    parser.add_argument(
        "--matmul-tflops", type=float, help="sustained by 16-bit matmuls of one GPU, in 10^12 per second"
    )
    parser.add_argument("--solver-tflops", type=float, help="sustained by fp32 matmuls of one GPU")
    parser.add_argument("--network-gbs", type=float, required=True, help="10^9 bytes per second that one GPU receives")
    parser.add_argument("--storage-gbs", type=float, required=True, help="10^9 bytes per second that one process reads")
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of a linear speed-up that runs have kept")
    parser.add_argument("--price", type=float, default=0.0, help="of one GPU and hour")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = resolve_device("auto")
    measured = {torch.bfloat16: options.matmul_tflops, torch.float32: options.solver_tflops}
    rates = {kind: 1e12 * rate if rate else matmul_speed(device, kind) for kind, rate in measured.items()}
    options.matmul, options.solver = rates[torch.bfloat16], rates[torch.float32]
    options.network, options.storage = 1e9 * options.network_gbs, 1e9 * options.storage_gbs
    recipe = Recipe.load(options.recipe).with_tuning("none").with_calibration(samples=options.samples)
    calibration = recipe.calibration
    title = f"ESTIMATE, not measured: {recipe.name}, {calibration.samples} x {calibration.seqlen} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("model", "GPUs", "GB per GPU", "read GB, each", "received GB, each", "written GB", "hours", "price"):
        table.add_column(column, justify="right")
    rows = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            config = {**COMMON, **MODELS[name], "head_dim": 128}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            walker = BlockWalker(Outline(Path(folder)), torch.device("cpu"), torch.bfloat16)
            shapes = walker.linear_shapes()
            stages = recipe.resolve(shapes)
            for processes in map(int, options.processes.split(",")):
                work = work_of(walker, recipe, stages, shapes, processes)
                own = recipe.with_calibration(samples=math.ceil(calibration.samples / processes))
                planned = plan(folder, own, device="cpu", dtype="bfloat16")
                written = planned.effective_bits_model * planned.parameters / 8
                hours = seconds(work, written, options, processes) / 3600
                row = {
                    "model": name,
                    "processes": processes,
                    "device_gb": planned.stages[0].device_gb,
                    "read_gb": work.read / 1e9,
                    "received_gb": work.exchanged / 1e9,
                    "written_gb": written / 1e9,
                    "hours": hours,
                    "price": hours * processes * options.price,
                }
                rows.append(row)
                cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
                table.add_row(*cells[:-1], f"{row['price']:.0f}" if options.price else "-")
    Console().print(table)
    speeds = f"{options.matmul / 1e12:.3g} and {options.solver / 1e12:.3g} x 10^12 operations per second"
    print(f"at {speeds}, {options.network_gbs:g} and {options.storage_gbs:g} GB/s, efficiency {options.efficiency:g}")
    if options.json:
        options.json.write_text(json.dumps({"kind": "estimate", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
