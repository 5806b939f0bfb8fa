"""One forward pass per input, in lockstep: every pass of a block waits in front of a linear until all have reached it.

A linear should be solved for the inputs it will really get, which means after the linears before it (as in GPTQ's
"true sequential" order, Frantar et al. 2022, section 4). Starting over after each of them would cost a pass per linear.
Here each pass is a greenlet that pauses where the next linear is called; once all wait there, that linear's statistics
are complete, it is replaced, and the same passes go on. Only what a paused pass still needs is held meanwhile; where
memory is too short for that, passes do start over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..serving.errors import RunError

Forward = Callable[[Tensor], Tensor]


class PausingPass:
    """`forward(x)`, one stretch at a time; the linears to pause at are those of the surrounding `pauses`.

    Switch autocast, grad mode and the like outside: passes that take turns would undo each other's settings.
    """

    def __init__(self, forward: Forward, x: Tensor) -> None:
        self._pass = greenlet(forward)
        self._start: tuple[Tensor, ...] = (x,)

    def run_to(self, name: str) -> Tensor:
        """Go on up to the call of linear `name`; returns the input `[..., K]` it is called with."""
        reached = self._go_on()
        if self._pass.dead or reached[0] != name:
            raise RunError(f"{name}: is not called at the same point of every forward pass; ignore it in the recipe")
        x: Tensor = reached[1]
        return x

    def finish(self) -> Tensor:
        """Go on to the end; returns the forward pass's output."""
        output = self._go_on()
        if not self._pass.dead:
            raise RunError(f"{output[0]}: is called in some forward passes only; ignore it in the recipe")
        result: Tensor = output
        return result

    def drop(self) -> None:
        """End a pass that waits, and let go of what it holds."""
        self._pass.throw()

    def _go_on(self) -> Any:
        start, self._start = self._start, ()
        return self._pass.switch(*start)


class RestartingPass:
    """As PausingPass for `read()`, but holds nothing while it waits: it starts over and comes to the same point again.

    The linears before that point are what they were when it was there, so every input and output has the same bits.
    """

    def __init__(self, forward: Forward, read: Callable[[], Tensor]) -> None:
        self._forward, self._read = forward, read
        self._reached: list[str] = []

    def run_to(self, name: str) -> Tensor:
        """As PausingPass."""
        again = self._again()
        x = again.run_to(name)
        again.drop()
        self._reached.append(name)
        return x

    def finish(self) -> Tensor:
        """As PausingPass."""
        return self._again().finish()

    def _again(self) -> PausingPass:
        again = PausingPass(self._forward, self._read())
        for name in self._reached:
            again.run_to(name)
        return again


Pass = PausingPass | RestartingPass


@contextmanager
def pauses(linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the `with`, every pass pauses right before it calls one of `linears` (name -> module)."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def pause(module: nn.Module, args: tuple[Any, ...]) -> None:
            driver = getcurrent().parent
            assert driver is not None, "a linear that pauses was called outside of a PausingPass"
            driver.switch((name, args[0]))

        return pause

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(linears: Mapping[str, nn.Linear], run: Callable[[], object]) -> list[list[str]]:
    """Call `run()`; names of the `linears` in the order it calls them, those that read the very same tensor together.

    Such linears (q/k/v, gate/up) follow each other and share one Hessian. Raises RunError when one is not called
    exactly once: its statistics would be empty, or still grow after it was solved.
    """
    groups: list[list[str]] = []
    before: Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal before
            if args[0] is before:
                groups[-1].append(name)
            else:
                groups.append([name])
            before = args[0]

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    _require_one_call_each(list(linears), [name for group in groups for name in group])
    return groups


def _require_one_call_each(linears: Sequence[str], calls: Sequence[str]) -> None:
    for name in linears:
        times = calls.count(name)
        if times == 0:
            raise RunError(f"{name}: received no calibration tokens; ignore it in the recipe or use more samples")
        if times > 1:
            raise RunError(f"{name}: is called {times} times in one forward pass of its block; ignore it in the recipe")
