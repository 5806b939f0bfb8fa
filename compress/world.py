"""The processes that share a run: usually one, or those that `torchrun` started, each with its share of the windows.

Everything a run does between processes goes through a `World`. Alone, sums are what they are and everybody is the
leader, so that there is one code path. Rank 0 leads: it decides what is resumed, and is the only one to write.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..serving.errors import HalfweightError, InputError, RunError
from ..serving.load import resolve_device
from .launch import launched
from .lifeline import JOIN_SECONDS, RESUME, Lifeline, connect

T = TypeVar("T")

# Solving one linear of a large model may take long, and the dead are noticed otherwise.
_COLLECTIVE = timedelta(hours=12)


class World:
    """This process alone. `rank` of `size`; `doing` says what the run is at, in the past tense, for messages."""

    rank = 0
    size = 1
    doing = "the run was starting"

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes, and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: neighbours, of equal number; what does not divide goes to the first."""
        start, more = divmod(len(items), self.size)
        begin = self.rank * start + min(self.rank, more)
        return list(items[begin : begin + start + (self.rank < more)])

    def rounds(self, items: Sequence[T]) -> list[Sequence[T]]:
        """`items` in groups of `size`; process r works on the r-th of each."""
        return [items[i : i + self.size] for i in range(0, len(items), self.size)]

    def local(self, device: torch.device) -> torch.device:
        """`device` as this process is to use it: with several, each has a GPU of its own."""
        return device

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, which becomes the sum over all processes."""
        return tensor

    def total(self, count: int) -> int:
        """The sum of everybody's `count`."""
        return int(self.sum(torch.tensor(count)))

    def chain(self, total: Tensor, parts: Mapping[int, Tensor], add: Callable[[Sequence[int]], None]) -> None:
        """Have all processes add to `total` one after the other, so that its bits do not depend on how many there are.

        `parts` are the views of it that `add(keys)` adds this process's share to. All have the whole sum in the end.
        """
        add(list(parts))

    def shared(self, value: T, source: int = 0) -> T:
        """The `value`, of plain JSON, that process `source` has."""
        return value

    def gathered(self, value: T) -> list[T]:
        """Everybody's `value`, of plain JSON, by rank."""
        return [self.shared(value, source) for source in range(self.size)]

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.shared(None)

    def broadcast(self, tensors: dict[str, Tensor], source: int, device: torch.device) -> dict[str, Tensor]:
        """The `tensors` that process `source` has, bit for bit, on `device`."""
        return tensors

    def in_turns(self, work: Callable[[], T]) -> T:
        """The result of `work`, which fills a cache that processes may have in common: the leader goes first."""
        return work()


ALONE = World()


class ProcessGroup(World):
    """One of several processes, connected by torch.distributed; see `join`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.lifeline: Lifeline | None = None

    def local(self, device: torch.device) -> torch.device:
        return self.device if device.type == self.device.type else device

    def sum(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device)
        with self._others():
            distributed.all_reduce(moved)
        return tensor if moved is tensor else tensor.copy_(moved)

    def chain(self, total: Tensor, parts: Mapping[int, Tensor], add: Callable[[Sequence[int]], None]) -> None:
        last = self.size - 1
        sent: Any = None
        with self._others():
            for key, part in parts.items():
                if self.rank > 0:
                    before = torch.empty_like(part, memory_format=torch.contiguous_format)
                    distributed.recv(before, self.rank - 1)
                    part.copy_(before)
                add([key])
                if sent is not None:
                    sent.wait()
                if self.rank < last:
                    sent = distributed.isend(part.contiguous(), self.rank + 1)
            if sent is not None:
                sent.wait()
        self._send(total, last)

    def shared(self, value: T, source: int = 0) -> T:
        text = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(text)], device=self.device)
        self._send(size, source)
        data = torch.frombuffer(bytearray(text or int(size)), dtype=torch.uint8).to(self.device)
        self._send(data, source)
        result: T = json.loads(data.cpu().numpy().tobytes())
        return result

    def broadcast(self, tensors: dict[str, Tensor], source: int, device: torch.device) -> dict[str, Tensor]:
        header = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        result = {}
        for name, (dtype, shape) in self.shared(header, source).items():
            mine = self.rank == source
            whole = tensors[name] if mine else torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            # As bytes: backends do not know all dtypes.
            data = whole.to(self.device).contiguous().view(-1).view(torch.uint8)
            if len(data):
                self._send(data, source)
            result[name] = whole if mine else data.view(whole.dtype).view(whole.shape).to(device)
        return result

    def in_turns(self, work: Callable[[], T]) -> T:
        turn = 0 if self.leads else 1 if self.local_rank == 0 else 2  # hosts may have caches of their own
        for number in range(3):
            if number == turn:
                result = work()
            self.meet()
        return result

    def _send(self, tensor: Tensor, source: int) -> None:
        with self._others():
            distributed.broadcast(tensor, source)

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Blame the right one for a collective that fails."""
        try:
            yield
        except RuntimeError as error:
            if self.lifeline is not None:
                self.lifeline.wait()  # usually ends the process
            reason = str(error).partition("\n")[0]
            raise RunError(f"processes lost each other while {self.doing} ({reason}); {RESUME}") from None


@contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """The World of the processes that `torchrun` started, for the length of the `with`; alone without it.

    They talk over NCCL when `device` is CUDA, else over gloo. From here on a HalfweightError of any process ends all:
    rank 0 says why and exits with its code. So does a process that dies, and SIGTERM. Raises InputError when `device`
    does not fit, RunError when the processes do not find each other.
    """
    if not launched():
        yield ALONE
        return
    # Loopback when all are on this host: its own name may lead anywhere.
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        world = ProcessGroup(rank, size)
        peers = connect(store, rank, size, os.environ["MASTER_ADDR"], world.name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"the processes of this run do not find each other ({reason}); see docs/distributed.md"
        ) from None
    speaks = rank == 1 or world.local_rank == 0  # one on every host, rank 0 aside
    world.lifeline = lifeline = Lifeline(rank, peers, lambda: world.doing, speaks)
    with lifeline.signals():
        try:
            world.device = _own_device(device)
            with world._others():
                distributed.init_process_group(
                    "nccl" if world.device.type == "cuda" else "gloo",
                    store=distributed.PrefixStore("collectives", store),
                    rank=rank,
                    world_size=size,
                    timeout=_COLLECTIVE,
                )
            yield world
        except BaseException as error:
            if not (world.leads or isinstance(error, HalfweightError)):
                traceback.print_exc()  # a bug; this process may not get to tell of it later
            code = error.exit_code if isinstance(error, HalfweightError) else 1
            lifeline.failed(str(error) or type(error).__name__, code)
            raise
        lifeline.finish()
        distributed.destroy_process_group()


def _own_device(device: str) -> torch.device:
    """The device of this process, where `device` is what the command says."""
    where = resolve_device(device)
    if where.type != "cuda":
        return where
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ":" in device:
        raise InputError(f"device {device}: every process takes a GPU of its own; use cuda, and CUDA_VISIBLE_DEVICES")
    if here > gpus:
        raise InputError(f"{here} processes share the {gpus} GPUs of {socket.gethostname()}; start one for each GPU")
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(where)
    return where
