"""Files that can be opened, and what is said of them."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForSequenceClassification

from lightning_freeze import VerifyError
from lightning_freeze.checkpoints.verify.files import Spec, open_weights
from tests.toys import same
from tests.verify.files import Run, save

STATE = {"layer.0.weight": torch.ones(2, 3), "layer.1.bias": torch.zeros(3)}


def equal(path: Any, expected: dict[str, Tensor]) -> bool:
    found = open_weights(path)
    return found.specs.keys() == expected.keys() and all(
        same(found.load(name), tensor) for name, tensor in expected.items()
    )


def test_a_lightning_checkpoint_holds_the_weights_of_its_module(run: Run) -> None:
    assert equal(run.checkpoint, run.after)
    found = open_weights(run.checkpoint)
    assert found.kind == "Lightning checkpoint"
    assert found.specs["head.weight"] == Spec("float32", (3, 8))
    assert list(found.specs) == list(run.before)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_checkpoint_of_a_loop_of_ones_own_holds_them_too(tmp_path: Path, key: str) -> None:
    path = save(tmp_path / "x.pt", {"epoch": 3, key: STATE, "optimizer": {"state": {}}})
    assert equal(path, STATE)
    assert open_weights(path).kind == "checkpoint"


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_in_either_of_the_formats_of_torch(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=new)
    assert equal(path, STATE)
    assert open_weights(path).kind == "state dict"


def test_a_module_s_state_that_is_no_tensor_is_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {**STATE, "layer.0._extra_state": {"scale": 2}})
    assert equal(path, STATE)


T = torch.ones(2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"net": STATE, "best_acc": T}, r"by name, such as `best_acc`, .* such as `net\.layer"),
        ({"w": T, "ema": {"deep": [{"x": T}]}}, r"others, such as `ema\.deep\.0\.x`"),
        ({"w": T, "parts": [T, T], "more": (T,)}, r"others, such as `parts\.0`"),
        ({"w": T, 0: T}, r"others, such as `0`"),
        ({"state_dict": {"w": T, "model": STATE}}, r"such as `w`, .* such as `model\.layer"),
        ({"model": {"w": T, 7: T}, "best": T}, r"such as `w`, .* such as `7`"),
    ],
    ids=str,
)
def test_tensors_that_would_be_passed_over_are_refused(
    tmp_path: Path, content: Any, said: str
) -> None:
    with pytest.raises(VerifyError, match=rf"x\.pt` wasn't compared: .*{said}"):
        open_weights(save(tmp_path / "x.pt", content))


def test_a_list_that_stands_in_two_places_is_looked_through_once(tmp_path: Path) -> None:
    shared: Any = [3]
    for _ in range(60):
        shared = [shared, shared]
    assert equal(save(tmp_path / "x.pt", {**STATE, "x": shared, "y": shared}), STATE)
    with pytest.raises(VerifyError, match=r"others, such as `x\."):
        open_weights(save(tmp_path / "x.pt", {**STATE, "x": [shared, T]}))


def test_what_stands_beside_a_state_dict_is_passed_over(tmp_path: Path) -> None:
    beside = {"optimizer_states": [{"state": {0: {"exp_avg": T}}}], "best": T, "loops": {"x": T}}
    assert equal(save(tmp_path / "x.pt", {"state_dict": STATE, **beside}), STATE)


def test_tensors_in_a_module_s_other_state_are_compared_too(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {**STATE, "a._extra_state": {"scale": T, "steps": [3, T]}})
    assert equal(path, {**STATE, "a._extra_state.scale": T, "a._extra_state.steps.1": T})


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_safetensors_file_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    save_file(STATE, tmp_path / f"x{suffix}")
    assert equal(tmp_path / f"x{suffix}", STATE)


DTYPES = (
    "bfloat16 int64 bool complex64 uint16 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)
# older releases of torch and safetensors have fewer
KNOWN = [getattr(torch, name) for name in DTYPES.split() if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", KNOWN, ids=str)
def test_a_dtype_is_called_the_same_in_every_format(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = {"w": torch.ones(2).to(dtype)}
    save_file(tensor, tmp_path / "x.safetensors")
    both = [open_weights(save(tmp_path / "x.pt", tensor)), open_weights(tmp_path / "x.safetensors")]
    assert both[0].specs == both[1].specs == {"w": Spec(str(dtype)[6:], (2,))}


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
def test_numbers_of_four_bits_have_the_shape_that_torch_gives_them(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}
    header = json.dumps({"w": entry}).encode().ljust(72)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    found = open_weights(path)
    assert found.specs == {"w": Spec("float4_e2m1fn_x2", (2, 4))}
    assert found.load("w").shape == (2, 4)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_folder_of_save_pretrained_in_one_file_or_several(
    bert: BertForSequenceClassification, tmp_path: Path, size: str
) -> None:
    bert.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert equal(tmp_path, bert.state_dict())


def shards_of_torch(folder: Path) -> None:
    places = {}
    for number, (name, tensor) in enumerate(STATE.items()):
        places[name] = f"pytorch_model-{number}.bin"
        save(folder / places[name], {name: tensor})
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_folder_with_files_of_torch(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", STATE)
    assert equal(tmp_path, STATE)
    (tmp_path / "pytorch_model.bin").unlink()
    shards_of_torch(tmp_path)
    assert equal(tmp_path, STATE)


def test_of_one_name_in_two_files_the_one_that_the_index_says_counts(tmp_path: Path) -> None:
    shards_of_torch(tmp_path)
    first, second = STATE
    wrong = {first: torch.full((2, 3), 7.0), second: STATE[second]}
    save(tmp_path / "pytorch_model-1.bin", wrong)
    assert equal(tmp_path, STATE)
    for number in (0, 1):
        save(tmp_path / f"pytorch_model-{number}.bin", {list(STATE)[number]: T, "x": T})
    with pytest.raises(VerifyError, match=r"doesn't say where `x` is, and several files have it"):
        open_weights(tmp_path)


def test_a_folder_with_exactly_one_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to(run.checkpoint)
    save(tmp_path / "optimizer.pt", {})
    save(tmp_path / "rng_state_0.pth", {})
    assert equal(tmp_path, run.after)
    assert open_weights(tmp_path).kind == "folder with last.ckpt"


def test_names_are_those_without_wrappers(tmp_path: Path) -> None:
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()}
    assert equal(save(tmp_path / "x.pt", wrapped), STATE)


def test_tensors_stay_on_the_disk_until_they_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.full((4,), 7.5)})
    weights = open_weights(path)
    old, new = (torch.full((4,), value).numpy().tobytes() for value in (7.5, 8.5))
    with open(path, "r+b") as file:
        where = file.read().index(old)
        file.seek(where)
        file.write(new)
    assert weights.load("w").tolist() == [8.5] * 4


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(2).to_sparse(), r"has the layout torch\.sparse_coo"),
        (torch.zeros(2, device="meta"), r"has no bytes \(meta device\)"),
        (nested(), "is nested"),
        (torch.zeros(1).expand(10**12), "is larger than its storage"),
        (torch.zeros(8).as_strided((5, 4), (1, 1)), "is larger than its storage"),
    ],
)
def test_a_tensor_without_bytes_of_its_own_is_an_error_when_it_is_read(
    tmp_path: Path, tensor: Tensor, what: str
) -> None:
    weights = open_weights(save(tmp_path / "x.pt", {"w": tensor, "v": torch.zeros(1)}))
    assert weights.load("v").tolist() == [0]
    with pytest.raises(VerifyError, match=rf"`w` in `.*x\.pt` {what}.*; only dense"):
        weights.load("w")
