"""What a compression run tells its user, as data: `report.json` and the CLI's tables come from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from .search.config import Search


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` steps of `stage`, and a `detail` such as the layer just solved."""

    stage: str
    done: int
    total: int
    detail: str = ""


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The progress callback of callers that do not want one."""


class LayerReport(BaseModel):
    """One compressed linear `[N, K]`. `numbers` says how its weights are stored; `error` is
    ||y' - x W^T||^2 / ||x W^T||^2 of its outputs y' on held-out inputs x of the compressed model. `stats` are the
    solver's own numbers, such as the damping it needed, or the same error on the calibration inputs at its steps
    (`error_...`); and of a linear that selects, its `sparsity` and `channels`, and the share of inputs read on the dev
    set beside the one aimed at."""

    name: str
    shape: tuple[int, int]
    method: str
    pattern: str
    numbers: str
    density: float
    error: float
    stats: dict[str, float]

    @property
    def errors(self) -> str:
        """The output errors, for a progress line."""
        text, pruned = f"error {self.error:.4f}", self.stats.get("error_pruned")
        if pruned is None:
            return text
        return f"{text} (on calibration inputs {pruned:.4f} pruned, {self.stats['error']:.4f} as {self.numbers})"


class TableReport(BaseModel):
    """A quantized embedding or head `[vocabulary, hidden]`; `error` is ||W' - W||^2 / ||W||^2 over all its weights."""

    name: str
    shape: tuple[int, int]
    numbers: str
    error: float


class TuningReport(BaseModel):
    """One stretch of training, of the block `name` or of the whole model. `tokens` were trained on, repeats included;
    `losses` are (step, dev loss) from the start on, of which `best_step` was kept; `note` says what went wrong, if
    something did."""

    stage: Literal["block", "end_to_end"]
    name: str
    steps: int
    tokens: int
    start: float
    best: float
    best_step: int
    losses: list[tuple[int, float]]
    seconds: float
    note: str | None = None


class SearchTrial(BaseModel):
    """One trial of a search, `objective` lower is better: the `point` that was tried, what it means for each group of
    blocks (mean `sparsity` by bytes, mean `channels`), and in words how it compares with the first trial."""

    objective: float
    detail: str
    point: list[float]
    sparsity: list[float]
    channels: list[float]
    seconds: float


class SearchReport(BaseModel):
    """A search by `settings`: the blocks of its `groups`, and the number of the trial that was `chosen`."""

    settings: Search
    groups: list[list[int]]
    chosen: int


class DevPerplexity(BaseModel):
    """Dense and compressed perplexity on the dev set, the last 10 % of the calibration text; where a prompt chooses the
    inputs, both of what follows the first quarter of each window, which is the prompt."""

    dense: float
    compressed: float
    tokens: int
    windows: int
    seqlen: int


class Verification(BaseModel):
    """The written artifact, reloaded and run on the dev set: relative RMS difference from the run's own outputs."""

    relative_difference: float
    tolerance: float


class Provenance(BaseModel):
    """What a run was made from, as SHA-256: the `model`'s files by name, the calibration `text` (None where the model
    wrote it), and halfweight's own source `code`; and torch's number of `threads`, which sums depend on. The recipe is
    in the folder, and `SHA256SUMS` has the hash of everything that was written."""

    model: dict[str, str]
    text: str | None
    code: str
    threads: int


class CompressionReport(BaseModel):
    """The result of `compress_checkpoint`; `layers` are as the passes left them, before `tuning`; `search` are the
    trials of a search, in order. `seconds` is wall
    time and `peak_rss_gb` the peak resident memory of the process (10^9 bytes); bits are defined in
    `serving/inspect.py`; `windows_sha256` is of the calibration tokens. Of several `processes` the peak is the largest
    one's, `windows_by_process` counts the calibration windows that each of them held."""

    model: str
    note: str | None
    recipe: str
    out: str
    seconds: float
    peak_rss_gb: float
    blocks: int
    blocks_resumed: int
    effective_bits: float
    effective_bits_model: float
    linear_bytes_ratio: float | None
    bytes: int
    calibration_data: str
    calibration_tokens: int
    windows_sha256: str
    seed: int
    dtype: str
    device: str
    dev: DevPerplexity
    verification: Verification
    layers: list[LayerReport]
    tables: list[TableReport]
    tuning: list[TuningReport] = []
    searched: SearchReport | None = None
    search: list[SearchTrial] = []
    versions: dict[str, str]
    provenance: Provenance | None = None
    processes: int = 1
    windows_by_process: list[int] = []
