"""The staged benchmark: who should train the same does, and what it says is what it measured."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.staged import __main__ as command
from benchmarks.staged import figures, settings
from benchmarks.staged.contenders import CONTENDERS, find, missing
from benchmarks.staged.fit import Fit, Wire
from benchmarks.staged.probe import peaks_of

SIZES = "--random --samples 24 --batch 4 --width 24 --heads 2 --vocabulary 50 --max-length 12"
TINY = [*SIZES.split(), "--epochs-per-stage", "2", "--lr", "1e-2", "--freeze", "1:4,3:5"]
TINY += ["--seeds", "1", "--threads", "1"]
HERE = [contender.key for contender in CONTENDERS if not missing(contender)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staged") / "found.json"


@pytest.fixture(scope="module")
def result(written: Path) -> Any:
    return command.main([*TINY, "--json", str(written)])


def losses(result: Any, key: str) -> list[float]:
    return result.fits[key][0].losses


def test_the_same_schedule_by_hand_and_with_callbacks_gives_the_same_losses(result: Any) -> None:
    for key in {"ours", "cache", "fts-eval"}.intersection(HERE):
        assert losses(result, key) == pytest.approx(losses(result, "hand"), rel=1e-5)
    # the control: dropout in frozen layers, and another schedule, are other runs
    for key in {"backbone", "full", "freeze", "fts"}.intersection(HERE):
        assert losses(result, key) != pytest.approx(losses(result, "hand"), rel=1e-5)


def test_the_cache_is_used(result: Any) -> None:
    assert result.fits["cache"][0].cache["hits"] > 0
    assert result.fits["freeze"][0].cache["hits"] > 0
    assert not result.fits["ours"][0].cache


def test_sizes_are_those_of_what_trains(result: Any) -> None:
    for key in HERE:
        fit = result.fits[key][0]
        assert fit.gradients == fit.trainable, key
        for state, trained in zip(fit.optimizer, fit.trainable):
            # two moments, and a step count for each tensor
            assert 2 * trained < state < 2 * trained + 1_000, key
    assert result.fits["hand"][0].optimizer == result.fits["ours"][0].optimizer
    trained = {key: result.fits[key][0].trainable for key in HERE}
    assert trained["ours"][0] < trained["ours"][1] < trained["ours"][2]
    assert trained["backbone"][0] == trained["backbone"][1] < trained["backbone"][2]
    assert len(set(trained["full"])) == 1
    assert trained["freeze"][0] > trained["freeze"][1] == trained["freeze"][2]


def test_all_reduced_bytes_follow_the_schedule_with_callbacks_only(result: Any) -> None:
    for key in ("ours", "cache", "full", "freeze"):
        wire = result.wires[key]
        assert wire.reduced == wire.gradients == result.fits[key][0].gradients
    # what unfreezes without a new reducer is never averaged
    assert result.wires["hand"].reduced[2] < result.wires["hand"].gradients[2]
    assert figures.drifts(result.wires["hand"])
    assert not figures.drifts(result.wires["ours"])


def test_peaks_of_tensors_are_counted_to_the_byte(result: Any) -> None:
    peaks = result.tensors["ours"]
    assert result.tensors["hand"] == peaks
    assert peaks[0] < peaks[1] < peaks[2]
    # where everything trains: gradients, two moments, and activations
    assert peaks[2] > 3 * result.fits["ours"][0].trainable[2]
    sentence = figures.sentences(result)[-1]
    assert f"{peaks[0]:,} and the same; {peaks[1]:,} and the same; {peaks[2]:,} and" in sentence
    other = dataclasses.replace(result, tensors={"hand": [1, 2, 3], "ours": [1, 2, 4_000]})
    assert "1 and the same; 2 and the same; 3 and 4,000." in figures.sentences(other)[-1]


def test_a_profile_gives_the_peak_of_each_third() -> None:
    class Event:
        def __init__(self, at: int, size: int | None) -> None:
            self.at, self.size = at, size

        def start_ns(self) -> int:
            return self.at

        def name(self) -> str:
            return "third of the run" if self.size is None else "[memory]"

        def nbytes(self) -> int:
            return self.size or 0

    sizes = [5, -2, None, -1, 1, None, 10, -12]
    events = [Event(at, size) for at, size in enumerate(sizes)]
    assert peaks_of(reversed(events)) == [5, 3, 13]


def test_dropout_left_on_is_noticed(result: Any) -> None:
    assert result.fits["backbone"][0].dropout == [True, True, False]
    assert result.fits["ours"][0].dropout == [False, False, False]


def test_the_table_has_a_row_for_each_and_says_what_was_measured(
    result: Any, written: Path
) -> None:
    table = figures.rows(result)
    assert [row[0].removesuffix(" *") for row in table] == [
        contender.name for contender in CONTENDERS if contender.key in HERE
    ]
    assert all(len(row) == len(figures.heads()) for row in table)
    shown = command.markdown(result)
    console = command.Console(width=140, file=io.StringIO())
    command.show(result, console)
    printed = console.file.getvalue()
    for key in HERE:
        fit = result.fits[key][0]
        assert fit.seconds > 0
        assert len(fit.epochs) == 6
        assert 0 <= fit.accuracy <= 1
        for text in (shown, printed):
            assert f"{fit.seconds:.1f}" in text
            assert f"{100 * fit.accuracy:.2f}" in text
    for sentence in figures.sentences(result):
        assert sentence in shown
        assert sentence in printed
    kept = json.loads(written.read_text())
    assert kept["fits"]["hand"][0]["losses"] == losses(result, "hand")
    assert [row["contender"] for row in kept["rows"]] == [row[0] for row in table]


def test_sentences_follow_the_figures(result: Any) -> None:
    hand = result.fits["hand"][0]
    fits = {
        key: [dataclasses.replace(hand, key=key, seed=seed, **options) for seed in range(2)]
        for key, options in {
            "hand": {},
            "ours": {"optimizer": [hand.optimizer[0] + 8, *hand.optimizer[1:]]},
            "full": {"seconds": 30.0, "accuracy": 0.5},
            "freeze": {"seconds": 10.0, "accuracy": 0.75},
        }.items()
    }
    fits["ours"][1].losses = [hand.losses[0] * 1.5, *hand.losses[1:]]
    told = figures.sentences(figures.Result(result.settings, "", fits))
    assert len(told) == 5
    assert "differ by at most 5e-01" in told[0]
    assert "3.00 (3.00 to 3.00) times as fast (aim: 2)" in told[1]
    assert "75.00 ± 0.00 against 50.00 ± 0.00 %" in told[1]
    assert "the difference is 25.00 ± 0.00 points" in told[1]
    assert "optimizer +8 bytes" in told[2]
    assert "optimizer equal bytes" in told[3]


def test_a_cache_that_steps_aside_and_bytes_that_are_missing_are_told(result: Any) -> None:
    fit: Fit = copy.deepcopy(result.fits["cache"][0])
    fit.cache["aside"] = "the model is compiled"
    wires = {"cache": Wire([], [], True, "no gloo")}
    told = figures.notes(figures.Result(result.settings, "", {"cache": [fit]}, wires))
    assert "GradualUnfreeze + cache: the cache stepped aside (the model is compiled)." in told
    assert "GradualUnfreeze + cache, all-reduced: not measured (no gloo)." in told


@pytest.mark.parametrize("padding", settings.PADDINGS)
def test_batches_are_the_same_for_each_and_others_in_each_epoch(padding: str) -> None:
    options, _ = command.parse([*TINY, "--padding", padding, "--max-length", "64"])
    data = settings.read(options)
    one, other, third = (settings.loader(data, options, seed) for seed in (1, 1, 2))
    epochs = [[[tokens for tokens, _, _ in loader] for _ in range(2)] for loader in (one, other)]
    for a, b in zip(epochs[0][0] + epochs[0][1], epochs[1][0] + epochs[1][1]):
        assert torch.equal(a, b)
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(epochs[0][0], epochs[0][1])
    )
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, (b, _, _) in zip(epochs[0][0], third)
    )
    widths = {batch.shape[1] for batch in epochs[0][0]}
    assert (len(widths) == 1) == (padding == "fixed")
    # each text once
    assert sum(len(batch) for batch in epochs[0][0]) == len(data.train) == options.samples


def test_callbacks_follow_the_options() -> None:
    options, _ = command.parse([*TINY, "--freeze", "1:2,2:3", "--percentile", "80"])
    freeze, autofreeze = (find(key).callbacks(options)[0] for key in ("freeze", "autofreeze"))
    assert [(entry.at, len(entry.freeze)) for entry in freeze.entries] == [(1, 3), (2, 1)]
    assert autofreeze.percentile == 80
    assert autofreeze.every == 2  # of 36 steps


def test_trec_is_read_from_its_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("NUM:dist How far is it ?\nHUM:desc Who was he ?\n")
    (tmp_path / "test.txt").write_text("HUM:desc Who is she ?\n")
    for path in (tmp_path, tmp_path / "train.txt"):
        options = dataclasses.replace(command.parse(TINY)[0], trec=path, samples=3)
        data = settings.read(options)
        assert [label for _, label in data.train] == [1, 0, 1]
        assert [label for _, label in data.test] == [0]
        assert data.classes == 2
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no `.*test\.txt`"):
        settings.read(options)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--freeze", "2:4,1:5"], "must rise"),
        (["--freeze", "2:9"], "1 to 6 layers"),
        (["--freeze", "two"], "isn't such as 2:4,4:5"),
        (["--freeze", "12:4"], "there are 12 epochs, 0 to 11"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse(arguments)
    assert told in capsys.readouterr().err
