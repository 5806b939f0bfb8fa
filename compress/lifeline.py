"""Who of a distributed run is still alive: a connection from every process to rank 0, watched by a thread.

A process that dies closes its connection at once; one whose host vanishes falls silent. Collectives would only report
that some connection broke, after minutes or never, and not say whose. Rank 0 says what happened, in one line, and ends
everybody; when it is rank 0 that died, one process of every host says so. Nothing is lost by ending like that:
the work folder is whole at any moment.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import Store

RESUME = "start the same command again to resume"
JOIN_SECONDS = 300.0  # for all processes to come up
_BEAT = 1.0  # seconds between signs of life
_GRACE = 1.0  # for better reasons to come in: a launcher stops all processes when one has died
_KEY = "lifeline"


def silence() -> float:
    """Seconds without a sign of life after which a process counts as dead: $HALFWEIGHT_PEER_SECONDS, or 60."""
    return float(os.environ.get("HALFWEIGHT_PEER_SECONDS", "60"))


@dataclass
class Peer:
    """The other end of a connection: its rank and name (`host:pid`), when it was last heard, the line it is about to
    say, and whether its connection may end."""

    rank: int
    name: str
    link: socket.socket
    heard: float = field(default_factory=time.monotonic)
    line: bytes = b""
    leaving: bool = False


class Lifeline:
    """Watches the `peers` of process `rank`, which are all others for rank 0, and rank 0 for all others.

    `doing` tells what the run is at, in the past tense; `speaks`: this process explains the end when rank 0 cannot.
    """

    def __init__(self, rank: int, peers: list[Peer], doing: Callable[[], str], speaks: bool) -> None:
        self.rank, self.peers, self.doing, self.speaks = rank, peers, doing, speaks
        self._gone: list[str] = []  # why the run cannot go on, best reasons first: who died,
        self._signals: list[int] = []  # which signals came,
        self._failed: list[tuple[str | None, int]] = []  # and why others gave up (None: that was said), with exit codes
        self._stopped = self._finishing = False
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._signalled = socket.socketpair()
        for end in (self._wakeup, self._signalled):
            end.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        for peer in peers:
            peer.link.setblocking(False)
            self._selector.register(peer.link, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    # --- the main thread ---------------------------------------------------------------------------------------

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within the `with`, SIGTERM and SIGINT end the run from the watching thread: the main thread may be inside a
        collective, where Python's own handlers do not run."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        descriptor = signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)

    def finish(self) -> None:
        """Part from the others, after the last collective."""
        self._tell({"done": True})
        self._finishing = True
        self._thread.join(5 * _GRACE)
        self._stopped = True
        for peer in self.peers:
            peer.link.close()

    def failed(self, text: str, code: int) -> None:
        """Tell the others that this process cannot go on. Returns when it is this process that must say why: rank 0 at
        once; another one, if rank 0 does not do it."""
        if self.rank == 0:
            self._stopped = True
            self._part({"failed": None, "code": code})
        else:
            self._tell({"failed": text, "code": code})
            time.sleep(10 * _GRACE)  # rank 0 ends this process

    def wait(self) -> None:
        """After a collective failed: give the watching thread the time to find out why, and to end this process."""
        time.sleep(silence() + 5 * _GRACE)

    # --- the watching thread -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        beat, end = time.monotonic(), float("inf")
        while not (self._stopped or (self._finishing and all(peer.leaving for peer in self.peers))):
            for key, _ in self._selector.select(_BEAT / 4):
                if key.data is None:
                    self._signals += self._wakeup.recv(64)
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now >= beat:
                self._tell({})
                beat = now + _BEAT
            for peer in list(self.peers):
                if now - peer.heard > silence():
                    self._lose(peer, f"has not been heard of for {silence():.0f} s")
            if self._gone or self._signals or self._failed:
                said = any(text is None for text, _ in self._failed)
                end = now if said else min(end, now + _GRACE)
            if now >= end and not self._stopped:
                self._explain()

    def _hear(self, peer: Peer) -> None:
        try:
            data = peer.link.recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(peer, "died")
            return
        peer.heard = time.monotonic()
        *lines, peer.line = (peer.line + data).split(b"\n")
        for said in map(json.loads, lines):
            peer.leaving |= bool(said)
            if "failed" in said:
                text = said["failed"]
                self._failed.append((text and f"rank {peer.rank} ({peer.name}): {text}", said["code"]))

    def _lose(self, peer: Peer, how: str) -> None:
        self._selector.unregister(peer.link)
        self.peers.remove(peer)
        if not peer.leaving:
            self._gone.append(f"rank {peer.rank} ({peer.name}) {how} while {self.doing()}; {RESUME}")

    def _explain(self) -> NoReturn:
        """Say why the run ends, unless another process does, and end this one."""
        text: str | None
        if self._gone:
            text, code = self._gone[0], 1
        elif self._signals:
            name = signal.Signals(self._signals[0]).name
            text, code = f"stopped by {name} while {self.doing()}; {RESUME}", 128 + self._signals[0]
        else:
            text, code = self._failed[0]
        if text is not None and (self.rank == 0 or (self._gone and self.speaks)):
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # progress bars hide it
            print(f"{show_cursor}error: {text}", file=sys.stderr, flush=True)
        self._part({"failed": None if self.rank == 0 else text, "code": code})
        os._exit(code)  # the main thread may be inside a collective that never returns

    # --- both --------------------------------------------------------------------------------------------------

    def _tell(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for peer in list(self.peers):
            with suppress(OSError):  # reading will show that the peer is gone
                peer.link.send(data)

    def _part(self, message: dict[str, Any]) -> None:
        """Tell the others, and see that they get it: a connection that is closed with unread data is reset."""
        self._tell(message)
        links = [peer.link for peer in list(self.peers)]
        for link in links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _GRACE / 2
        while time.monotonic() < end:
            for link in links:
                with suppress(OSError):
                    link.recv(2**16)
            time.sleep(_GRACE / 50)


def connect(store: Store, rank: int, size: int, host: str, name: str) -> list[Peer]:
    """The peers of process `rank` of `size`, which calls itself `name`; `host` is rank 0's address.

    Waits for all to come up; raises OSError or RuntimeError when they do not.
    """
    if rank == 0:
        token = secrets.token_hex(16)  # strangers may find the port
        with socket.create_server(("", 0), backlog=size) as server:
            store.set(_KEY, json.dumps({"port": server.getsockname()[1], "token": token, "name": name}))
            return _accept(server, size, token)
    store.wait([_KEY], timedelta(seconds=JOIN_SECONDS))
    hub = json.loads(store.get(_KEY))
    link = socket.create_connection((host, hub["port"]), timeout=JOIN_SECONDS)
    link.sendall(json.dumps({"token": hub["token"], "rank": rank, "name": name}).encode() + b"\n")
    return [Peer(0, hub["name"], link)]


def _accept(server: socket.socket, size: int, token: str) -> list[Peer]:
    peers: dict[int, Peer] = {}
    end = time.monotonic() + JOIN_SECONDS
    while len(peers) < size - 1:
        server.settimeout(max(0.1, end - time.monotonic()))
        try:
            link, _ = server.accept()
        except TimeoutError:
            missing = sorted({*range(1, size)} - {*peers})
            raise TimeoutError(f"rank {missing[0]} did not come up within {JOIN_SECONDS:.0f} s") from None
        with suppress(OSError, ValueError, KeyError, TypeError):
            link.settimeout(_GRACE)
            with link.makefile("rb") as lines:
                hello = json.loads(lines.readline(4096))
            if secrets.compare_digest(hello["token"], token):
                peers[hello["rank"]] = Peer(hello["rank"], hello["name"], link)
                continue
        link.close()
    return [peers[rank] for rank in sorted(peers)]
