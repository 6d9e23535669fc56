"""Runs a function on several ranks, each in a process of its own, as a cluster starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a function returned on one rank, or the exception that it raised, as text."""

    value: Any = None
    error: str = ""


def on_ranks(act: Callable[[int], Any], ranks: int = 2, seconds: float = 30.0) -> list[Outcome]:
    """What `act(rank)` comes to on each rank; an error of a rank doesn't end the others.

    A Trainer in it takes `strategy="ddp"` and as many devices: it finds itself launched already.

    Raises:
        TimeoutError: a rank hasn't ended in time.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    started = []
    for rank in range(ranks):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(act, rank, ranks, port, writer), daemon=True)
        process.start()
        writer.close()
        ours.append(reader)
        started.append(process)
    found: dict[Any, Outcome] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < ranks:
            waiting = [reader for reader in ours if reader not in found]
            ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            for reader in ready:
                try:
                    found[reader] = reader.recv()  # type: ignore[union-attr]
                except EOFError:
                    found[reader] = Outcome(error="the process died")
            if not ready:
                late = [rank for rank, reader in enumerate(ours) if reader not in found]
                raise TimeoutError(f"ranks {late} hang; the others came to {found.values()}")
    finally:
        for process in started:
            process.kill()
            process.join()
    return [found[reader] for reader in ours]


def _run(act: Callable[[int], Any], rank: int, ranks: int, port: int, writer: Connection) -> None:
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    try:
        outcome = Outcome(act(rank))
    except BaseException as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    writer.send(outcome)
    # the group's sockets close when the process is ended, which is once all ranks have spoken
    time.sleep(3600)
