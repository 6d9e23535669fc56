"""Training that is killed with SIGKILL at any moment ends as training that never was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_freeze.checkpoints.certificate import read_certificate
from tests.callbacks.test_oracle_resume import assert_equal
from tests.interruption.harness import (
    BATCH,
    BORN,
    CERTIFY,
    END,
    FIT,
    NAMES,
    REPORT,
    STEPS,
    VALIDATE,
    WRITE,
    WRITTEN,
    Place,
    Plan,
    check_files,
    one_life,
)

KILLS = 80
SEED = 20

# two of a step's parts are much longer than the others: moments are drawn by part, not by time
MOMENTS = BORN + FIT + 3 * (BATCH + CERTIFY + WRITE + WRITTEN) + 2 * VALIDATE
LAST_MOMENTS = END + REPORT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def drawn(chance: random.Random) -> Plan:
    what = chance.choice(chance.choices((MOMENTS, LAST_MOMENTS), (12, 1))[0])
    often = {BATCH: 3, CERTIFY: 6, WRITE: 6, WRITTEN: 6}.get(what, 1)
    # rather early: a process runs on for a moment before the signal reaches it
    return Plan(what, chance.randint(1, often), chance.random() ** 2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    usual = one_life(Place(tmp_path / "one")).usual
    deaths: Counter[str] = Counter()
    seed = SEED
    while sum(deaths.values()) < KILLS:
        chance = random.Random(seed)
        place = Place(tmp_path / str(seed))
        every = 1 + seed % 2
        told = [f"seed {seed}, a checkpoint every {every} steps"]
        print(told[0])
        writes = 0
        while True:
            plan = drawn(chance)
            life = one_life(place, plan, usual, every=every)
            told.append(f"{plan}: {life.said}")
            print(told[-1])
            if not life.killed:
                break
            deaths[life.died] += 1
            writes += life.died in (WRITE, WRITTEN)
            check_files(place)
        history = "\n  ".join(told)
        assert_equal(uninterrupted, torch.load(place.end, weights_only=True))
        check_files(place)
        assert read_certificate(place.certificate).step == STEPS, history
        report = json.loads(place.report.read_text())
        assert report["clean"], history
        assert report["certificate"]["frozen"].keys() == {
            "backbone.embed.weight",
            "backbone.embed.bias",
        }
        # Lightning's own, at most one for each kill while it wrote: it never clears them up
        assert len(list(place.temporary.iterdir())) <= writes, history
        seed += 1
    counted = {NAMES[what]: count for what, count in deaths.items()}
    print(f"{sum(deaths.values())} kills, seeds {SEED} to {seed - 1}: {counted}")
    assert {BATCH, CERTIFY, WRITE, VALIDATE} <= deaths.keys(), counted


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_fresh_interpreter_with_hashes_of_its_own_goes_on_exactly(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    code = (
        "import sys; from pathlib import Path; import tests.conftest; "
        "from tests.interruption.harness import Place, live; "
        "live(Place(Path(sys.argv[1])), 1)"
    )
    for seed, batches in (("1", 7), ("2", 7), ("3", STEPS + 1)):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            while (what := process.stdout.read(1)) and batches:
                batches -= what.decode() == BATCH
            if not batches:
                process.kill()
        assert place.log.exists() is False
        check_files(place)
    assert_equal(uninterrupted, torch.load(place.end, weights_only=True))
