"""What tuning will need and take, from shapes alone.

Bytes are counted per weight of what `weights.py`, `student.py` and AdamW hold at once; activations are those that a
block saves for its backward pass. `device` is the memory of whatever computes; on a CPU it is the host's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..passes import StageConfig
from ..passes.base import IntegerSettings
from .config import BlockTuning, EndToEndTuning, Part, TrainingSettings
from .teacher import LOGITS

Shapes = Mapping[str, tuple[int, int]]

# A trained number: itself, its gradient, AdamW's two moments.
_TRAINED = 4 * 4
# An expanded weight: fp32, its gradient, what autograd saves of the rounding (two arrays and two masks).
_EXPANDED = 4 * 4 + 2
_SAVED = 2  # inputs and outputs of linears are both saved, and once more in between
_NORMED = 10 * 4  # fp32 copies that a block's norms and residuals save per hidden number
_LOGIT_BYTES = 3 * 4 * LOGITS  # logits and their gradient in fp32, and both in 16 bits
_PASSES = 40  # times that a weight's fp32 bytes are moved per step of training, for rounding and AdamW
BASE = 2e9  # a process with torch and transformers in it


@dataclass(frozen=True)
class Workload:
    """The model and the text: linears of each block, hidden size, vocabulary, bytes of a computed number; windows
    trained on and held out, and their length; bytes of all packed linears; whether activations are in files while
    blocks are at work."""

    blocks: list[Shapes]
    stages: Mapping[str, StageConfig]
    hidden: int
    vocabulary: int
    itemsize: int
    windows: int
    dev: int
    length: int
    packed: float
    spill: bool = False

    @property
    def tokens(self) -> int:
        """Tokens trained on, once."""
        return self.windows * self.length

    @property
    def item(self) -> int:
        """Tokens of a forward pass."""
        return max(self.length, min(1024, self.tokens))

    def weights(self, block: Shapes) -> int:
        """Weights of a block's linears."""
        return sum(n * k for n, k in block.values())


@dataclass(frozen=True)
class Cost:
    """Bytes on the computing device, in host memory beside a GPU, and on disk (beyond the checkpoint itself); tokens
    trained on, matmul operations, and bytes moved in memory."""

    device: float
    host: float
    disk: float
    tokens: int
    operations: float
    moved: float


def block_cost(work: Workload, settings: BlockTuning) -> Cost:
    """Stage 1."""
    largest = max(work.blocks, key=work.weights)
    weights, total = work.weights(largest), sum(work.weights(block) for block in work.blocks)
    trained = sum(numbers(work, name, shape, settings.train) for name, shape in largest.items())
    held = max(settings.batch * work.length, work.item) if work.spill else work.tokens + work.dev * work.length
    streams = 2 * held * work.hidden * work.itemsize
    device = streams + 2 * weights * work.itemsize + _TRAINED * trained + _EXPANDED * weights + _block(work, largest)
    looks = settings.evaluations * work.dev * work.length
    steps = _steps(work, settings)
    return Cost(
        device=device,
        host=BASE + 2 * weights * work.itemsize + 4 * trained,  # a block on its way, and the best parameters
        disk=0.0,
        tokens=work.tokens * settings.epochs,
        operations=2.0 * total * (work.tokens * (2 + 3 * settings.epochs) + looks),
        moved=4.0 * total * _PASSES * steps,
    )


def end_to_end_cost(work: Workload, settings: EndToEndTuning) -> Cost:
    """Stage 2."""
    everything = {name: shape for block in work.blocks for name, shape in block.items()}
    largest = max(work.blocks, key=work.weights)
    total = work.weights(everything)
    trained = sum(numbers(work, name, shape, settings.train, frozen=True) for name, shape in everything.items())
    stored = sum(held(work, name, shape, settings.train) for name, shape in everything.items())
    head = work.vocabulary * work.hidden * work.itemsize
    per_step = max(work.item, settings.batch * work.length) * work.hidden * work.itemsize * (len(work.blocks) + 3)
    embedded = (work.tokens + work.dev * work.length) * work.hidden * work.itemsize
    expanded = (_EXPANDED + work.itemsize) * work.weights(largest)
    device = stored + _TRAINED * trained + head + per_step + embedded + expanded + _block(work, largest) + _LOGIT_BYTES
    remembered = 6.0 * (work.windows + work.dev) * work.length * settings.top_k
    checkpoint = 4.0 * 4 * trained  # parameters, two moments, the best parameters
    looks = (settings.evaluations + 1) * work.dev * work.length
    seen = work.tokens * settings.epochs
    head_operations = 2.0 * work.vocabulary * work.hidden * (3 * seen + looks + work.tokens)
    return Cost(
        device=device,
        host=BASE + max(remembered, checkpoint + 4 * trained),
        disk=work.packed + remembered + 2 * checkpoint,
        tokens=seen,
        operations=2.0 * total * (4 * seen + looks) + head_operations,
        moved=4.0 * (4 * total + 6 * trained) * _steps(work, settings),
    )


def _steps(work: Workload, settings: TrainingSettings) -> int:
    together = max(settings.batch * work.length, work.item)
    return settings.epochs * -(-work.tokens // together)


def _block(work: Workload, block: Shapes) -> float:
    """Bytes that one block's backward pass over one forward pass's tokens needs saved."""
    linears = sum(n + k for n, k in block.values()) * work.itemsize * _SAVED
    return float(work.item * (linears + _NORMED * work.hidden))


def numbers(work: Workload, name: str, shape: tuple[int, int], train: tuple[Part, ...], frozen: bool = False) -> float:
    """How many numbers of a linear are trained; with `frozen`, integer codes are not."""
    stage = work.stages.get(name)
    if stage is None:
        return 0.0
    (n, k), found = shape, 0.0
    if isinstance(stage, IntegerSettings):
        groups = n * -(-k // stage.group_size)
        found += n * k if "weights" in train and not frozen else 0
        found += groups * (("scales" in train) + ("zeros" in train and not stage.symmetric))
    elif "weights" in train:
        found += n * k
    branch = None if stage.low_rank is None else stage.low_rank.scheme(shape)
    return found + (branch.rank * (n + k) if branch is not None and "branch" in train else 0)


def held(work: Workload, name: str, shape: tuple[int, int], train: tuple[Part, ...]) -> float:
    """Bytes that a linear's stored form keeps on the device while the whole model is trained."""
    stage, (n, k) = work.stages.get(name), shape
    if stage is None or not isinstance(stage, IntegerSettings):
        masked = stage is not None and "weights" in train
        return n * k * (1.0 if masked else work.itemsize)
    masked = "zeros" in train and not stage.symmetric and stage.weight_scheme(shape).pattern != "dense"
    codes = (2 if stage.bits == 8 else 1) + masked
    return n * k * codes + 3.0 * n * -(-k // stage.group_size)  # fp16 scales and zero points
