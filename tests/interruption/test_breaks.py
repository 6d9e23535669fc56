"""Fits that stop before their end: what they leave, and that the next one goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_freeze.certificate import read_certificate
from tests.interruption.harness import STEPS, Place, fit_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore:.*no last checkpoint available")


def test_a_fit_that_has_nothing_left_to_train_writes_the_report_that_is_missing(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    fit_to_the_end(place)
    whole = json.loads(place.report.read_text())
    # as a kill between the last checkpoint and the fit's end leaves it
    place.report.unlink()
    place.certificate.unlink()
    fit_to_the_end(place)
    report = json.loads(place.report.read_text())
    assert report["clean"]
    assert report["frozen"] == whole["frozen"]
    assert report["moments"] == whole["moments"]
    assert report["certificate"]["frozen"] == whole["certificate"]["frozen"]
    assert read_certificate(place.certificate).step == STEPS
