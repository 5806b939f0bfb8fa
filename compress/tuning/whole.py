"""Stage 2 in a run: teacher, student, training, and the parts that take the place of the blocks' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...serving.checkpoint import TensorInfo
from ...serving.tables import Table
from .. import writer
from ..blocks import BlockWalker
from ..calibration import Windows
from ..journal import Journal
from ..memory import release_memory
from ..passes import StageConfig
from ..report import TuningReport
from . import checkpoint, teacher
from .config import EndToEndTuning
from .end_to_end import Resume, Say, Text, tune_end_to_end
from .student import Student, StudentBlock


@dataclass(frozen=True)
class Job:
    """What stage 2 of a run works on: `blocks` are the names of the blocks' finished parts, `embedding` and `head` the
    tables that stand in for the checkpoint's own (None: they do not), `run` the run's fingerprint."""

    walker: BlockWalker
    stages: Mapping[str, StageConfig]
    settings: EndToEndTuning
    windows: Windows
    journal: Journal
    tensors: Mapping[str, TensorInfo]
    blocks: list[str]
    embedding: Table | None
    head: Table | None
    run: str
    seed: int


@dataclass(frozen=True)
class Tuned:
    """The names of the parts to store instead of the blocks', the dev outputs of the trained model, and a report."""

    parts: list[str]
    dev: list[Tensor]
    report: TuningReport


def remember_teacher(job: Job, dense: Iterable[Tensor], dev_dense: Iterable[Tensor], say: Say) -> None:
    """Keep the dense model's predictions on disk, from its last block's outputs, unless they are there already."""
    if job.journal.done(teacher.PART) is None:
        say(0, 1, "the dense model's predictions")
        texts = {"train": (dense, job.windows.all), "dev": (dev_dense, job.windows.dev)}
        teacher.write_teacher(job.walker, texts, job.settings.top_k, job.journal.folder / teacher.PART)
        job.journal.record(teacher.PART)


def tune_whole(job: Job, say: Say) -> Tuned:
    """Train the whole model, or go on with that, and write its blocks anew; `remember_teacher` has been called."""
    walker, folder = job.walker, job.journal.folder
    names = [f"tuned-{name}" for name in job.blocks]
    finished = job.journal.done(names[-1])
    source = job.blocks if finished is None else names
    student = Student(
        [
            StudentBlock(walker, i, job.stages, writer.read_part(folder / part), job.tensors, job.settings.train)
            for i, part in enumerate(source)
        ]
    )
    release_memory()
    dev = walker.embed(job.windows.dev, job.embedding)
    if finished is None:
        report = _train(job, student, dev, say)
        for block, before, name in zip(student.blocks, job.blocks, names, strict=True):
            if job.journal.done(name) is None:
                fields = {"tuning": [report.model_dump()]} if name == names[-1] else {}
                job.journal.store(name, block.stored(writer.read_part(folder / before)), **fields)
        (folder / checkpoint.FILE).unlink(missing_ok=True)
    else:
        report = TuningReport.model_validate(finished["tuning"][0])
    return Tuned(names, student.outputs(dev), report)


def _train(job: Job, student: Student, dev: list[Tensor], say: Say) -> TuningReport:
    walker, windows = job.walker, job.windows
    embedded = [x for part in (windows.calibration, windows.tuning) if part for x in walker.embed(part, job.embedding)]
    walker.learn(1, len(windows.all[0]))  # in case that memory is short
    file = job.journal.folder / teacher.PART
    train, held_out = (teacher.Teacher(file, text, walker.device) for text in ("train", "dev"))
    with walker.vocabulary(job.head):
        return tune_end_to_end(
            walker,
            student,
            Text(windows.all, embedded, train),
            Text(windows.dev, dev, held_out),
            job.settings,
            Resume(job.journal.folder / checkpoint.FILE, job.run, job.seed),
            say,
        )
