"""The verdict on every kind of linear: as it is stored, as dense int4, or dense, whichever is fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, model_validator

from ..serving.embedding import TiedHead
from ..serving.int4 import exact_int4
from ..serving.linear import CompressedLinear, CompressedWeight
from ..serving.scheme import LinearScheme
from ..serving.storage import selection_of
from ..serving.verdicts import Choice, Entry, Verdict, bucket, own_form
from ..triton_kernels.dispatch import near_threshold
from .rivals import Contender, linear_calls
from .timing import Spread, sweep_seconds

# Another form costs memory, and medians differ by chance: it must win by this factor.
MARGIN = 1.05


class LayerSpeed(BaseModel):
    """One kind of linear `[N, K]` (`count` of them in the model) on `tokens` tokens in `dtype`.

    `times` are microseconds of one call by form: the stored one under its own name, `dense`, and `int4`, which is a
    possible verdict only where `int4_exact`. `verdict` is the fastest possible form; `evidence` says whether the times
    were measured on the device or modelled for it.
    """

    op: str
    scheme: LinearScheme
    shape: tuple[int, int]
    pattern: str
    numbers: str
    count: int
    example: str
    tokens: int
    dtype: str
    own: Choice
    times: dict[str, Spread]
    int4_exact: bool
    verdict: Choice
    reason: str
    evidence: Literal["measured", "modelled"]

    @model_validator(mode="after")
    def _complete(self) -> LayerSpeed:
        if missing := {self.own, "dense", self.verdict} - self.times.keys():
            raise ValueError(f"times lack {', '.join(sorted(missing))}")
        return self


Kind = tuple[str, LinearScheme, tuple[int, int]]


def kinds_of(model: Any) -> dict[Kind, list[str]]:
    """The compressed weights of `model` by kind: names of all that share op, scheme and shape.

    A table that no head shares only looks rows up, which takes no time to speak of, and is left out.
    """
    multiplied = CompressedWeight if any(isinstance(m, TiedHead) for m in model.modules()) else CompressedLinear
    modules = {name: module for name, module in model.named_modules() if isinstance(module, multiplied)}
    kinds: dict[Kind, list[str]] = {}
    for name, module in modules.items():
        if name.rpartition(".")[0] not in modules:  # not half of a branch
            kinds.setdefault((module.op, module.scheme, module.shape), []).append(name)
    return kinds


def measure(contenders: list[Contender], tokens: int, rounds: int, seed: int = 0) -> list[LayerSpeed]:
    """Time all compressed linears of the first contender, and the same linears of the others, on `tokens` tokens.

    The contenders take turns; each turn runs every linear once in the model's order, on random inputs, of which those
    that select theirs read about half. The first turn does not count.
    """
    own = contenders[0]
    kinds = kinds_of(own.model)
    names = [name for members in kinds.values() for name in members]
    device = own.model.device
    generator = torch.Generator().manual_seed(seed)
    by_width = {
        width: torch.randn(tokens, width, generator=generator).to(device, own.dtype)
        for width in {shape[1] for _, _, shape in kinds}
    }
    inputs = {}
    for (_, scheme, shape), members in kinds.items():
        for name in members:
            selection = selection_of(scheme, own.model.get_submodule(name).stored())
            inputs[name] = near_threshold(by_width[shape[1]], selection).to(own.dtype)
    calls = {contender.name: linear_calls(contender.model, names) for contender in contenders}
    seconds: dict[str, dict[str, list[float]]] = {contender.name: {n: [] for n in names} for contender in contenders}
    for turn in range(rounds + 1):
        for contender in contenders:
            for name, taken in sweep_seconds(calls[contender.name], inputs).items():
                if turn:
                    seconds[contender.name][name].append(taken)
    layers = []
    for kind, members in kinds.items():
        times = {
            name: Spread.of([1e6 * taken for member in members for taken in found[member]])
            for name, found in seconds.items()
        }
        layers.append(judge(kind, members, tokens, str(own.dtype).removeprefix("torch."), times, "measured"))
    return layers


def judge(
    kind: Kind,
    members: list[str],
    tokens: int,
    dtype: str,
    times: Mapping[str, Spread],
    evidence: Literal["measured", "modelled"],
) -> LayerSpeed:
    """The verdict on a kind of linear from its `times` as `compressed`, `dense` and, perhaps, `int4`."""
    op, scheme, shape = kind
    own, exact = own_form(scheme), op != "tied" and exact_int4(scheme) is not None
    by_form: dict[str, Spread] = {own: times["compressed"], "dense": times["dense"]}
    if own != "int4" and "int4" in times and op != "tied":
        by_form["int4"] = times["int4"]
    possible = {form: spread.median for form, spread in by_form.items() if form != "int4" or own == "int4" or exact}
    verdict, reason = decide(own, possible)
    if scheme.prompt_static:
        verdict, reason = own, "no other form reads what a prompt chose"
    if "int4" in by_form and "int4" not in possible and by_form["int4"].median * MARGIN < possible[verdict]:
        gain = possible[verdict] / by_form["int4"].median
        reason += f"; int4 would be {gain:.2f}x faster, with other weights"
    return LayerSpeed(
        op=op,
        scheme=scheme,
        shape=shape,
        pattern=scheme.pattern,
        numbers=scheme.numbers,
        count=len(members),
        example=members[0],
        tokens=tokens,
        dtype=dtype,
        own=own,
        times=by_form,
        int4_exact=exact,
        verdict=verdict,
        reason=reason,
        evidence=evidence,
    )


def decide(own: Choice, possible: Mapping[Any, float]) -> tuple[Choice, str]:
    """The fastest of the `possible` forms (form -> microseconds), with the reason; a tie goes to the stored form."""
    best: Choice = min(possible, key=lambda form: possible[form])
    others = {form: taken for form, taken in possible.items() if form != own}
    if best == own or possible[best] * MARGIN >= possible[own]:
        rival = min(others, key=lambda form: others[form])
        return own, f"{others[rival] / possible[own]:.2f}x as fast as {rival}"
    return best, f"{possible[own] / possible[best]:.2f}x as fast as {own}"


def entries(layers: list[LayerSpeed], device: str) -> list[Entry]:
    """Measured verdicts as `verdicts.json` keeps them; where several numbers of tokens share a bucket, the first's."""
    grouped: dict[tuple[str, int], dict[Kind, Verdict]] = {}
    for layer in layers:
        verdict = Verdict(
            op=layer.op,
            scheme=layer.scheme,
            shape=layer.shape,
            choice=layer.verdict,
            microseconds={form: spread.median for form, spread in layer.times.items()},
        )
        kind = (layer.op, layer.scheme, layer.shape)
        grouped.setdefault((layer.dtype, bucket(layer.tokens)), {}).setdefault(kind, verdict)
    return [
        Entry(device=device, dtype=dtype, tokens=tokens, linears=list(found.values()))
        for (dtype, tokens), found in grouped.items()
    ]
