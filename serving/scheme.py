"""What is stored for one linear, and the `quantization_config` that a checkpoint carries in its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..triton_kernels.formats import two_four
from .errors import InputError

QUANT_METHOD: Final = "halfweight"
FORMAT_VERSION = 1

# Projections that inference servers fuse into one matmul: they must share one scheme.
FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_NM = re.compile(r"(\d+):(\d+)")


def parse_nm(pattern: str) -> tuple[int, int] | None:
    """`(N, M)` of a pattern such as `"2:4"`, or None when `pattern` is not N:M. Raises ValueError unless 0 < N < M."""
    match = _NM.fullmatch(pattern)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"pattern {pattern!r} keeps {n} of every {m} weights; it needs 0 < N < M")
    return n, m


def _known_pattern(value: str) -> str:
    if value != "unstructured" and parse_nm(value) is None:
        raise ValueError(f"unknown pattern {value!r}; use N:M such as 2:4, or unstructured")
    return value


Pattern = Annotated[str, AfterValidator(_known_pattern)]


class LinearScheme(BaseModel):
    """How one linear `[N, K]` is compressed: one row of the table in docs/architecture.md.

    `pattern` is `"N:M"` (N kept in every M consecutive inputs) or `"unstructured"`; `density` is the kept fraction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Pattern
    density: float = Field(gt=0, le=1)

    @property
    def storage(self) -> Literal["two_four", "dense"]:
        """`two_four` where the packed format exists; every other pattern is stored as a dense matrix with zeros."""
        return "two_four" if self.pattern == "2:4" else "dense"

    def tensor_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Stored tensors (without the bias) for a dense weight of `shape` `[N, K]`, by suffix of the module's name."""
        return two_four.packed_shapes(shape) if self.storage == "two_four" else {"weight": shape}

    def stored_bits(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bits that the weight of dense `shape` `[N, K]` takes on disk, metadata and padding included."""
        widths = {"meta": 8}
        return sum(prod(s) * widths.get(n, dtype.itemsize * 8) for n, s in self.tensor_shapes(shape).items())


class ArtifactConfig(BaseModel):
    """`quantization_config` of a halfweight checkpoint: plain JSON, one scheme per compressed linear."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["halfweight"] = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    linears: dict[str, LinearScheme]

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> ArtifactConfig:
        """Validate the dictionary read from `where`; raises InputError with one line naming the first thing wrong."""
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise InputError(
                f"{where}: format_version {version!r} is not supported (this halfweight reads {FORMAT_VERSION});"
                " use a matching halfweight release"
            )
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where}: quantization_config.{path}: {first['msg']}") from None
