"""Processes of a test's own: a fork has what the tests have imported, and dies alone."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import Any


def start_process(target: Callable[..., None], *args: Any) -> Any:
    """A forked process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        process.start()
    return process


def run_in_a_process(target: Callable[..., None], *args: Any, seconds: float = 60) -> int:
    """Run a function in a fork; its exit status, or minus the signal that ended it."""
    process = start_process(target, *args)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, 9)
        raise AssertionError(f"the process still ran after {seconds} s")
    return int(process.exitcode)
