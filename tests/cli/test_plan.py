"""`lightning-freeze plan` and `inspect`: what they print, and what they say of mistakes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_freeze import GradualUnfreeze
from lightning_freeze.cli import main
from tests.zoo import tiny_bert

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
MODULE = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def needs(width):
    return nn.Linear(width, width)

def nothing():
    return None

def broken():
    raise RuntimeError("no such file")

def empty():
    return nn.Sequential(nn.ReLU())

ready = make().half()
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with modules of a user and, in a folder with an odd name, a config."""
    folder = tmp_path / "ein Ördner"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "user_models.py").write_text(MODULE, encoding="utf-8")
    (folder / "user_broken.py").write_text("import no_such_library", encoding="utf-8")
    tiny_bert().config.save_pretrained(folder / "tiny bert")
    config = json.loads((folder / "tiny bert" / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "tiny bert" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("user_models", "user_broken"):
        sys.modules.pop(name, None)
    return folder


def fails(capsys: Captured, arguments: list[str], *said: str) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    for text in said:
        assert text in output.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("user_models:make", "2 stages in 2 epochs"),
        ("user_models:ready", "2 stages in 2 epochs"),
        ("tiny bert", "BertForSequenceClassification"),
        ("tiny bert/config.json", "input_ids 1x128"),
        ("timm:resnet18", "10.6 GFLOPs a step"),
        ("torchvision:resnet18", "inputs: 1x3x224x224"),
    ],
)
def test_every_kind_of_model_can_be_planned(
    here: Path, capsys: Captured, name: str, said: str
) -> None:
    assert main(["plan", name]) == 0
    output = capsys.readouterr()
    assert said in output.out
    assert "100.0 %" in output.out
    assert output.err == ""


def test_a_class_or_a_task_gives_the_model_another_head(here: Path, capsys: Captured) -> None:
    for options, said in (
        ([], "BertForSequenceClassification"),
        (["--task", "token_classification"], "BertForTokenClassification"),
        (["--task", "fill-mask"], "BertForMaskedLM"),
        (["--class", "AutoModel"], "BertModel"),
    ):
        assert main(["inspect", "tiny bert", *options]) == 0
        assert f"({said})" in capsys.readouterr().out
    assert main(["inspect", "tiny bert", "--class", "BertForMaskedLM"]) == 0
    text = capsys.readouterr().out
    assert "one tensor: bert.embeddings.word_embeddings.weight = cls.predictions.decoder" in text
    assert "Found by: transformers' `base_model` (`bert`)" in text


def test_weights_are_loaded_only_when_asked_for(here: Path, capsys: Captured) -> None:
    fails(capsys, ["inspect", "tiny bert", "--weights"], "can't be built")
    tiny_bert().save_pretrained(here / "tiny bert")
    assert main(["inspect", "tiny bert", "--weights", "--tensors"]) == 0
    assert "bert.encoder.layer.2.output.dense.weight" in capsys.readouterr().out


def test_inspect_says_what_is_in_the_checkpoint_what_is_new_and_what_is_not_used(
    here: Path, capsys: Captured
) -> None:
    tiny_bert().save_pretrained(here / "trained")
    assert main(["inspect", "trained", "--task", "token-classification"]) == 0
    text = capsys.readouterr().out
    assert "head" in text
    assert "loaded" not in text
    assert "in the checkpoint" in text
    assert "Origin: by name and shape, against trained" in text
    assert "2 keys of the checkpoint aren't used: bert.pooler.dense.bias" in text
    assert main(["inspect", "trained", "--class", "BertForMaskedLM", "--tensors"]) == 0
    text = capsys.readouterr().out
    new = [line for line in text.splitlines() if " new " in line]
    assert any("cls.predictions.bias" in line for line in new)
    assert not any("bert.encoder" in line for line in new)
    assert main(["inspect", "tiny bert", "--origin", "trained"]) == 0
    assert "in the checkpoint" in capsys.readouterr().out
    fails(capsys, ["inspect", "tiny bert", "--origin", "nowhere.pt"], "nowhere.pt")


def test_inspect_lists_groups_bottom_to_top_and_writes_json(here: Path, capsys: Captured) -> None:
    assert main(["inspect", "user_models:make", "--json", "out/found.json"]) == 0
    text = capsys.readouterr().out
    assert "58 parameters in 4 tensors. Found by: the order of the Sequential" in text
    content = json.loads(Path("out/found.json").read_text(encoding="utf-8"))
    assert content["groups"] == ["0", "head"]
    assert [row["parameters"] for row in content["rows"]] == [32, 8, 16, 2]
    assert main(["inspect", "user_models:empty"]) == 0
    assert "there are no parameters" in capsys.readouterr().out


def test_a_written_schedule_reads_back_to_the_same_plan(here: Path, capsys: Captured) -> None:
    model = "tiny bert"
    options = ["--layers-per-step", "2", "--lr-decay", "0.9", "--epochs", "4"]
    assert main(["plan", model, *options, "--yaml", "plan.yaml", "--json", "a.json"]) == 0
    arguments = ["plan", model, "--schedule", "plan.yaml", "--epochs", "4"]
    assert main([*arguments, "--json", "b.json"]) == 0
    a, b = (json.loads(Path(name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert a == b
    read = GradualUnfreeze(schedule="plan.yaml").preview(tiny_bert(), 4)
    assert json.loads(json.dumps(read.to_dict()))["rows"] == a["rows"]
    fails(capsys := _cleared(capsys), ["plan", model, "--yaml", "plan.yaml"], "`--overwrite`")
    assert main(["plan", model, "--yaml", "plan.yaml", "--overwrite"]) == 0
    assert main([*arguments, "--json", "b.json"]) == 0
    assert json.loads(Path("b.json").read_text(encoding="utf-8")) != a


def _cleared(capsys: Captured) -> Captured:
    capsys.readouterr()
    return capsys


def test_a_schedule_may_be_written_out_and_a_picture_drawn(here: Path, capsys: Captured) -> None:
    schedule = '{0: "2", 3: {unfreeze: "0", lr_scale: 0.5}}'
    assert main(["plan", "user_models:make", "--schedule", schedule, "--plot", "p.svg"]) == 0
    assert "2 stages in 4 epochs" in capsys.readouterr().out
    assert "<svg" in Path("p.svg").read_text(encoding="utf-8")


def test_a_frozen_backbone_is_planned_too(here: Path, capsys: Captured) -> None:
    options = ["--freeze-backbone", "--trainable-layers", "1", "--unfreeze-at-epoch", "2"]
    assert main(["plan", "tiny bert", *options, "--trainable", "**.LayerNorm.*"]) == 0
    assert "2 stages in 3 epochs" in capsys.readouterr().out


def test_the_table_fits_a_narrow_terminal(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("plan", "inspect"):
        assert main([command, "tiny bert"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "`plan` needs a model"),
        (["timm:resnet81"], "timm has no model `resnet81`. Did you mean `resnet18`"),
        (["torchvision:resnet81"], "torchvision has no model `resnet81`. Did you mean"),
        (["user_models:mak"], "`user_models` has no `mak`. Did you mean `make`?"),
        (["user_model:make"], "There is no module `user_model` for `user_model:make`"),
        (["user_broken:make"], "No module named 'no_such_library'"),
        (["user_models:needs"], "needs arguments (width)"),
        (["user_models:nothing"], "returned None, not a model"),
        (["user_models:number"], "is 3, which is neither a model nor a function"),
        (["user_models:broken"], "RuntimeError: no such file"),
        (["user_models:empty"], "has no parameters, so there is nothing to train"),
        (["google-bert/bert-base-uncased"], "the hub doesn't give it"),
        (["tiny bertt/config.json"], "There is no file or folder `tiny bertt/config.json`"),
        (["user_models.py"], "is not JSON"),
        (["."], "has no config.json"),
        ([""], "The model's name is empty"),
        (["tiny bert", "--task", "x"], "transformers has no task `x`"),
        (["tiny bert", "--class", "BertForMaskedLMM"], "Did you mean `BertForMaskedLM`"),
        (["user_models:make", "--task", "x"], "`--task` is for models of transformers"),
        (["user_models:make", "--epochs", "0"], "`--epochs` is 0. Write a whole number from 1"),
        (["user_models:make", "--batch", "0"], "`--batch` is 0"),
        (["user_models:make", "--unit", "steps"], '`unit` is \'steps\'. Write "epoch" or "step"'),
        (["user_models:make", "--schedule", "{0: hed}"], "No parameter matches `hed`"),
        (["user_models:make", "--schedule", "{0: x"], "is not valid YAML"),
        (["user_models:make", "--schedule", "no.yaml"], "The schedule file `no.yaml` can't be re"),
        (["user_models:make", "--schedule", "{0: x}", "--start", "2"], "`--start` has no meaning"),
        (["user_models:make", "--lr-scale", "2"], "is for `FreezeBackbone`. Add"),
        (["user_models:make", "--freeze-backbone", "--every", "2"], "is for `GradualUnfreeze`"),
        (["user_models:make", "--plot", "x.foo"], "has a suffix that isn't a picture's"),
        (["user_models:make", "--yaml", "tiny bert"], "is a folder. Name a file to write"),
        (["user_models:make", "--json", "user_models.py/x"], "can't be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named(here: Path, capsys: Captured, arguments: Any, said: str) -> None:
    fails(capsys, ["plan", *arguments], said)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # as the command does, but with what tests/conftest.py does for torchvision
    code = (
        "import re, sys, tests.conftest; from lightning_freeze.cli import main; "
        # `getrusage` counts what the process that started this one held, too
        "status = main(); peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read()); "
        "print(peak[1], file=sys.stderr); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **options
    )


@pytest.mark.slow
def test_a_model_of_405_billion_parameters_takes_no_memory(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16384,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "intermediate_size": 53248, "vocab_size": 128256, "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = process("plan", str(tmp_path), "--json", str(tmp_path / "plan.json"))
    assert found.returncode == 0, found.stderr
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert content["total"] == 405_853_388_800
    assert len(content["rows"]) == 128
    costs = [row["cost"] for row in content["rows"]]
    assert costs == sorted(costs)
    assert costs[-1] == 1.0
    # by hand: forward, weights, inputs; with the head trains the norm below it
    layer = 2 * 128 * (16384 * (16384 * 2 + 1024 * 2) + 3 * 16384 * 53248)
    attention = 2 * 2 * 128 * 128 * 16384
    head = 2 * 128 * 16384 * 128256
    assert content["full_flops"] == 3 * (126 * (layer + attention) + head)
    assert content["rows"][0]["flops"] == 126 * (layer + attention) + 3 * head
    assert int(found.stderr.split()[-1]) < 2 * 2**20


def test_a_reader_who_leaves_is_no_error(here: Path) -> None:
    python = shlex.quote(sys.executable)
    command = f"{python} -W ignore -m lightning_freeze inspect user_models:make"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    found = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert found.stdout.split()[-1] == "0"
    assert found.stderr == ""


def test_help_loads_nothing_heavy_and_names_each_option(capsys: Captured) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--schedule", "--epochs", "--layers-per-step", "--yaml", "--freeze-backbone"):
        assert option in text
    assert "null" not in text
    code = (
        "import sys; from lightning_freeze.cli import main; main(['--help']); "
        "print(' '.join(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in found.stdout.split()}
    assert not loaded & {"lightning", "transformers", "timm", "torchvision", "matplotlib"}
