"""Stop watches: a model's prefill and decoding, and every linear of a model in the order it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Spread(BaseModel):
    """Repeated measurements of one thing: the median, the extremes, and how many there were."""

    model_config = ConfigDict(allow_inf_nan=False)

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median=statistics.median(values), low=min(values), high=max(values), count=len(values))


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def generation_seconds(model: Any, prompt: Tensor, new: int) -> tuple[float, float]:
    """Seconds of the prefill of `prompt` `[B, T]`, and of `new` greedy steps of B tokens through the KV cache after
    it; an end-of-text token does not stop them."""
    device = prompt.device
    synchronize(device)
    begin = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronize(device)
    middle = time.perf_counter()
    for _ in range(new):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronize(device)
    return middle - begin, time.perf_counter() - middle


@torch.no_grad()
def sweep_seconds(calls: Mapping[str, Callable[[Tensor], Tensor]], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Seconds of every call, one after the other in the order given, as a model runs its linears.

    By the time a linear comes round again all the others' weights have passed through the caches, as in decoding.
    """
    some = next(iter(inputs.values()))
    if some.device.type != "cuda":
        taken = {}
        for name, call in calls.items():
            x = inputs[name]
            begin = time.perf_counter()
            call(x)
            taken[name] = time.perf_counter() - begin
        return taken
    marks = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in calls}
    for name, call in calls.items():
        marks[name][0].record()
        call(inputs[name])
        marks[name][1].record()
    torch.cuda.synchronize(some.device)
    return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in marks.items()}


def memory_growth(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes by which `work` raised the memory in use at its peak; None where the system does not tell.

    On a CPU that is resident memory, which leaves out what an allocator already held.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts from here
        before = _status("VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """A size in bytes from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
