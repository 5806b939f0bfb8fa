"""Speed verdicts: `verdicts.json` beside the tensors says which form of each kind of linear is fastest on a device.

`halfweight bench --apply` writes it and `load` reads it. Tensors never change: a `dense` verdict expands the same
weights after loading, an `int4` verdict unpacks them to dense int4 and exists only where that is exact. The stored
tensors stay in memory beside the new form, so that the model saves as it was loaded.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.nn import functional as F

from ..triton_kernels import dispatch
from ..triton_kernels.input_select import reference as select_reference
from ..triton_kernels.weight import Prepared, Weight
from . import storage
from .checkpoint import read_json
from .durable import write_text
from .errors import InputError
from .int4 import as_int4, exact_int4
from .linear import CompressedWeight
from .scheme import LinearScheme

FILE = "verdicts.json"
# Numbers of tokens per forward pass that verdicts are kept for; the last stands for all larger ones.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)

Choice = Literal["sparse", "int8", "int4", "dense"]


class Verdict(BaseModel):
    """The fastest form of one kind of linear: all of `op`, `scheme` and `shape` `[N, K]`.

    `choice` is the stored form's own name (`own_form`), or `dense` or `int4` for another. `microseconds` has what was
    measured for each form; `int4` may be among them without being a possible choice.
    """

    model_config = ConfigDict(extra="forbid")

    op: str
    scheme: LinearScheme
    shape: tuple[int, int]
    choice: Choice
    microseconds: dict[str, float]


class Entry(BaseModel):
    """Verdicts measured on one device, named by `device_name`, in one dtype, for one bucket of tokens per pass."""

    model_config = ConfigDict(extra="forbid")

    device: str
    dtype: str
    tokens: int = Field(ge=1)
    linears: list[Verdict]


class Verdicts(BaseModel):
    """The content of `verdicts.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    entries: list[Entry]


class Applied(BaseModel):
    """What honouring verdicts did: how many linears took which other form, and what that added to memory, in bytes."""

    dense: int = 0
    int4: int = 0
    extra_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{count} linears as {form}" for form, count in (("dense", self.dense), ("int4", self.int4)) if count]
        return f"{' and '.join(parts)}, {self.extra_bytes / 1e6:.1f} MB of memory more"


def bucket(tokens: int) -> int:
    """The bucket that `tokens` per forward pass belong to: the next power of two, at most 64."""
    return next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])


def device_name(device: torch.device) -> str:
    """What verdicts know a device by: a GPU's name, or the processor and the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_processor()}, {count} thread{'' if count == 1 else 's'}"


def own_form(scheme: LinearScheme) -> Choice:
    """The name of a stored form among the choices: `sparse`, or `int4` or `int8` when nothing is left out."""
    if scheme.pattern != "dense" or scheme.integers is None or scheme.input_major:
        return "sparse"
    return "int4" if scheme.integers.bits == 4 else "int8"


def read(folder: Path) -> Verdicts | None:
    """The folder's verdicts, or None when it has none; raises InputError for a damaged file."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return Verdicts.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {path}: {first['msg']}; write it again with `halfweight bench --apply`") from None


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """Add `entries` to the folder's verdicts, in place of those for the same device, dtype and bucket. Atomic.

    Raises InputError when what is there is damaged, and RunError when it cannot be written.
    """
    known = read(folder)
    kept = {(entry.device, entry.dtype, entry.tokens): entry for entry in (known.entries if known else [])}
    kept.update({(entry.device, entry.dtype, entry.tokens): entry for entry in entries})
    data = Verdicts(entries=[kept[key] for key in sorted(kept)]).model_dump(mode="json", exclude_defaults=True)
    write_text(folder / FILE, json.dumps({"format_version": 1, **data}, indent=1) + "\n")


def find(folder: Path, device: torch.device, dtype: torch.dtype, tokens: int) -> Entry | None:
    """The folder's verdicts for this device, dtype and number of tokens per pass, if there are any."""
    known = read(folder)
    wanted = (device_name(device), str(dtype).removeprefix("torch."), bucket(tokens))
    entries = known.entries if known else []
    return next((entry for entry in entries if (entry.device, entry.dtype, entry.tokens) == wanted), None)


def form_of(
    entry: Entry, op: str, scheme: LinearScheme, shape: tuple[int, int], where: str
) -> tuple[Choice, str] | None:
    """The other form that `entry` chose for a kind of linear `[N, K]`, and the times that speak for it; None where it
    stays as it is stored. Raises InputError naming `where` for int4 that would change its numbers."""
    kind = (op, scheme, shape)
    verdict = next((known for known in entry.linears if (known.op, known.scheme, known.shape) == kind), None)
    own = own_form(scheme)
    if verdict is None or verdict.choice == own or scheme.prompt_static:
        return None
    if verdict.choice != "dense" and (verdict.choice != "int4" or exact_int4(scheme) is None or op == "tied"):
        raise InputError(
            f"{where}: {scheme.pattern} {scheme.numbers} cannot run as {verdict.choice} without changing its numbers;"
            " write the file again with `halfweight bench --apply`"
        )
    times = verdict.microseconds
    both = {verdict.choice, own} <= times.keys()
    measured = f" {times[verdict.choice]:.0f} us against {times[own]:.0f}" if both else ""
    return verdict.choice, f"verdict: {verdict.choice}, measured{measured}"


def apply(model: nn.Module, entry: Entry, dtype: torch.dtype, where: str) -> Applied:
    """Give every compressed weight of `model` the form that `entry` chose for its kind; `dtype` is the model's.

    Kinds without a verdict stay as they are. Raises InputError naming `where` for an int4 verdict that is not exact.
    """
    applied = Applied()
    for name, module in model.named_modules():
        if not isinstance(module, CompressedWeight):
            continue
        change = form_of(entry, module.op, module.scheme, module.shape, f"{where}: {name}")
        if change is None:
            continue
        choice, reason = change
        if choice == "dense":
            use_dense(module, reason)
            applied.dense += 1
            applied.extra_bytes += module.shape[0] * module.shape[1] * dtype.itemsize
        else:
            module.form = Int4Form(reason)
            applied.int4 += 1
            applied.extra_bytes += storage.stored_bits(int4_scheme(module.scheme), module.shape, dtype) // 8
    return applied


def int4_scheme(scheme: LinearScheme) -> LinearScheme:
    """The dense int4 scheme with the same numbers, for one that `form_of` allowed it."""
    target = exact_int4(scheme)
    assert target is not None
    return target.dense


def use_dense(module: CompressedWeight, reason: str) -> None:
    """Let `module` expand its weight, and a low-rank branch's share of it, when it is next prepared."""
    module.form = DenseForm(reason)


@dataclass(frozen=True)
class DenseForm:
    """Prepares a module as one dense matrix in the dtype of its inputs; where a token reads few of them, the others
    are still masked."""

    reason: str

    def __call__(self, module: Any, dtype: torch.dtype) -> Prepared:
        tensors = module.stored()
        expand = getattr(module, "effective_weight", module.dense_weight)
        weight, selection = expand(dtype), storage.selection_of(module.scheme, tensors)

        def run_all(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if selection is None:
                return run_all(x, bias)
            return select_reference.linear(x, weight.T, selection, bias)

        def rows(ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return F.embedding(ids, weight).to(dtype)

        return Prepared("dense", self.reason, run, lambda: tensors, rows, None if selection is None else run_all)

    def verify(self, module: Any, dtype: torch.dtype, tokens: int, seed: int) -> tuple[bool, str]:
        """It is the reference's own product."""
        return True, self.reason


@dataclass(frozen=True)
class Int4Form:
    """Prepares a module as dense int4 with the same numbers."""

    reason: str

    def __call__(self, module: Any, dtype: torch.dtype) -> Prepared:
        tensors = module.stored()
        chosen = dispatch.prepare(self._weight(module, dtype), dtype)
        return Prepared(chosen.backend, f"{chosen.reason}; {self.reason}", chosen.run, lambda: tensors)

    def verify(self, module: Any, dtype: torch.dtype, tokens: int, seed: int) -> tuple[bool, str]:
        """Check the int4 kernels, which nothing else in the model may use."""
        return dispatch.verify(self._weight(module, dtype), dtype, tokens, seed)

    def _weight(self, module: Any, dtype: torch.dtype) -> Weight:
        converted = as_int4(module.scheme, module.stored(), module.shape)
        return storage.weight_of(int4_scheme(module.scheme), converted, module.shape, dtype)


def _processor() -> str:
    """The processor's name, as Linux gives it where there is one."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
