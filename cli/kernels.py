"""`halfweight kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..serving.errors import InputError
from . import options
from .output import out, say, table, write_json

if TYPE_CHECKING:
    from ..triton_kernels.survey import Row, Survey

_WIDTH = 132  # of the table


def kernels(
    gpu: Annotated[str, typer.Option(help="a100, 4090 or h100.")] = "h100",
    op: Annotated[str | None, typer.Option(help="Only this operator, such as two_four.")] = None,
    model: Annotated[str | None, typer.Option(help="Only linears of 1B, 8B or 70B.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Numbers measured on such a GPU by scripts/gpu_suite.py.")
    ] = None,
    json: options.Json = None,
) -> None:
    """Show what the GPU kernels cost on the linears of Llama models: bytes, registers, instructions, modelled times.

    Nothing is measured and no GPU is needed: kernels are compiled for the GPU, and interpreted on this machine. The
    first run takes minutes, later ones seconds.

    Examples:

        halfweight kernels --gpu a100 --op two_four

        halfweight kernels --model 8B --json kernels.json
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InputError("the kernel table needs Triton: pip install 'halfweight[cpu]' (Linux)") from None
    from ..serving.gguf import cache_root
    from ..triton_kernels import cost, registry, survey

    models = [m for m in survey.MODELS if model is None or m.name.endswith(f"-{model.upper()}")]
    for name, value, known in (
        ("--gpu", gpu, list(cost.GPUS)),
        ("--op", op or registry.OPS[0], list(registry.OPS)),
        ("--dtype", dtype, ["bfloat16", "float16"]),
    ):
        if value not in known:
            raise InputError(f"{name} {value} is unknown; choose from {', '.join(known)}")
    if not models:
        raise InputError(f"--model {model} is unknown; choose from 1B, 8B, 70B")
    device = cost.GPUS[gpu]
    if calibration is not None:
        try:
            device = cost.calibrated(device, calibration)
        except ValueError as error:
            raise InputError(str(error)) from None
    ops = [op] if op else registry.OPS
    result = survey.survey(models, ops, device, dtype, cache_root() / "kernels")
    write_json(json, result)
    _show(result)


def _show(result: Survey) -> None:
    """One table per model and linear shape; linears of one shape share a row."""
    headers = ["linear", "N x K", "M", "op", "MB", "over min", "regs", "warps/SM", "KB in flight", "instr/weight"]
    headers += ["bound", "modelled us", "dense us", "int4 us"]
    wide = Console(width=max(out.width, _WIDTH))  # folded into 80 columns nobody can read it
    for model in dict.fromkeys(row.model for row in result.rows):
        shown = table(f"{model} on {result.gpu}, {result.rows[0].dtype}: times are {result.times}", *headers, left=2)
        alike: dict[tuple[object, ...], list[Row]] = {}
        for row in result.rows:
            if row.model == model:
                alike.setdefault((row.shape, row.m, row.op), []).append(row)
        for rows in alike.values():
            row = rows[0]
            shown.add_row(
                ", ".join(other.linear for other in rows),
                f"{row.shape[0]} x {row.shape[1]}",
                str(row.m),
                row.op + ("" if row.metered else "*"),
                f"{row.bytes / 1e6:.2f}",
                f"{row.bytes_over_minimum:.3f}",
                f"{row.registers}" + (f" ({row.spills} B spilled)" if row.spills else ""),
                str(row.warps_per_sm),
                f"{row.bytes_in_flight / 1024:.1f}",
                f"{row.instr_per_weight:.2f}",
                row.bound,
                f"{row.modelled_us:.1f}",
                f"{row.dense_us:.1f}",
                "-" if row.int4_us is None else f"{row.int4_us:.1f}",
            )
        wide.print(shown)
    say("dense us: an ideal kernel that streams the 16-bit weight; int4 us: dense int4 in groups of 128.")
    say("input_select ops: every token uses half of the inputs; tokens choose independently.")
    if not all(row.metered for row in result.rows):
        say("*: metering did not confirm the formula of the bytes.")
