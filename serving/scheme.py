"""What is stored for one linear, and the `quantization_config` that a checkpoint carries in its config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..triton_kernels.formats import groups
from .errors import InputError

QUANT_METHOD: Final = "halfweight"
FORMAT_VERSION = 1

# Projections that inference servers fuse into one matmul: they must share one scheme.
FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

MOST = 1 << 20  # inputs, outputs or ranks that a config may speak of, so that no size made of them overflows

_NM = re.compile(r"(\d+):(\d+)")
_GROUP = re.compile(r"1x(\d+)")
_OUTPUT_GROUP = re.compile(r"(\d+)x1")


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The linears `names` by the input they share, as far as servers fuse them: most are alone."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, tail = name.rpartition(".")
        groups.setdefault((parent, next((group for group in FUSED if tail in group), tail)), []).append(name)
    return list(groups.values())


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


def parse_group(pattern: str) -> int | None:
    """G of a pattern such as `"1x16"`, or None when `pattern` is not 1xG. Raises ValueError for an unsupported G."""
    match = _GROUP.fullmatch(pattern)
    if match is None:
        return None
    if int(match[1]) not in groups.SIZES:
        raise ValueError(f"pattern {pattern!r}: groups have {', '.join(map(str, groups.SIZES))} inputs")
    return int(match[1])


def parse_output_group(pattern: str) -> int | None:
    """G of a pattern such as `"16x1"`, or None when `pattern` is not Gx1. Raises ValueError for an unsupported G."""
    match = _OUTPUT_GROUP.fullmatch(pattern)
    if match is None:
        return None
    if int(match[1]) not in groups.SIZES:
        raise ValueError(f"pattern {pattern!r}: groups have {', '.join(map(str, groups.SIZES))} outputs")
    return int(match[1])


def _scheme_pattern(value: str) -> str:
    grouped = parse_group(value) is not None or parse_output_group(value) is not None
    return value if value == "dense" or grouped else _known_pattern(value)


class IntegerScheme(BaseModel):
    """Weights as integer codes with one fp16 scale, and when asymmetric one zero point, per group of inputs of a row.

    With `along: outputs` a group is of outputs of one input instead. `group_size` counts dense weights; a last group
    may be shorter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[4, 8] = 4
    group_size: int = Field(ge=2, le=MOST, multiple_of=2)
    symmetric: bool = False
    along: Literal["inputs", "outputs"] = "inputs"

    @property
    def dense(self) -> LinearScheme:
        """The scheme of a matrix without zeros of its own that is stored so."""
        return LinearScheme(pattern="dense", density=1.0, integers=self)


class LowRankScheme(BaseModel):
    """A branch beside a linear `[N, K]`: outputs gain `(x @ V) @ U^T`, with `V` `[K, rank]` and `U` `[N, rank]`.

    Both are in the model's dtype, or as `integers`: V^T in groups along K, U in groups along the rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, le=MOST)
    integers: IntegerScheme | None = None

    @property
    def parts(self) -> tuple[LinearScheme, LinearScheme] | None:
        """With integers, the schemes of the linears `[rank, K]` and `[N, rank]` that make the branch."""
        if self.integers is None:
            return None
        size = min(self.integers.group_size, self.rank + self.rank % 2)
        return self.integers.dense, self.integers.model_copy(update={"group_size": size}).dense

    def __str__(self) -> str:
        return f"rank {self.rank}{'' if self.integers is None else f' int{self.integers.bits}'}"


class SelectionScheme(BaseModel):
    """Which inputs of a token a linear reads: where `|x| > threshold`, or with `norms` where `|x| * norm > threshold`.

    `norms` are one number per input. `threshold: fixed` is one per linear; `topk` is each token's own, so that it reads
    as many inputs as any other: a count per linear. With `prompt` a prompt's tokens read everything, and those after
    it as many inputs as the count says, those that most of the prompt's tokens would choose (see `core_inputs.py`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    norms: bool = False
    threshold: Literal["fixed", "topk", "prompt"] = "fixed"

    def __str__(self) -> str:
        inputs = "inputs by |x| norm" if self.norms else "inputs by |x|"
        return {"fixed": inputs, "topk": f"top {inputs}", "prompt": f"core {inputs}"}[self.threshold]


Storage = Literal[
    "dense",
    "two_four",
    "integers",
    "two_four_int4",
    "groups",
    "groups_layer",
    "transposed",
    "transposed_integers",
    "transposed_groups",
]


# Storage -> folder of kernels in triton_kernels.
_OPS: dict[str, str] = {
    "two_four": "two_four",
    "two_four_int4": "two_four_int4",
    "integers": "int4",
    "groups": "group_int4",
    "groups_layer": "group_int4",
    "transposed": "input_select",
    "transposed_integers": "input_select_int4",
    "transposed_groups": "input_select_int4",
}


class LinearScheme(BaseModel):
    """How one linear `[N, K]` is compressed: one row of the table in docs/architecture.md.

    `pattern` is `dense`, `"N:M"` (N kept in every M consecutive inputs), `"1xG"` (groups of G consecutive inputs of a
    row, kept or dropped whole), `"Gx1"` (groups of G consecutive outputs of an input) or `unstructured`; `density` is
    the kept fraction. `integers` says how kept weights are stored; without it they keep the model's 16 bits. Groups are
    always int4 and also say how many are `kept` (per row, or per input, or with `balance: layer` in the whole matrix)
    and into how many `segments` tensor parallelism may cut a row.

    `selection` lets every token choose the inputs it reads; the weight is then stored input by input, and integers run
    along the outputs. `low_rank` adds a branch to a pattern that has a packed form; beside a `selection` the branch
    takes the inputs that are not read, and only those.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Annotated[str, AfterValidator(_scheme_pattern)]
    density: float = Field(gt=0, le=1)
    integers: IntegerScheme | None = None
    kept: int | None = Field(default=None, ge=0, le=MOST**2)
    segments: Literal[1, 2, 4, 8] = 1
    balance: Literal["row", "layer"] = "row"
    low_rank: LowRankScheme | None = None
    selection: SelectionScheme | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LinearScheme:
        if self.low_rank is not None and self.storage == "dense":
            raise ValueError(f"pattern {self.pattern} is stored whole, where a low-rank branch would gain nothing")
        self._require_one_direction()
        if self.group is None:
            if self.kept is not None or self.segments != 1 or self.balance != "row":
                raise ValueError(f"pattern {self.pattern} has no kept groups, segments or balance")
        elif self.kept is None or self.integers is None or self.integers.bits != 4:
            raise ValueError(f"pattern {self.pattern} needs int4 integers and the number of kept groups")
        elif self.integers.group_size != self.group:
            raise ValueError(f"pattern {self.pattern} needs integers with group_size {self.group}")
        elif self.balance == "layer" and self.segments != 1:
            raise ValueError("balance: layer has no segments")
        elif self.input_major and (self.balance == "layer" or self.segments != 1):
            raise ValueError(f"pattern {self.pattern} has neither segments nor balance: layer")
        return self

    def _require_one_direction(self) -> None:
        """Selection, groups and integers of one weight run along the same axis."""
        along = None if self.integers is None else self.integers.along
        if parse_output_group(self.pattern) is not None and along == "inputs":
            raise ValueError(f"pattern {self.pattern} needs integers along outputs")
        if parse_group(self.pattern) is not None and self.input_major:
            raise ValueError(f"pattern {self.pattern} groups inputs; along outputs it is {self.group}x1")
        if self.selection is not None and along == "inputs":
            raise ValueError("a selection needs integers along outputs")
        if self.selection is not None and self.low_rank is not None and self.low_rank.integers is not None:
            raise ValueError("the branch beside a selection is 16-bit; remove its integers")

    @property
    def group(self) -> int | None:
        """G of pattern `1xG` or `Gx1`, else None."""
        return parse_group(self.pattern) or parse_output_group(self.pattern)

    @property
    def input_major(self) -> bool:
        """Whether the weight is stored as W^T `[K, N]`, so that an input that is not read costs nothing."""
        return self.selection is not None or (self.integers is not None and self.integers.along == "outputs")

    @property
    def prompt_static(self) -> bool:
        """Whether the inputs that are read are chosen once for all tokens after a prompt, by the prompt."""
        return self.selection is not None and self.selection.threshold == "prompt"

    @property
    def rows_apart(self) -> bool:
        """Whether every stored tensor of the weight has one row per output."""
        return not self.input_major and self.balance == "row"

    @property
    def added_branch(self) -> LowRankScheme | None:
        """The branch whose outputs are added for all inputs; one that takes the unread inputs is part of the weight."""
        return self.low_rank if self.selection is None else None

    @property
    def storage(self) -> Storage:
        """The stored form. Patterns without a packed form of their own are stored whole, with exact zeros."""
        if self.input_major:
            if self.integers is None:
                return "transposed"
            return "transposed_integers" if self.group is None else "transposed_groups"
        if self.group is not None:
            return "groups" if self.balance == "row" else "groups_layer"
        if self.integers is None:
            return "two_four" if self.pattern == "2:4" else "dense"
        packed = self.pattern == "2:4" and self.integers.bits == 4 and self.integers.group_size % 4 == 0
        return "two_four_int4" if packed else "integers"

    @property
    def op(self) -> str:
        """The folder of kernels in triton_kernels that runs this storage; raises KeyError for `dense`."""
        return _OPS[self.storage]

    @property
    def numbers(self) -> str:
        """How the kept weights are stored, in words: `int4 g64`, or `16-bit`; and what stands beside them."""
        if self.integers is None:
            return f"16-bit{self.extras}"
        kind = " sym" if self.integers.symmetric else ""
        along = " along outputs" if self.integers.along == "outputs" else ""
        return f"int{self.integers.bits} g{self.integers.group_size}{kind}{along}{self.extras}"

    @property
    def extras(self) -> str:
        """In words what is beside the weight: `, inputs by |x|`, ` + rank 16`; empty where there is nothing."""
        selected = "" if self.selection is None else f", {self.selection}"
        return selected + ("" if self.low_rank is None else f" + {self.low_rank}")


class ArtifactConfig(BaseModel):
    """`quantization_config` of a halfweight checkpoint: plain JSON, one scheme per compressed linear.

    `embedding` says how the input embedding's rows are stored, as integers in groups along the hidden size; a head tied
    to it reads the same tensors. A head of its own is one of `linears`. With `prefill: dense`, linears that select
    their inputs read all of them whenever a sequence brings more than one token.
    """

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["halfweight"] = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    linears: dict[str, LinearScheme]
    embedding: IntegerScheme | None = None
    prefill: Literal["masked", "dense"] = "masked"

    @field_validator("embedding")
    @classmethod
    def _rows(cls, value: IntegerScheme | None) -> IntegerScheme | None:
        if value is not None and value.along != "inputs":
            raise ValueError("the rows of an embedding are integers along inputs")
        return value

    @property
    def prompt_static(self) -> bool:
        """Whether what some linear reads depends on where a prompt ends."""
        return any(scheme.prompt_static for scheme in self.linears.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for config.json: schemes without the settings that do not apply to them."""
        linears = {name: scheme.model_dump(exclude_defaults=True) for name, scheme in self.linears.items()}
        data = {"quant_method": self.quant_method, "format_version": self.format_version, "linears": linears}
        if self.prefill != "masked":
            data["prefill"] = self.prefill
        return data if self.embedding is None else {**data, "embedding": self.embedding.model_dump(exclude={"along"})}

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
