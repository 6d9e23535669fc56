"""The callbacks in a LightningCLI configuration."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.toys import Toy, changed, loader, state, trainable

CONFIG = """
seed_everything: 7
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_freeze.ReinitTopLayers
      init_args: {n_layers: 1, seed: 0}
    - class_path: lightning_freeze.GradualUnfreeze
      init_args:
        schedule:
          0: head
          1: {unfreeze: [blocks.1, blocks.2], lr_scale: 0.5}
    - class_path: lightning_freeze.FreezeBackbone
      init_args: {backbone: backbone.embed}
    - class_path: lightning_freeze.TrainableParamAudit
      init_args: {table: false, every: 2}
"""


class Module(Toy):
    def __init__(self) -> None:
        super().__init__()


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LightningCLI]:
    def run(config: str) -> LightningCLI:
        path = tmp_path / "config.yaml"
        path.write_text(config)
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", f"--config={path}"])
        return LightningCLI(Module, Data, save_config_callback=None)

    return run


def test_all_four_callbacks_run_from_a_yaml_config(cli: Callable[[str], LightningCLI]) -> None:
    run = cli(CONFIG)
    assert {name.split(".")[2] for name in trainable(run.model) if "blocks" in name} == {"1", "2"}
    audit = next(cb for cb in run.trainer.callbacks if isinstance(cb, TrainableParamAudit))
    assert audit.findings == []
    lrs = audit.moments[-1].lr
    assert lrs["backbone.blocks.2"] == 0.5 * lrs["head"]


@pytest.mark.parametrize(
    ("arguments", "frozen"),
    [
        ("{schedule: {1: embed, 2: {freeze: [blocks.0]}}}", {"embed", "blocks.0"}),
        ("{start: 1, layers_per_step: 3, groups: [embed, blocks.0, blocks.1]}", {"embed", "b"}),
        ("{every: 3, unit: step, monitor: gradient, percentile: 100}", {"embed"}),
    ],
)
def test_gradual_freeze_runs_from_a_yaml_config(
    cli: Callable[[str], LightningCLI], arguments: str, frozen: set[str]
) -> None:
    before, _, after = CONFIG.partition("    - class_path: lightning_freeze.ReinitTopLayers")
    audit = after[after.index("    - class_path: lightning_freeze.TrainableParamAudit") :]
    freeze = f"    - class_path: lightning_freeze.GradualFreeze\n      init_args: {arguments}\n"
    run = cli(before + freeze + audit)
    trains = trainable(run.model)
    still = {name for name, _ in run.model.named_parameters()} - trains
    assert all(any(part in name for name in still) for part in frozen)
    assert "head.weight" in trains


# The example configs

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def load_main() -> Any:
    spec = importlib.util.spec_from_file_location("configs_main", CONFIGS / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["configs_main"] = module
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_main()
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
]


def command(*arguments: str) -> LightningCLI:
    """`python main.py ...`, in this process."""
    with mock.patch.object(sys, "argv", ["main.py", *arguments]):
        return EXAMPLE.main()


def example(folder: Path, config: str | Path, *more: str) -> LightningCLI:
    root = f"--trainer.default_root_dir={folder}"
    return command("fit", f"--config={CONFIGS / config}", root, *QUIET, *more)


HEAD = {"head.weight", "head.bias"}


def layers(*numbers: int, of: str = "") -> set[str]:
    parts = [of] if of else ["weight", "bias"]
    return {f"backbone.layer.{n}.{part}" for n in numbers for part in parts}


EMBED = {"backbone.embed.weight", "backbone.embed.bias"}
EVERYTHING = HEAD | EMBED | layers(0, 1, 2, 3)
TRAINS = {
    "freeze_backbone.yaml": HEAD | layers(2, 3) | {n for n in EVERYTHING if n.endswith("bias")},
    "gradual_unfreeze.yaml": EVERYTHING - HEAD,
    "schedule_from_file.yaml": EVERYTHING,
    "unfreeze_by_metric.yaml": None,
    "reinit_top_layers.yaml": EVERYTHING,
    "audit.yaml": HEAD,
    "lisa.yaml": None,
    "all.yaml": EVERYTHING - EMBED,
}


def test_every_example_config_is_tested_and_described() -> None:
    configs = {path.name for path in CONFIGS.glob("*.yaml")}
    assert configs == {*TRAINS, "schedule.yaml"}
    assert all(f"[{name}]" in (CONFIGS / "README.md").read_text() for name in TRAINS)


@pytest.mark.parametrize("config", TRAINS)
def test_an_example_config_trains_what_it_says(tmp_path: Path, config: str) -> None:
    run = example(tmp_path, config)
    expected = TRAINS[config]
    found = trainable(run.model)
    if expected is None:
        drawn = {name.split(".")[2] for name in found if ".layer." in name}
        assert found >= HEAD
        assert len(drawn) == 2 if config == "lisa.yaml" else found == HEAD
    else:
        assert found == expected
    for callback in run.trainer.callbacks:
        if isinstance(callback, TrainableParamAudit):
            assert callback.findings == []
            assert "clean" in callback.verdict


def test_a_schedule_file_is_found_beside_the_config_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = example(tmp_path, "schedule_from_file.yaml", "--trainer.max_epochs=1")
    assert trainable(run.model) == HEAD
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    again = example(tmp_path, saved, "--trainer.max_epochs=1")
    keys = [
        [cb.state_key for cb in r.trainer.callbacks if isinstance(cb, GradualUnfreeze)]
        for r in (run, again)
    ]
    assert keys[0] == keys[1]
    assert "'**'" in keys[0][0]


def test_the_saved_config_of_a_preset_and_of_all_callbacks_runs_again(tmp_path: Path) -> None:
    for config in ("lisa.yaml", "all.yaml"):
        first = example(tmp_path / config, config, "--trainer.max_epochs=1")
        saved = tmp_path / config / "lightning_logs" / "version_0" / "config.yaml"
        again = example(tmp_path / config, saved, "--trainer.max_epochs=1")
        assert changed(state(first.model), state(again.model)) == set()
        assert trainable(first.model) == trainable(again.model) != set()


def test_a_schedule_on_the_command_line_counts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("0: [head, embed]\n")
    monkeypatch.chdir(tmp_path)
    callback = "--trainer.callbacks=lightning_freeze.GradualUnfreeze"
    for written in ("mine.yaml", "{0: [head, embed]}"):
        more = [callback, f"--trainer.callbacks.schedule={written}", "--trainer.max_epochs=1"]
        root = f"--trainer.default_root_dir={tmp_path}"
        run = command("fit", root, *QUIET, *more)
        assert trainable(run.model) == HEAD | EMBED


WRONG = {
    "{0: head, 1: {thaw: embed}}": "the unknown key `thaw` at epoch 1",
    "{1.5: head}": "the key 1.5, which is not an epoch",
    "{null: head}": "the key None, which is not an epoch",
    "{true: head}": "the key True, which is not an epoch",
    "{first: head}": "the key 'first', which is not an epoch",
    "{-1: head}": "the epoch -1. Epochs count from 0.",
    "{0: }": "None at epoch 0",
    "{0: 2.5}": "2.5 at epoch 0",
    "{0: [head, null]}": "['head', None] at epoch 0",
    "{0: head, '0': embed}": "names epoch 0 twice",
    "{0: {unfreeze: head, lr_scale: fast}}": "`lr_scale` at epoch 0 of `schedule` is 'fast'",
    "[head]": "`schedule` is ['head']",
    "3": "`schedule` is 3",
    '"{0: [head"': "`schedule` is not valid YAML: while parsing",
    "none.yaml": "The schedule file `none.yaml` can't be read: File does not exist: '",
    "twice.yaml": "is not valid YAML: the key 1 stands twice",
}


@pytest.mark.parametrize("schedule", WRONG)
def test_a_mistake_in_the_schedule_of_a_config_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    (tmp_path / "twice.yaml").write_text("1: head\n1: embed\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_freeze.TrainableParamAudit\n"
        "    - class_path: lightning_freeze.GradualUnfreeze\n"
        f"      init_args:\n        schedule: {schedule}\n"
    )
    with pytest.raises(SystemExit, match="2"):
        example(tmp_path, config)
    said = capsys.readouterr().err
    for part in ('"trainer.callbacks"', "'lightning_freeze.GradualUnfreeze'", '"schedule"'):
        assert part in said
    assert WRONG[schedule] in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("order: sideways", 'Parser key "order"'),
        ("unit: batch", 'Parser key "unit"'),
        ("every: often", 'Parser key "every"'),
        ("evry: 2", "evry"),
    ],
)
def test_a_wrong_argument_in_a_config_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_freeze.GradualUnfreeze\n"
        f"      init_args: {{{argument}}}\n"
    )
    with pytest.raises(SystemExit, match="2"):
        example(tmp_path, config)
    said = capsys.readouterr().err
    assert message in said
    assert "'lightning_freeze.GradualUnfreeze'" in said


def test_the_help_of_a_callback_says_what_each_argument_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command("fit", "--trainer.callbacks.help=GradualUnfreeze")
    said = " ".join(capsys.readouterr().out.split())
    assert "Head first, then layer group by layer group" in said
    assert "{top_down,bottom_up}" in said
    assert "epoch (or step) -> selectors, cumulative" in said
    # each has a text before its type
    arguments = said.partition("--trainer.callbacks.schedule SCHEDULE")[2]
    assert not re.search(r"--trainer\.callbacks\.\w+ [A-Z_]+ \(type:", arguments)
    assert arguments.count("(type:") == 14
