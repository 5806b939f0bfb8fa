"""What the page says about artifacts and rivals, read from the files that runs leave, all of them checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...serving.checkpoint import read_json
from ...serving.durable import sha256_of
from ...serving.errors import InputError
from ...serving.inspect import Inspection, inspect_checkpoint
from ..speed import Speed

BENCH = "bench.json"

Model = TypeVar("Model", bound=BaseModel)


class _File(BaseModel):
    """Files of other releases may say more; what is needed must be there and of its type."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Layer(_File):
    """A compressed linear in report.json."""

    name: str
    method: str
    pattern: str
    numbers: str
    density: float
    error: float
    stats: dict[str, float | None] = {}  # what is no number is null in JSON


class Dev(_File):
    """Perplexities on the dev set in report.json."""

    dense: float = Field(gt=0)
    compressed: float = Field(gt=0)
    tokens: int
    windows: int
    seqlen: int


class Check(_File):
    """The reloaded artifact's outputs against the run's own, in report.json."""

    relative_difference: float
    tolerance: float


class SearchStep(_File):
    """One step of a search in report.json: the objective it reached, in words what it tried, and of each group of
    blocks the mean sparsity and channels."""

    objective: float
    detail: str = ""
    sparsity: list[float] = []
    channels: list[float] = []


class Settings(_File, extra="allow"):
    """What a search in report.json was asked for."""

    method: str
    objective: str
    samples: int
    seqlen: int


class Searched(_File):
    """About a search in report.json: the blocks of its groups, and the step that was chosen."""

    settings: Settings
    groups: list[list[int]]
    chosen: int = Field(ge=0)


class Origin(_File):
    """What a run was made with."""

    threads: int


class Run(_File):
    """report.json."""

    model: str
    note: str | None = None
    recipe: str
    seconds: float
    blocks_resumed: int = 0
    peak_rss_gb: float
    effective_bits: float
    effective_bits_model: float
    linear_bytes_ratio: float | None = None
    bytes: int
    calibration_data: str
    calibration_tokens: int
    windows_sha256: str
    seed: int
    dtype: str
    device: str
    dev: Dev
    verification: Check
    layers: list[Layer]
    versions: dict[str, str]
    searched: Searched | None = None
    search: list[SearchStep] = []
    provenance: Origin | None = None


class Scored(_File):
    """A result of `halfweight eval --json`."""

    model: str
    text: str
    perplexity: float = Field(gt=0)
    standard_error: float | None = None
    tokens: int
    seqlen: int
    bits_read: float | None = None
    prompt_tokens: int | None = None


class RivalRow(_File):
    """One line of a comparison: a tool's method on a model. Without `linear_bytes_ratio` or `bits` its linears are
    taken as stored at 16 bits."""

    model: str
    tool: str
    method: str = "-"
    perplexity: float = Field(gt=0)
    seconds: float | None = None
    peak_gb: float | None = None
    linear_bytes_ratio: float | None = None
    bits: float | None = None

    @property
    def stored_bits(self) -> float:
        if self.bits is not None:
            return self.bits
        return 16.0 if self.linear_bytes_ratio is None else 16.0 * self.linear_bytes_ratio

    @property
    def label(self) -> str:
        return self.tool if self.method == "-" else f"{self.tool} {self.method}"


class Rivals(_File):
    """A comparison, such as scripts/compare_llmcompressor.py writes as compare.json."""

    rows: list[RivalRow] = Field(min_length=1)
    protocol: dict[str, Any] = {}


class Artifact(BaseModel):
    """One artifact folder: its report, its recipe as written, what its tensors hold, and a benchmark if there is one.

    `sha256` are of its files by name.
    """

    folder: str
    run: Run
    recipe: str
    inspection: Inspection
    speed: Speed | None
    sha256: dict[str, str]

    @property
    def name(self) -> str:
        return Path(self.folder).name


def read_artifact(folder: Path, bench: Path | None = None, hashes: bool = True) -> Artifact:
    """Everything about the artifact in `folder`; `bench` defaults to its bench.json, where it has one.

    Raises InputError, one line, when the folder is no finished artifact or a file is damaged. `hashes` are of all of
    its files and take as long as reading them.
    """
    report = folder / "report.json"
    if not report.is_file():
        raise InputError(f"{folder}: no report.json; the page is about a folder that `halfweight compress` finished")
    bench = bench or (folder / BENCH if (folder / BENCH).is_file() else None)
    recipe = folder / "recipe.yaml"
    try:
        recipe_text = recipe.read_text(encoding="utf-8")
        yaml.safe_load(recipe_text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{recipe}: not a readable recipe ({' '.join(str(error).split())})") from None
    return Artifact(
        folder=str(folder),
        run=parse(Run, report),
        recipe=recipe_text,
        inspection=inspect_checkpoint(folder),
        speed=None if bench is None else parse(Speed, bench),
        sha256={file.name: sha256_of(file) for file in _own_files(folder)} if hashes else {},
    )


def parse(kind: type[Model], file: Path) -> Model:
    """The JSON in `file` as `kind`; raises InputError naming the file and the first thing wrong."""
    try:
        return kind.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {path}: {first['msg']}; is this a {kind.__name__.lower()} file?") from None


def comparable(a: Run, b: Run) -> bool:
    """Whether two runs measured their dev perplexity on the same model and text."""

    def key(run: Run) -> tuple[Any, ...]:
        return run.model, run.calibration_data, run.dev.tokens, run.dev.seqlen

    return key(a) == key(b)


def by_block(names: list[str]) -> tuple[list[str], int, Callable[[str], tuple[int, int] | None]]:
    """The kinds of linears in a decoder's names, the number of its blocks, and where a name belongs: (kind, block).

    The block number is the first part of a name that is a number; names without one belong nowhere.
    """
    split: dict[str, tuple[str, int]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None and number + 1 < len(parts):
            split[name] = (".".join(parts[number + 1 :]), int(parts[number]))
    kinds = list(dict.fromkeys(kind for kind, _ in split.values()))
    blocks = max((block for _, block in split.values()), default=-1) + 1

    def place(name: str) -> tuple[int, int] | None:
        return (kinds.index(split[name][0]), split[name][1]) if name in split else None

    return kinds, blocks, place


def _own_files(folder: Path) -> list[Path]:
    """The files that make the artifact: weights, config, recipe."""
    named = [folder / "config.json", folder / "recipe.yaml"]
    return [*sorted(folder.glob("*.safetensors")), *(file for file in named if file.is_file())]
