"""What an export reads: a checkpoint's compressed matrices, one at a time, and the tensors that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...serving.checkpoint import Checkpoint, TensorInfo, read_tensor
from ...serving.embedding import TiedHead
from ...serving.errors import InputError
from ...serving.linear import CompressedWeight
from ...serving.scheme import LinearScheme
from ...serving.skeleton import build_skeleton, is_linear, tensor_names
from ...serving.storage import effective_weight, validate
from ...serving.tables import Table
from ...triton_kernels.formats import FormatError, integers, two_four_int4
from ...triton_kernels.formats.integers import Integers, Quantized
from ...triton_kernels.formats.two_four_int4 import TwoFourInt4

_NUMBERS = 2**24  # of a table, expanded together


@dataclass(frozen=True)
class Matrix:
    """A compressed weight `[N, K]`: `name` is what the dense tensor is called, `module` the linear or embedding in the
    model, `tensors` the stored ones by suffix; `block` says whether it is a decoder linear."""

    name: str
    module: str
    scheme: LinearScheme
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]
    block: bool

    def read(self) -> dict[str, Tensor]:
        """The stored tensors by suffix; raises InputError when they are not a valid form of the scheme."""
        tensors = {suffix: read_tensor(f"{self.module}.{suffix}", info) for suffix, info in self.tensors.items()}
        try:
            validate(self.scheme, tensors, self.shape)
        except FormatError as error:
            file = next(iter(self.tensors.values())).file
            raise InputError(f"{file}: {self.module}: {error}; the file is damaged or hostile") from None
        return tensors

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The effective weight `[N, K]` in `dtype`; of a large table only some rows exist in fp32 at a time."""
        if self.block or self.scheme.low_rank is not None or not self.scheme.rows_apart:
            return effective_weight(self.scheme, self.read(), self.shape, dtype)
        table, step = Table(self.module, self.shape, self.tensors, self.scheme), max(1, _NUMBERS // self.shape[1])
        starts = range(0, self.shape[0], step)
        return torch.cat([table.read(slice(i, min(i + step, self.shape[0])), dtype) for i in starts])

    def codes(self, sizes: tuple[int, ...]) -> Quantized | None:
        """Dense integer codes `[N, K]` with scales and zero points, where stock engines can store just these.

        That is: integers in whole groups of one of `sizes` dense inputs, and no branch. None otherwise.
        """
        scheme, columns = self.scheme, self.shape[1]
        if scheme.integers is None or scheme.input_major or scheme.low_rank is not None or scheme.group is not None:
            return None
        size, bits = scheme.integers.group_size, scheme.integers.bits
        if size not in sizes or columns % size:
            return None
        tensors = self.read()
        zeros = tensors.get("zeros")
        if scheme.storage == "integers":
            packed = Integers(tensors["codes"], tensors["scales"], zeros)
            return integers.unpack(packed, bits=bits, group_size=size, columns=columns)
        sparse = TwoFourInt4(tensors["codes"], tensors["scales"], zeros, tensors["meta"])
        return two_four_int4.unpack(sparse, group_size=size, columns=columns)[0]


@dataclass(frozen=True)
class Contents:
    """A compressed checkpoint, sorted: its `matrices`, and all other tensors by name, which stay as they are.

    `linears` are the names of all linears of the model, compressed or not, and the head's.
    """

    checkpoint: Checkpoint
    matrices: list[Matrix]
    others: dict[str, TensorInfo]
    linears: list[str]


def lost_selections(contents: Contents) -> list[str]:
    """In words what an export loses of linears that select their inputs; empty without them."""
    count = sum(matrix.scheme.selection is not None for matrix in contents.matrices)
    return [f"{count} linears read all their inputs, without thresholds and branches"] if count else []


def read_contents(path: str | Path) -> Contents:
    """Sort the tensors of a halfweight checkpoint; raises InputError when it is damaged or not compressed."""
    checkpoint = Checkpoint(path)
    artifact = checkpoint.artifact
    if artifact is None:
        raise InputError(f"{path}: is not a halfweight checkpoint (no quantization_config); there is nothing to export")
    model = build_skeleton(checkpoint, torch.float32)
    names = tensor_names(model, checkpoint.tensors)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, CompressedWeight)}
    matrices, claimed = [], set()
    for name, module in modules.items():
        if name.rpartition(".")[0] in modules:
            continue  # half of a low-rank branch
        suffixes = [key for key in module.state_dict(keep_vars=True) if key != "bias"]
        stored = {suffix: names[f"{name}.{suffix}"] for suffix in suffixes}
        claimed |= set(stored.values())
        outer = stored[suffixes[0]].removesuffix(f".{suffixes[0]}")
        tensors = {suffix: checkpoint.info(known) for suffix, known in stored.items()}
        inside = name in artifact.linears and module is not model.get_output_embeddings()
        matrices.append(Matrix(f"{outer}.weight", name, module.scheme, module.shape, tensors, inside))
    for name, scheme in artifact.linears.items():
        if scheme.storage == "dense":  # its pattern has no packed form, so it is stored whole
            known = names[f"{name}.weight"]
            info = checkpoint.info(known)
            claimed.add(known)
            matrices.append(Matrix(known, name, scheme, (info.shape[0], info.shape[1]), {"weight": info}, True))
    others = {name: info for name, info in checkpoint.tensors.items() if name not in claimed}
    linears = [n for n, m in model.named_modules() if is_linear(m) or isinstance(m, TiedHead)]
    return Contents(checkpoint, matrices, others, [n for n in linears if n.rpartition(".")[0] not in modules])
