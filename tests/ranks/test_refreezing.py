"""Layers that freeze again and layers that are drawn at random, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.ranks.fits import EPOCHS, OwnData, Save, adamw, fit, saved
from tests.ranks.processes import on_ranks
from tests.toys import same

KINDS: dict[str, Callable[[], GradualUnfreeze]] = {
    "chain-thaw": GradualUnfreeze.chain_thaw,
    "lisa": lambda: GradualUnfreeze.lisa(layers=2, every=3, seed=1),
}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_stay_equal_where_layers_freeze_again(kind: str, tmp_path: Path) -> None:
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        folder.mkdir()

        def act(_: int, ranks: int = ranks, folder: Path = folder) -> list[str]:
            audit = TrainableParamAudit(table=False)
            fit(lambda: OwnData(adamw), KINDS[kind](), audit, Save(folder), ranks=ranks)
            return [finding.code for finding in audit.findings]

        outcomes = on_ranks(act, ranks=ranks)
        assert [(outcome.error, outcome.value) for outcome in outcomes] == [("", [])] * ranks
    for epoch in range(EPOCHS):
        one, first, second = (
            saved(folders[1], 0, epoch), saved(folders[2], 0, epoch), saved(folders[2], 1, epoch)
        )  # fmt: skip
        assert not [name for name in first if not same(first[name], second[name])]
        assert max(float((one[name] - first[name]).abs().max()) for name in one) <= 1e-4
    start = saved(folders[2], 0, 0)
    end = saved(folders[2], 0, EPOCHS - 1)
    assert not [name for name in start if same(start[name], end[name]) and "blocks" in name]


@pytest.mark.timeout(120)
def test_ranks_that_draw_with_other_seeds_are_all_told(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        fit(lambda: OwnData(adamw), GradualUnfreeze.lisa(layers=2, every=3, seed=rank))

    for outcome in on_ranks(act):
        assert "The ranks don't agree on what trains" in outcome.error
        assert "with the seed 0 on rank 0" in outcome.error
        assert "with the seed 1 on rank 1" in outcome.error
