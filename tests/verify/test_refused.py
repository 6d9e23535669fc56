"""Files that are refused, damaged, or something else; and that nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import VerifyError
from lightning_freeze.checkpoints.verify.files import open_weights
from tests.verify.files import Run, save
from tests.verify.test_opened import STATE, shards_of_torch


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refuses(path: Path | str, match: str) -> None:
    """In one line, with nothing that acts on a terminal."""
    with pytest.raises(VerifyError, match=match) as caught:
        open_weights(path)
    assert str(caught.value).isprintable()


# Code


@pytest.mark.parametrize("forced", ["0", "1"], ids=["", "environment says no weights_only"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool, forced: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    path, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    content = {"state_dict": STATE, "hyper_parameters": Touch(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    refuses(
        path,
        r"x\.ckpt` was refused: to read it, `\w+\.mkdir` would have to be called, and a file "
        r"that may call functions can run any code\. Nothing of it was executed\. If you trust .*"
        r"`torch\.save\(torch\.load\('.*x\.ckpt', weights_only=False\)",
    )
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Touch(mark), protocol=2))
    refuses(path, "Nothing of it was executed")
    assert not mark.exists()


def test_a_tar_archive_is_refused_whatever_its_first_file_is_called(tmp_path: Path) -> None:
    # torch before 2.6 reads these by an unpickler that runs code, with weights_only=True as well
    path = tmp_path / "x.pt"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80\x02x"), io.BytesIO())
    assert path.read_bytes().startswith(b"\x80\x02")
    refuses(path, r"x\.pt` is neither a checkpoint or state dict that")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    # what such an archive is known by; torch.jit itself is deprecated
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/model.py"):
            archive.writestr(f"x/{name}", b"")
    refuses(path, r"is a TorchScript archive: it holds code, which isn't loaded here")


def test_a_folder_of_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    refuses(tmp_path, r"`.metadata` is a pickle that may run code, so it was refused; nothing of")
    assert not mark.exists()


# Nothing there, cut off, damaged


def test_a_path_with_nothing_there_says_what_is_close_to_it(here: Path) -> None:
    save(here / "model.ckpt", STATE)
    refuses("modle.ckpt", r"There is no file or folder `modle\.ckpt`\. Close to it: `model\.ckpt`")
    refuses("bert-base-uncased", r"`bert-base-uncased`\. Give a path on this machine; a model of t")
    (here / "link").symlink_to("gone")
    refuses("link", r"There is no file or folder `link`")
    os.mkfifo("pipe")
    refuses("pipe", r"`pipe` is a folder, a pipe or a device")


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_an_empty_file_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refuses(tmp_path / name, r"` is empty\. Was writing it cut off\?")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_off_says_so(run: Run, tmp_path: Path, share: float) -> None:
    whole = Path(run.checkpoint).read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[: int(share * len(whole))])
    refuses(tmp_path / "x.ckpt", r"x\.ckpt` is cut off or damaged")


def test_an_archive_of_a_version_that_does_not_exist_is_damaged(run: Run, tmp_path: Path) -> None:
    content = bytearray(Path(run.checkpoint).read_bytes())
    # the version that is needed, in the first entry of the table of contents
    content[content.index(b"PK\x01\x02") + 6] = 93
    (tmp_path / "x.ckpt").write_bytes(content)
    refuses(tmp_path / "x.ckpt", r"is cut off or damaged: .*zip file version 9\.3")


def test_a_legacy_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    for size in (20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pt").write_bytes(whole[:size])
        refuses(tmp_path / "x.pt", r"can't be read: it is cut off or damaged|or is damaged")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_safetensors_file_that_is_cut_off_says_so(
    folder: Path, tmp_path: Path, share: float
) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: int(share * len(whole))])
    refuses(tmp_path / "x.safetensors", r"is no whole safetensors file: it is cut off or damaged")


def test_a_damaged_pickle_in_a_whole_archive_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00X\xff\xff")
        archive.writestr("x/version", b"3\n")
    refuses(tmp_path / "x.pt", r"x\.pt` (can't be read|holds something else)")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_torch_cannot_read_safely_is_refused(tmp_path: Path, new: bool) -> None:
    torch.save(STATE, tmp_path / "x.pt", pickle_protocol=4, _use_new_zipfile_serialization=new)
    refuses(tmp_path / "x.pt", r"than tensors and plain values, or is damaged \(torch says: Unsup")


def test_a_file_in_an_environment_that_torch_refuses_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.pt", STATE)
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    refuses(path, r"or torch refuses it \(it says: .*both were set")


def test_an_archive_that_was_compressed_later_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", STATE)
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert torch.load(tmp_path / "y.pt").keys() == STATE.keys()
    refuses(tmp_path / "y.pt", r"y\.pt` was refused: it is a compressed archive")


def test_what_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = [3]
    endless.append(endless)
    refuses(save(tmp_path / "x.pt", {**STATE, "x": endless}), r"was refused: `x\.1` holds itself")
    deep: Any = 3
    for _ in range(120):
        deep = {"a": deep}
    refuses(save(tmp_path / "x.pt", {**STATE, "x": deep}), r"more than 100 containers in each oth")
    whole: dict[str, Any] = {"state_dict": dict(STATE)}
    whole["state_dict"]["again"] = whole
    refuses(save(tmp_path / "x.pt", whole), r"holds itself")


def test_names_of_files_and_tensors_cannot_act_on_a_terminal(here: Path) -> None:
    odd = "a\x1b[2J\nOK: fine.pt"
    refuses(odd, r"There is no file or folder `a\\x1b\[2J\\nOK: fine\.pt`")
    save(here / odd, {"w\x1b[31m": 3})
    refuses(odd, r"`a\\x1b.* holds a dict with `w\\x1b\[31m`")
    (here / odd).write_bytes(b"\x1b[2J hello")
    refuses(odd, r"begins with b'\\x1b\[2J hello'")
    folder = here / "some folder\x1b"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"x")
    refuses(folder, r"dcp_to_torch '.*some folder\\x1b' weights\.pt`")


# Something else


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\n", r"begins with b'version https"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), r"it begins with b'\\x89HDF"),
        ("x.gguf", b"GGUF" + bytes(64), "it begins with b'GGUF"),
        ("flax_model.msgpack", b"\x81" + bytes(64), "is neither a checkpoint"),
        ("x.json", b"{}", "is neither a checkpoint"),
        ("x.ckpt", b"hello, world", r"nor a safetensors file, or is damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_line(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, match)


def test_another_zip_archive_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    refuses(tmp_path / "x.pt", r"is a zip archive, but not one that `torch\.save` wrote")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 3, "lr": 0.1}, r"holds a dict with `epoch`, `lr`, but no tensors"),
        (torch.zeros(3), r"holds one Tensor, but no tensors where weights stand"),
        ({}, r"holds a dict with nothing, but no tensors"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(
    tmp_path: Path, content: Any, match: str
) -> None:
    refuses(save(tmp_path / "x.pt", content), match)


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    refuses(save(tmp_path / "x.pt", nn.Linear(2, 2)), r"`torch\.nn\.modules\.linear\.Linear` would")


# Folders


def test_a_folder_without_weights_lists_what_was_looked_for(tmp_path: Path) -> None:
    refuses(tmp_path, r"is a folder without weights\. Looked for model\.safetensors, .* is nothing")
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, r"there is `config\.json`")


def test_a_folder_with_several_checkpoints_asks_for_one(here: Path) -> None:
    for epoch in (0, 1):
        save(here / f"epoch={epoch}.ckpt", STATE)
    refuses(".", r"holds 2 files of weights\. Name one: `epoch=0\.ckpt`, `epoch=1\.ckpt`")


def index(folder: Path, weight_map: Any) -> None:
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(content)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards_of_torch(tmp_path)
    (tmp_path / "pytorch_model-1.bin").unlink()
    refuses(tmp_path, r"names `pytorch_model-1\.bin`, which is missing")


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "a/x.bin", "..\\x.bin", "..", ".", "", 3])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save(tmp_path / "x.bin", STATE)
    index(folder, dict.fromkeys(STATE, name))
    refuses(
        folder, r"was refused: it names .*, which isn't the plain name of a file in this folder"
    )


@pytest.mark.parametrize("weight_map", [None, [], {"w": ["x"]}], ids=str)
def test_an_index_without_a_map_is_damaged(tmp_path: Path, weight_map: Any) -> None:
    index(tmp_path, weight_map)
    refuses(tmp_path, r"index\.json` is damaged: it is no JSON with a `weight_map`")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"], ids=len)
def test_an_index_that_is_no_such_json_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refuses(tmp_path, r"index\.json` is damaged")


def test_an_index_that_names_what_its_files_lack_is_an_error(tmp_path: Path) -> None:
    shards_of_torch(tmp_path)
    save(tmp_path / "pytorch_model-1.bin", {"other": torch.zeros(1)})
    refuses(tmp_path, r"says that `layer\.1\.bias` is in `pytorch_model-1\.bin`, but it isn't")
