"""What a task evaluation leaves behind: typed results read from lm-eval's own JSON, one document at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel

from ..serving.checkpoint import read_json
from .metrics import calibration_error, choice_confidence


class Metric(BaseModel):
    """One of a task's metrics. `standard_error` as lm-eval computes it (None where it has no formula)."""

    name: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None


class ChoiceCalibration(BaseModel):
    """How sure a model is of its multiple-choice answers: softmax over the options' log-likelihoods, and the expected
    calibration error over 15 bins (see `metrics.calibration_error`)."""

    error: float
    mean_confidence: float
    accuracy: float


class TaskResult(BaseModel):
    """One task on `documents` documents (of `available`), with `shots` examples each; `file` is lm-eval's JSON.

    `calibration` is for multiple choice alone.
    """

    task: str
    version: str
    documents: int
    available: int
    shots: int
    metrics: list[Metric]
    calibration: ChoiceCalibration | None
    file: str


class TaskReport(BaseModel):
    """Result of `evaluate_tasks`. `resumed` tasks were taken from an earlier, interrupted run; `seconds` excludes
    loading and them. `limit` is documents per task (a fraction of them below 1), None for all."""

    model: str
    tasks: list[TaskResult]
    limit: float | None
    num_fewshot: int | None
    batch_size: str
    processes: int
    dtype: str
    device: str
    lm_eval: str
    resumed: list[str]
    seconds: float


def task_results(saved: Mapping[str, Any], file: Path) -> list[TaskResult]:
    """The tasks of one of lm-eval's result files, already read as `saved`; a group's own row comes without documents
    of its own and is left out when it has no metric."""
    results = []
    for task, row in saved["results"].items():
        metrics = _metrics(row, saved.get("higher_is_better", {}).get(task, {}))
        if not metrics:
            continue
        count = saved.get("n-samples", {}).get(task, {})
        results.append(
            TaskResult(
                task=task,
                version=str(saved.get("versions", {}).get(task, "")),
                documents=int(count.get("effective", 0)),
                available=int(count.get("original", 0)),
                shots=int(saved.get("n-shot", {}).get(task, 0)),
                metrics=metrics,
                calibration=_calibration(saved.get("samples", {}).get(task, [])),
                file=file.name,
            )
        )
    return results


def document_scores(file: Path, task: str) -> dict[str, dict[str, float]]:
    """Metric -> document -> score of `task` in lm-eval's result `file`, for metrics that score documents one by one.

    Documents are told apart by number and content, so that pairing two files never pairs different questions.
    """
    scores: dict[str, dict[str, float]] = {}
    for sample in read_json(file).get("samples", {}).get(task, []):
        document = f"{sample['doc_id']}:{sample['doc_hash']}:{sample['prompt_hash']}"
        for name in sample["metrics"]:
            if isinstance(sample[name], (bool, int, float)):
                scores.setdefault(_label(name, sample["filter"]), {})[document] = float(sample[name])
    return scores


def _label(metric: str, chosen: str) -> str:
    """lm-eval's metrics come per answer filter; the usual one is called `none`."""
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _metrics(row: Mapping[str, Any], better: Mapping[str, Any]) -> list[Metric]:
    found = []
    for key, value in row.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{name}_stderr,{chosen}")
        found.append(
            Metric(
                name=_label(name, chosen),
                value=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                higher_is_better=better.get(name),
            )
        )
    return found


def _calibration(samples: Sequence[Mapping[str, Any]]) -> ChoiceCalibration | None:
    """From the samples of a multiple-choice task: each answer option has a (log-likelihood, is greedy) pair."""
    confidences, hits = [], []
    for sample in samples:
        options = sample["filtered_resps"]
        if len(options) < 2 or "acc" not in sample or not all(_is_pair(option) for option in options):
            return None
        _, confidence = choice_confidence([float(option[0]) for option in options])
        confidences.append(confidence)
        hits.append(bool(sample["acc"]))
    if not hits:
        return None
    return ChoiceCalibration(
        error=calibration_error(torch.tensor(confidences), torch.tensor(hits)),
        mean_confidence=fmean(confidences),
        accuracy=fmean(hits),
    )


def _is_pair(option: Any) -> bool:
    return isinstance(option, (list, tuple)) and len(option) == 2 and isinstance(option[0], (int, float))
