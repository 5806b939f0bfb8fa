"""Stage 2: all blocks together, on the language-model loss and the dense model's own predictions (as in EfficientQAT's
E2E-QP, Chen et al. 2024, arXiv 2407.11062, with distillation). What is stored as codes and masks stays as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...serving.errors import RunError
from ..blocks import BlockWalker
from ..memory import is_out_of_memory
from ..report import TuningReport
from . import checkpoint
from .config import EndToEndTuning
from .student import Student
from .teacher import LOGITS, Teacher, chunks, divergence, log_probabilities
from .training import Looks, Trainer, batches, look_steps

Say = Callable[[int, int, str], None]  # steps done, of how many, and how it goes

_FEWEST_LOGITS = 2**18


@dataclass(frozen=True)
class Text:
    """Token windows `[T]`, their embeddings in batches `[B, T, D]`, and the teacher's view of them."""

    windows: Sequence[Tensor]
    embedded: Sequence[Tensor]
    teacher: Teacher

    @property
    def numbers(self) -> list[list[int]]:
        """Which windows each batch holds."""
        found: list[list[int]] = []
        for x in self.embedded:
            start = found[-1][-1] + 1 if found else 0
            found.append(list(range(start, start + len(x))))
        return found


@dataclass(frozen=True)
class Resume:
    """Where the training keeps its state: the file, the fingerprint of the run, and the seed of the windows' order."""

    file: Path
    run: str
    seed: int


def tune_end_to_end(
    walker: BlockWalker,
    student: Student,
    train: Text,
    dev: Text,
    settings: EndToEndTuning,
    resume: Resume,
    say: Say,
) -> TuningReport:
    """Train `student` in place; it ends where the dev loss was lowest, the start included.

    Must run inside `walker.vocabulary()`, with single windows learned. The state is saved every `checkpoint_every`
    steps, and training goes on from there. A loss or gradient that is not finite ends it, with a note. Raises RunError
    when one window does not fit in memory.
    """
    work = _Training(walker, student, train, dev, settings, resume)
    begin, first = time.monotonic(), work.trainer.done
    while not work.finished:
        loss = work.step()
        done = work.trainer.done
        left = (time.monotonic() - begin) / max(1, done - first) * (len(work.order) - done)
        gain = f"dev {work.looks.losses[0][1]:.4f} -> {work.looks.best_loss:.4f}"
        say(done, len(work.order), f"loss {loss:.4f}, {gain}, {left:.0f} s left")
    work.trainer.restore(work.looks.best)
    return TuningReport(
        stage="end_to_end",
        name=walker.prefix,
        steps=work.trainer.done,
        tokens=work.tokens,
        start=work.looks.losses[0][1],
        best=work.looks.best_loss,
        best_step=work.looks.best_step,
        losses=work.looks.losses,
        seconds=work.seconds + time.monotonic() - begin,
        note=work.note,
    )


class _Training:
    """A training and its state, resumed when there is something to resume."""

    def __init__(
        self,
        walker: BlockWalker,
        student: Student,
        train: Text,
        dev: Text,
        settings: EndToEndTuning,
        resume: Resume,
    ) -> None:
        self.walker, self.student, self.train, self.dev = walker, student, train, dev
        self.settings, self.resume, self.begin = settings, resume, time.monotonic()
        together = max(1, settings.batch // len(train.embedded[0]))
        self.order = batches(len(train.embedded), together, settings.epochs, resume.seed)
        self.look_at = look_steps(len(self.order), settings.evaluations)
        parameters = student.parameters()
        self.trainer = Trainer(parameters, settings.rates, len(self.order))
        self.looks = Looks()
        self.tokens, self.seconds, self.finished = 0, 0.0, not parameters
        self.note = None if parameters else "there is nothing to train"
        self.logits, self.rows = LOGITS, max(len(x) for x in train.embedded)
        found = checkpoint.load(resume.file, resume.run)
        if found is None:
            self.looks.see(0, self.dev_loss(), self.trainer)
        else:
            self._load(*found)

    def step(self) -> float:
        """One step, with a look at the dev set and a checkpoint when it is time; returns the training loss."""
        items = self.order[self.trainer.done]
        loss = self.gradients(items)
        if not (math.isfinite(loss) and self.trainer.finite()):
            self.note = f"the loss was not finite at step {self.trainer.done + 1}; training ended there"
            self.finished = True
        else:
            self.trainer.apply()
            self.tokens += sum(self.train.embedded[i].shape[:2].numel() for i in items)
            if self.trainer.done in self.look_at:
                self.looks.see(self.trainer.done, self.dev_loss(), self.trainer)
            self.finished = self.trainer.done == len(self.order) or self.looks.exhausted(self.settings.patience)
        if self.finished or self.trainer.done % self.settings.checkpoint_every == 0:
            self._save()
        return loss

    def gradients(self, items: Sequence[int]) -> float:
        """Gather the gradients of the loss on the batches `items`; returns it. Smaller pieces when memory runs out."""
        while True:
            try:
                with torch.enable_grad():
                    return self._gradients(items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._make_smaller()

    def _gradients(self, items: Sequence[int]) -> float:
        numbers = self.train.numbers
        windows = [n for i in items for n in numbers[i]]
        pieces = [piece for i in items for piece in self.train.embedded[i].split(self.rows)]
        streams = self.student.forward(pieces)
        total, grads, taken = 0.0, [], iter(windows)
        for x in streams[-1]:
            grad = torch.empty_like(x)
            for row in range(len(x)):
                loss, grad[row] = self.head(x[row : row + 1], self.train, next(taken), 1 / len(windows))
                total += loss
            grads.append(grad)
        self.student.backward(streams, grads)
        return total

    def head(self, x: Tensor, text: Text, number: int, share: float) -> tuple[float, Tensor]:
        """`share` of the loss of window `number` for the last block's outputs `x` `[1, T, D]`, and its gradient
        `[T, D]`."""
        leaf = x.detach().requires_grad_()
        window = text.windows[number].to(self.walker.device)
        output = self.walker.decoded(leaf, window)
        hidden = output.last_hidden_state
        cut = hidden.detach().requires_grad_()
        output.last_hidden_state = cut
        total = 0.0
        for loss in self._losses(output, text, number):
            part = loss * (share / (len(window) - 1))
            part.backward()
            total += float(part.detach())
        hidden.backward(cut.grad)
        assert leaf.grad is not None
        return total, leaf.grad[0]

    def _losses(self, output: Any, text: Text, number: int) -> Any:
        """Summed loss of window `number`, a piece of its positions at a time."""
        window = text.windows[number].to(self.walker.device)
        values, tokens = text.teacher.window(number)
        for keep in chunks(self.walker, len(window) - 1, self.logits):
            logits = self.walker.logits(output, window, keep)
            said = log_probabilities(logits, torch.cat([tokens[keep], window[keep + 1, None]], 1))
            apart = divergence(said[:, :-1], values[keep]).sum()
            yield self.settings.distill * apart - (1 - self.settings.distill) * said[:, -1].sum()

    @torch.no_grad()
    def dev_loss(self) -> float:
        """The loss on the dev set, per token."""
        outputs = self.student.outputs(list(self.dev.embedded))
        rows = (row[None] for x in outputs for row in x)
        total, tokens = 0.0, 0
        for number, (x, window) in enumerate(zip(rows, self.dev.windows, strict=True)):
            output = self.walker.decoded(x, window)
            total += sum(float(loss) for loss in self._losses(output, self.dev, number))
            tokens += len(window) - 1
        return total / tokens

    def _make_smaller(self) -> None:
        """After an allocation failed: fewer logits and windows at once, or RunError when there is nothing left."""
        for parameter in self.trainer.parameters.values():
            parameter.grad = None
        length = self.train.embedded[0].shape[1]
        if self.rows == 1 and self.logits <= _FEWEST_LOGITS:
            raise RunError(
                f"end-to-end tuning on one window of {length} tokens does not fit in memory; use a smaller --seqlen,"
                " or a device with more memory (finished blocks are kept, the same command resumes)"
            )
        self.rows, self.logits = 1, max(_FEWEST_LOGITS, self.logits // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save(self) -> None:
        tensors = self.trainer.state() | {f"best/{name}": tensor for name, tensor in self.looks.best.items()}
        facts = {
            "done": self.trainer.done,
            "tokens": self.tokens,
            "seconds": self.seconds + time.monotonic() - self.begin,
            "losses": self.looks.losses,
            "best_step": self.looks.best_step,
            "best_loss": self.looks.best_loss,
            "finished": self.finished,
            "note": self.note,
        }
        checkpoint.save(self.resume.file, self.resume.run, tensors, facts)

    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.trainer.load(tensors, facts["done"])
        best = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
        losses = [(int(step), float(loss)) for step, loss in facts["losses"]]
        self.looks = Looks(losses, best, facts["best_step"], facts["best_loss"])
        self.tokens, self.seconds = facts["tokens"], facts["seconds"]
        self.finished, self.note = facts["finished"], facts["note"]
