"""Several processes of one run. Run as a script, it starts them as torchrun does, but forks them from a process that
has imported everything, which takes a fraction of the time:

    python fleet.py SETTINGS.json

`settings`: processes, model, recipe, out, and optionally `kill` and `stop`: {rank: block}, the signal that a rank gets
once the first linear of that block is solved.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a fleet ended: exit codes by rank (negative: killed by that signal), what they said, and how long it took."""

    codes: list[int]
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def fleet(folder: Path, **settings: Any) -> Ended:
    """Run one, with files of its own in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(json.dumps({"folder": str(folder), **settings}, default=str))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HALFWEIGHT_PEER_SECONDS": "4"}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, str(file)], capture_output=True, text=True, timeout=240, env=env, check=False
    )
    assert done.stdout, done.stderr
    return Ended(json.loads(done.stdout.splitlines()[-1]), done.stderr, time.monotonic() - begin)


def _start(settings: dict[str, Any]) -> list[int]:
    import torch

    import halfweight.compress.driver
    import halfweight.compress.world  # noqa: F401

    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    size, pids = settings["processes"], []
    for rank in range(size):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
        pid = os.fork()
        if pid == 0:
            os._exit(_work(rank, settings))
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < size:
        left = [rank for rank in range(size) if rank not in codes]
        if all(str(rank) in settings.get("stop", {}) for rank in left):
            for rank in left:
                os.kill(pids[rank], signal.SIGKILL)
        for rank in left:
            found, status = os.waitpid(pids[rank], os.WNOHANG)
            if found:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[rank] for rank in range(size)]


def _work(rank: int, settings: dict[str, Any]) -> int:
    from halfweight import HalfweightError, Recipe, compress_checkpoint
    from halfweight.compress.report import Progress
    from halfweight.compress.world import join

    folder = Path(settings["folder"])
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    waiting = [
        (int(victim), block, number)
        for key, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP))
        for victim, block in settings.get(key, {}).items()
    ]

    def progress(step: Progress) -> None:
        for victim, block, number in waiting:
            if step.stage == "blocks" and step.done == block and "error" in step.detail:
                os.kill(int((folder / f"{victim}.pid").read_text()), number)

    try:
        with join("cpu") as world:
            recipe = Recipe.load(settings["recipe"])
            report = compress_checkpoint(
                settings["model"], recipe, settings["out"], dtype="float32", progress=progress, world=world
            )
        (folder / f"{rank}.json").write_text(report.model_dump_json())
    except HalfweightError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    print(json.dumps(_start(json.loads(Path(sys.argv[1]).read_text()))))
