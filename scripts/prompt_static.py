"""Does a prompt know what its continuation reads? CoreInfer's check (arXiv 2410.18311) on a checkpoint of ours.

    python scripts/prompt_static.py MODEL --text WIKITEXT.txt --windows 16 --seqlen 1024 --json core.json

MODEL was compressed with `threshold: prompt`. Each window of the text is a prompt of --prompt-tokens and a
continuation. The prompt reads everything; the continuation is scored, as a whole and in four equal parts by distance
from the prompt. It reads

- all inputs, chosen by `nothing`,
- those that `each token` scores highest itself (top-k),
- those that `its prompt` chose, as in `halfweight eval`,
- those that `another prompt` chose, that of the next window,
- those that `chance` drew, others for each window.

All but the first read equally many.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halfweight.eval.perplexity import check_context, window_losses
from halfweight.eval.selection import prompt_tokens_of, selecting_tokens
from halfweight.eval.text import bos_token, exact_windows, read_text, tokenize
from halfweight.serving.checkpoint import Checkpoint
from halfweight.serving.durable import write_text
from halfweight.serving.linear import CompressedLinear, core_inputs
from halfweight.serving.load import load, load_tokenizer
from halfweight.serving.skeleton import load_config

PARTS = 4
Each = Callable[[int], None]
console = Console()


class Row(BaseModel):
    """One way to choose inputs: perplexity of all continuations, and of their `parts`, the nearest to the prompt first;
    `bytes_read_fraction` as in `halfweight eval` (None: everything is read)."""

    chosen_by: str
    perplexity: float
    parts: list[float]
    bytes_read_fraction: float | None


class PromptCheck(BaseModel):
    """What this script measured: `tokens` of continuations were scored in every row."""

    model: str
    text: str
    windows: int
    seqlen: int
    prompt_tokens: int
    tokens: int
    seed: int
    dtype: str
    device: str
    rows: list[Row]


def measure(
    model: str,
    text: Path,
    windows: int | None = None,
    seqlen: int = 1024,
    prompt: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> PromptCheck:
    """Score every row on the same windows."""
    tokenizer = load_tokenizer(model)
    chosen = exact_windows(tokenize(tokenizer, read_text(text)), seqlen, bos_token(tokenizer), windows)
    check_context(load_config(Checkpoint(model)), seqlen)
    prompt = prompt_tokens_of(seqlen) if prompt is None else prompt
    if not 1 <= prompt <= seqlen - 1 - PARTS:
        raise SystemExit(f"--prompt-tokens {prompt}: windows of {seqlen} tokens allow 1 to {seqlen - 1 - PARTS}")
    if len(chosen) < 2:
        raise SystemExit(f"{text}: one window of {seqlen} tokens has no other's prompt; two are needed")
    network = load(model, device, dtype, verdicts=False)
    linears = [module for module in network.modules() if isinstance(module, CompressedLinear)]
    cores = core_inputs(network)
    if not cores:
        raise SystemExit(f"{model}: no linear has threshold: prompt; compress one with the recipe core-50")
    widths = [linear.in_features for linear in linears if linear.form in cores]
    own: list[list[Tensor]] = []
    generator = torch.Generator().manual_seed(seed)

    def nothing(number: int) -> None:
        give([None] * len(cores))

    def keep(number: int) -> None:
        own.append([core.core for core in cores if core.core is not None])

    def other(number: int) -> None:
        give(own[(number + 1) % len(own)])

    def random(number: int) -> None:
        picked = [torch.randperm(width, generator=generator) for width in widths]
        give([some[: len(like)].sort().values for some, like in zip(picked, own[number], strict=True)])

    def give(inputs: Sequence[Tensor | None]) -> None:
        for core, given in zip(cores, inputs, strict=True):
            core.given = given

    def row(chosen_by: str, before: Each = nothing, after: Each = nothing, selecting: bool = True) -> Row:
        losses = []
        with selecting_tokens(network, prompt) if selecting else nullcontext() as reading:
            for number, window in enumerate(chosen):
                before(number)
                losses.append(window_losses(network, window)[prompt:].cpu())
                after(number)
        fraction = None if reading is None else reading.fraction
        parts = [torch.cat(part) for part in zip(*(loss.tensor_split(PARTS) for loss in losses), strict=True)]
        return Row(
            chosen_by=chosen_by,
            perplexity=perplexity(torch.cat(losses)),
            parts=[perplexity(part) for part in parts],
            bytes_read_fraction=fraction,
        )

    rows = [row("nothing", selecting=False)]
    with each_token_chooses(network):
        rows.append(row("each token"))
    rows += [row("its prompt", after=keep), row("another prompt", other), row("chance", random)]
    return PromptCheck(
        model=model,
        text=str(text),
        windows=len(chosen),
        seqlen=seqlen,
        prompt_tokens=prompt,
        tokens=len(chosen) * (seqlen - 1 - prompt),
        seed=seed,
        dtype=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
        rows=rows,
    )


@contextmanager
def each_token_chooses(network: Any) -> Iterator[None]:
    """Within the `with`, every token reads as many inputs as the core has, those with its own largest scores."""
    named = {name: module for name, module in network.named_modules() if isinstance(module, CompressedLinear)}
    found = {name: linear for name, linear in named.items() if linear.scheme.prompt_static}
    for name, linear in found.items():
        assert linear.scheme.selection is not None  # it is static
        selection = linear.scheme.selection.model_copy(update={"threshold": "topk"})
        scheme, bias = linear.scheme.model_copy(update={"selection": selection}), linear.bias is not None
        made = CompressedLinear(scheme, linear.in_features, linear.out_features, bias, "meta", network.dtype)
        made.load_state_dict(linear.state_dict(), assign=True)
        network.set_submodule(name, made.eval())
    try:
        yield
    finally:
        for name, linear in found.items():
            network.set_submodule(name, linear)


def perplexity(losses: Tensor) -> float:
    """Of token losses in nats."""
    return math.exp(float(losses.double().mean()))


def show(check: PromptCheck) -> None:
    about = f"{check.windows} windows of {check.seqlen}, prompts of {check.prompt_tokens}, {check.tokens} tokens scored"
    rows = Table(title=f"{check.model}: perplexity of the continuation, {about}", title_justify="left")
    for header in ("inputs chosen by", "all", *(f"part {number + 1}" for number in range(PARTS)), "bytes read"):
        rows.add_column(header, justify="left" if header == "inputs chosen by" else "right")
    for row in check.rows:
        read = "1" if row.bytes_read_fraction is None else f"{row.bytes_read_fraction:.4f}"
        rows.add_row(row.chosen_by, f"{row.perplexity:.3f}", *(f"{part:.3f}" for part in row.parts), read)
    console.print(rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder compressed with threshold: prompt")
    parser.add_argument("--text", type=Path, required=True, help="text to score on")
    parser.add_argument("--windows", type=int, help="windows to score (default: all)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per window")
    parser.add_argument("--prompt-tokens", type=int, help="of a window (default: a quarter)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs chosen at random")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    check = measure(
        options.model,
        options.text,
        options.windows,
        options.seqlen,
        options.prompt_tokens,
        options.seed,
        options.device,
        options.dtype,
    )
    show(check)
    if options.json is not None:
        write_text(options.json, check.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    main()
