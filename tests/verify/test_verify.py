"""Two files, or one and a certificate: what is the same, and what isn't."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from lightning_freeze import ArgumentError, VerifyError, fingerprint
from lightning_freeze.audit.findings import CODES
from lightning_freeze.checkpoints.certificate import Certificate, read_certificate, sha256
from lightning_freeze.checkpoints.files import write_json
from lightning_freeze.checkpoints.verify.compare import group_names, verify
from lightning_freeze.checkpoints.verify.result import ABOUT_WEIGHTS, Verification
from tests.goldens import assert_golden
from tests.verify.files import Run, certificate, certified, save, write_certificate
from tests.verify.test_compare import flipped

BLOCK = "backbone.blocks.1.linear.weight"
STATISTICS = "backbone.blocks.0.norm.running_mean"
T = torch.ones(2)


def states(found: Verification) -> dict[str, str]:
    """Layer group -> what its tensors are, where they are all the same."""
    return {name: "/".join({t.status for t in group}) for name, group in found.groups.items()}


def marks(found: Verification) -> dict[str, str]:
    return {t.name: t.certified for t in found.tensors if t.certified}


# Two files


def test_a_frozen_backbone_is_identical_and_a_trained_head_is_not(run: Run) -> None:
    found = verify(run.base, run.checkpoint)
    assert states(found) == {
        "backbone.embed": "identical",
        "backbone.blocks.0": "identical",
        "backbone.blocks.1": "identical",
        "backbone.blocks.2": "identical",
        "head": "changed",
    }
    assert not found.ok
    assert verify(run.base, run.base).ok


def test_the_largest_difference_is_that_of_the_tensors(run: Run) -> None:
    found = verify(run.base, run.checkpoint)
    expected = max(
        float((run.before[name] - run.after[name]).abs().max())
        for name in ("head.weight", "head.bias")
    )
    assert max(t.difference or 0 for t in found.groups["head"]) == pytest.approx(expected)
    assert f"changed: 2 tensors in head (largest difference {expected:.2g})." in found.verdict


@settings(max_examples=40)
@given(st.data())
def test_a_single_flipped_bit_in_any_tensor_is_seen_and_its_group_named(
    run: Run, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(run.before)))
    tensor = run.before[name]
    bit = data.draw(st.integers(0, 8 * tensor.numel() * tensor.element_size() - 1))
    path = tmp_path_factory.mktemp("flip") / "x.ckpt"
    save(path, {"state_dict": {**run.before, name: flipped(tensor, bit)}})
    found = verify(run.base, path)
    group = group_names(run.before)[name]
    assert not found.ok
    assert [t.name for t in found.tensors if t.status != "identical"] == [name]
    assert f"changed: 1 tensor in {group}" in found.verdict
    if name.startswith("backbone."):
        found = verify(None, path, run.certificate)
        assert marks(found)[name] == "not as certified"
        assert f"not as certified: 1 tensor in {group}" in found.verdict


def test_the_names_of_the_two_files_may_begin_differently(run: Run, tmp_path: Path) -> None:
    inner = {name: t for name, t in run.before.items() if name.startswith("backbone.")}
    bare = save(tmp_path / "bare.pt", {n.removeprefix("backbone."): t for n, t in inner.items()})
    found = verify(bare, run.checkpoint)
    assert found.ok
    assert (found.base and found.base.prefix, found.checkpoint.prefix) == ("", "backbone.")
    assert states(found)["head"] == "only in CHECKPOINT"
    assert "identical: all 23 tensors that both have; only in CHECKPOINT: 2 tensors in head" in str(
        found
    )
    moved = {**inner, BLOCK: inner[BLOCK] + 1}
    bare = save(tmp_path / "bare.pt", {f"net.{n[9:]}": t for n, t in moved.items()})
    found = verify(bare, run.checkpoint)
    assert not found.ok
    assert "changed: 1 tensor in backbone.blocks.1 (largest difference 1)" in found.verdict


def test_tensors_of_one_file_only_are_listed_and_do_not_count(run: Run, tmp_path: Path) -> None:
    extra = {**run.before, "pooler.weight": torch.zeros(1)}
    fewer = {name: t for name, t in run.before.items() if not name.startswith("head.")}
    found = verify(save(tmp_path / "a.pt", extra), save(tmp_path / "b.pt", fewer))
    assert found.ok
    assert states(found)["pooler"] == states(found)["head"] == "only in BASE"
    assert "only in BASE: 3 tensors in head, pooler." in found.verdict


def test_another_number_of_classes_is_no_other_model_but_not_identical(
    run: Run, tmp_path: Path
) -> None:
    wider = {**run.before, "head.weight": torch.zeros(9, 8), "head.bias": torch.zeros(9)}
    found = verify(run.base, save(tmp_path / "x.pt", wider))
    assert states(found)["head"] == "other shape"
    assert "other shape: 2 tensors in head." in found.verdict
    assert not found.ok
    assert "head.weight: other shape; float32 3x8, now float32 9x8" in found.to_text(tensors=True)


def test_another_dtype_is_not_identical_even_where_the_values_are(run: Run, tmp_path: Path) -> None:
    double = {**run.before, BLOCK: run.before[BLOCK].double()}
    found = verify(run.base, save(tmp_path / "x.pt", double))
    assert not found.ok
    assert (
        "other dtype: 1 tensor in backbone.blocks.1 (float32, now float64: as BASE, converted; "
        "largest difference 0)." in found.verdict
    )
    double[BLOCK][0, 0] += 0.5
    found = verify(run.base, save(tmp_path / "x.pt", double))
    assert "blocks.1 (float32, now float64; largest difference 0.5)." in found.verdict


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.0, -0.0, "largest difference 0, bits only"),
        (1.0, float("nan"), "largest difference NaN against a number"),
        (1.0, float("inf"), "largest difference inf"),
    ],
)
def test_a_difference_that_is_no_number_is_said_in_words_and_is_json(
    run: Run, tmp_path: Path, before: float, after: float, said: str
) -> None:
    files = []
    for value in (before, after):
        tensor = run.before[BLOCK].clone()
        tensor[0, 0] = value
        files.append(save(tmp_path / f"{value}.pt", {**run.before, BLOCK: tensor}))
    assert verify(files[1], files[1]).ok
    found = verify(*files)
    assert said in found.verdict
    path = tmp_path / "x.json"
    write_json(path, found.to_dict())
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["ok"] is False


def test_a_pretrained_folder_and_a_wrapped_model_with_a_new_head(
    bert: BertForSequenceClassification, folder: Path, tmp_path: Path
) -> None:
    trained = {f"model.{name}": tensor.clone() for name, tensor in bert.state_dict().items()}
    path = save(tmp_path / "x.ckpt", {"state_dict": trained, "pytorch-lightning_version": "2"})
    assert verify(folder, path).ok
    trained["model.bert.encoder.layer.1.output.dense.bias"][0] += 0.5
    trained["model.classifier.weight"] = torch.zeros(5, 16)
    save(tmp_path / "x.ckpt", {"state_dict": trained})
    found = verify(folder, path)
    assert list(states(found)) == [
        "model.bert.embeddings",
        "model.bert.encoder.layer.0",
        "model.bert.encoder.layer.1",
        "model.bert.pooler",
        "model.classifier",
    ]
    assert "changed: 1 tensor in model.bert.encoder.layer.1 (largest difference 0.5)" in str(found)


def test_a_changed_copy_beside_an_intact_one_is_asked_about(run: Run, tmp_path: Path) -> None:
    model = {f"model.{n}": t + 1 for n, t in run.before.items()}
    for part in ("head", "backbone.embed"):
        model |= {f"model.{part}.weight": torch.zeros(9, 9), f"model.{part}.bias": torch.zeros(9)}
    path = save(tmp_path / "x.pt", {**model, **{f"teacher.{n}": t for n, t in run.before.items()}})
    with pytest.raises(
        VerifyError, match=r"`model\.` \(25 .* `teacher\.` \(25 .* `--prefix teacher`"
    ):
        verify(run.base, path)
    assert verify(run.base, path, prefix="teacher").ok
    assert not verify(run.base, path, prefix="model").ok


def test_weights_under_an_adapter_are_compared(run: Run, tmp_path: Path) -> None:
    adapted = dict(run.before)
    adapted["backbone.blocks.1.linear.base_layer.weight"] = adapted.pop(BLOCK)
    adapted["backbone.blocks.1.linear.lora_A.default.weight"] = torch.zeros(2, 8)
    adapted = {f"base_model.model.{n}": t for n, t in adapted.items()}
    found = verify(run.base, save(tmp_path / "x.pt", adapted))
    assert found.verdict == (
        "OK: identical: all 25 tensors that both have; only in CHECKPOINT: 1 tensor in "
        "base_model.model.backbone.blocks.1."
    )
    assert verify(None, tmp_path / "x.pt", run.certificate).ok
    moved = "base_model.model.backbone.blocks.1.linear.base_layer.weight"
    path = save(tmp_path / "y.pt", {**adapted, moved: adapted[moved] + 1})
    assert verify(run.base, path).status == verify(None, path, run.certificate).status == 1


def test_one_tensor_is_told_in_the_singular(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.pt", {"l.w": torch.full((2,), float(i))}) for i in (0, 1)]
    found = verify(files[0], files[0])
    assert found.verdict == "OK: identical: the one tensor that both have."
    assert "0.pt (state dict, 1 tensor)" in str(found)
    assert verify(*files).verdict.startswith("CHANGED: identical: 0 of 1 tensor that")
    path = write_certificate(tmp_path / "c.json", certificate({"l.w": torch.zeros(2)}))
    assert verify(files[0], files[0], path).verdict == (
        "OK: as certified: the one frozen tensor (1 identical to BASE)."
    )


def test_a_name_without_end_is_no_mistake_of_ours(tmp_path: Path) -> None:
    name = "a." * 2000 + "w"
    files = [save(tmp_path / f"{i}.pt", {name: torch.zeros(2) + i, "b.w": T}) for i in (0, 1)]
    assert verify(files[0], files[0]).ok
    found = verify(*files)
    assert [t.name for t in found.tensors if t.status == "changed"] == [name]


def test_names_cannot_act_on_a_terminal_or_fake_a_line(tmp_path: Path) -> None:
    name = "a.\x1b[2J\nOK: identical: all.w"
    files = [save(tmp_path / f"{i}.pt", {name: torch.zeros(2) + i, "b.w": T}) for i in (0, 1)]
    found = verify(*files)
    text = found.to_text(tensors=True)
    assert "\x1b" not in text
    assert not any(line.startswith("OK") for line in text.splitlines())
    assert "a.\\x1b[2J\\nOK: identical: all.w" in text
    path = write_certificate(tmp_path / "c.json", certificate({name: torch.zeros(2)}))
    assert verify(None, files[0], path).ok
    assert not verify(None, files[1], path).ok


@pytest.mark.parametrize("layers", [2, 4])
def test_a_model_with_another_number_of_layers_is_another_model(
    run: Run, tmp_path: Path, layers: int
) -> None:
    block = {n: t for n, t in run.before.items() if n.startswith("backbone.blocks.2.")}
    other = {n: t for n, t in run.before.items() if layers == 4 or n not in block}
    if layers == 4:
        other |= {n.replace(".2.", ".3."): t for n, t in block.items()}
    with pytest.raises(VerifyError, match=rf"`backbone\.blocks` has 3 layers in BASE and {layers}"):
        verify(run.base, save(tmp_path / "x.pt", other))


# A certificate


def test_with_a_certificate_only_what_was_frozen_counts(run: Run) -> None:
    found = verify(run.base, run.checkpoint, run.certificate)
    assert found.ok
    assert set(marks(found)) == {name for name in run.before if name.startswith("backbone.")}
    assert set(marks(found).values()) == {"as certified"}
    assert found.verdict.startswith(
        "OK: as certified: all 23 frozen tensors (23 identical to BASE); changed, but not "
        "frozen: 2 tensors in head (largest difference "
    )


@pytest.mark.parametrize("name", [BLOCK, STATISTICS])
def test_a_frozen_tensor_that_changed_is_not_as_certified(
    run: Run, tmp_path: Path, name: str
) -> None:
    changed = run.changed(tmp_path / "x.ckpt", {name: run.after[name] + 1})
    for base in (run.base, None):
        found = verify(base, changed, run.certificate)
        assert not found.ok
        assert {n for n, mark in marks(found).items() if mark == "not as certified"} == {name}
        assert "as certified: 22 of 23 frozen tensors" in found.verdict


def test_a_certificate_alone_needs_no_base(run: Run) -> None:
    found = verify(None, run.checkpoint, run.certificate)
    assert found.ok
    assert found.base is None
    assert {t.status for t in found.tensors} == {"not compared"}
    assert found.verdict == "OK: as certified: all 23 frozen tensors."
    assert "BASE" not in str(found)


def test_a_frozen_tensor_that_is_missing_is_an_answer_not_an_error(
    run: Run, tmp_path: Path
) -> None:
    fewer = {name: t for name, t in run.after.items() if name != BLOCK}
    path = save(tmp_path / "x.pt", fewer)
    for base in (run.base, None):
        found = verify(base, path, run.certificate)
        assert not found.ok
        assert marks(found)[BLOCK] == "missing"
        assert found.verdict.startswith(
            "CANNOT VERIFY: missing: 1 tensor in backbone.blocks.1, so not verified; as certified"
        )
        assert found.status == 2
    fewer[STATISTICS] = fewer[STATISTICS] + 1
    found = verify(None, save(tmp_path / "x.pt", fewer), run.certificate)
    assert found.status == 1
    assert found.verdict == (
        "CHANGED: not as certified: 1 tensor in backbone.blocks.0; missing: 1 tensor in "
        "backbone.blocks.1, so not verified; as certified: 21 of 23 frozen tensors."
    )


def test_another_dtype_or_shape_is_not_as_certified(run: Run, tmp_path: Path) -> None:
    for tensor in (run.after[BLOCK].double(), run.after[BLOCK].reshape(4, 16)):
        path = run.changed(tmp_path / "x.ckpt", {BLOCK: tensor})
        assert marks(verify(None, path, run.certificate))[BLOCK] == "not as certified"


def test_what_was_frozen_from_the_start_has_to_be_that_of_base(run: Run, tmp_path: Path) -> None:
    other = save(tmp_path / "other.pt", {**run.before, BLOCK: run.before[BLOCK] + 1})
    found = verify(other, run.checkpoint, run.certificate)
    assert not found.ok
    assert marks(found)[BLOCK] == "not as in BASE"
    assert "not as in BASE: 1 tensor in backbone.blocks.1 (largest difference 1)" in found.verdict
    # frozen later, it may have trained before
    whole = read_certificate(run.certificate)
    later = {**whole.frozen, **certified({BLOCK: run.after[BLOCK]}, epoch=1, step=4)}
    path = write_certificate(tmp_path / "later.json", replace(whole, frozen=later))
    found = verify(other, run.checkpoint, path)
    assert found.ok
    assert "all 23 frozen tensors (22 identical to BASE, 1 changed)" in found.verdict


def test_a_certificate_with_a_finding_is_not_clean(run: Run, tmp_path: Path) -> None:
    finding: dict[str, Any] = {"code": "frozen-changed", "names": [BLOCK]}
    whole = replace(read_certificate(run.certificate), findings=(finding,))
    found = verify(run.base, run.checkpoint, write_certificate(tmp_path / "c.json", whole))
    assert not found.ok
    assert found.verdict.startswith(
        "CHANGED: not clean: the certificate itself records 1 finding (frozen-changed); as certif"
    )
    assert found.to_dict()["certificate"]["findings"] == [finding]


@pytest.mark.parametrize(
    "code", ["no-gradient", "mode-changed", "new-in-a-later-version", None, []]
)
def test_a_finding_that_is_not_about_weights_is_a_note(run: Run, tmp_path: Path, code: Any) -> None:
    finding = {"code": code, "names": ["head.weight"], "message": "No gradient\x1b[2J yet."}
    whole = replace(read_certificate(run.certificate), findings=(finding,))
    found = verify(run.base, run.checkpoint, write_certificate(tmp_path / "c.json", whole))
    assert found.status == 0
    assert found.verdict.startswith("OK: as certified: all 23 frozen tensors")
    assert found.notes == (f"the certificate records [{code}] No gradient\\x1b[2J yet.",)


def test_the_findings_about_weights_are_findings_of_the_audit() -> None:
    assert ABOUT_WEIGHTS.issubset(CODES)


def test_many_findings_are_counted_rather_than_listed(run: Run, tmp_path: Path) -> None:
    findings = tuple({"code": "no-gradient", "message": f"w{i}"} for i in range(20))
    whole = replace(read_certificate(run.certificate), findings=findings)
    found = verify(run.base, run.checkpoint, write_certificate(tmp_path / "c.json", whole))
    assert found.notes[0] == "the certificate records [no-gradient] w0"
    assert found.notes[-1] == "and 12 more"


@pytest.mark.parametrize("code", sorted(ABOUT_WEIGHTS))
def test_a_certificate_of_nothing_still_says_that_weights_changed(
    run: Run, tmp_path: Path, code: str
) -> None:
    findings = ({"code": code, "names": [BLOCK], "message": "It changed."},)
    path = write_certificate(tmp_path / "c.json", certificate({}, findings=findings))
    for base in (run.base, None):
        found = verify(base, run.checkpoint, path)
        assert found.status == 1
        assert found.notes == (f"the certificate records [{code}] It changed.",)
        assert found.verdict.startswith(
            f"CHANGED: not clean: the certificate itself records 1 finding ({code}); it certifi"
        )
        assert "not frozen" in str(found)


def test_a_certificate_of_nothing_says_what_else_was_found(run: Run, tmp_path: Path) -> None:
    findings = ({"code": "no-gradient", "names": ["x"], "message": "None came."},)
    path = write_certificate(tmp_path / "c.json", certificate({}, findings=findings))
    with pytest.raises(
        VerifyError, match=r"certifies no tensor.* the certificate records \[no-gradient\] None c"
    ):
        verify(run.base, run.checkpoint, path)


def tied_certificate(run: Run, folder: Path) -> str:
    frozen = {n: t for n, t in run.after.items() if n.startswith("backbone.")}
    entries = certified(frozen)
    tie = replace(entries[BLOCK], tied_to=BLOCK)
    entries |= {"decoder.weight": tie, "encoder.weight": tie}
    return write_certificate(folder / "tied.json", certificate({}, frozen=entries))


def test_one_name_of_a_tied_tensor_is_enough(run: Run, tmp_path: Path) -> None:
    path = tied_certificate(run, tmp_path)
    for base in (run.base, None):
        found = verify(base, run.checkpoint, path)
        assert found.status == 0
        assert "as certified: all 25 frozen tensors" in found.verdict
    other = {n: t for n, t in run.after.items() if n != BLOCK}
    other["decoder.weight"] = run.after[BLOCK]
    assert verify(None, save(tmp_path / "x.pt", other), path).status == 0


def test_every_name_of_a_tied_tensor_that_is_there_has_to_fit(run: Run, tmp_path: Path) -> None:
    path = tied_certificate(run, tmp_path)
    for wrong in ("decoder.weight", BLOCK):
        both = {**run.after, "decoder.weight": run.after[BLOCK]}
        both[wrong] = both[wrong] + 1
        found = verify(None, save(tmp_path / "x.pt", both), path)
        assert found.status == 1
        assert {n for n, mark in marks(found).items() if mark == "not as certified"} == {wrong}
    # the only one that is there says nothing for the others
    found = verify(None, save(tmp_path / "x.pt", {**run.after, BLOCK: both[BLOCK]}), path)
    assert found.status == 1
    assert marks(found)["decoder.weight"] == "missing"


def test_two_tensors_of_the_same_bytes_are_no_tie(run: Run, tmp_path: Path) -> None:
    weights = {**run.after, "copy.weight": run.after[BLOCK]}
    path = write_certificate(tmp_path / "c.json", certificate(weights))
    found = verify(None, run.checkpoint, path)
    assert (found.status, marks(found)["copy.weight"]) == (2, "missing")


def test_what_was_reinitialised_need_not_be_as_in_base(run: Run, tmp_path: Path) -> None:
    entries = dict(read_certificate(run.certificate).frozen)
    entries[BLOCK] = replace(entries[BLOCK], reinitialised=True)
    path = write_certificate(tmp_path / "c.json", certificate({}, frozen=entries))
    other = save(tmp_path / "other.pt", {**run.before, BLOCK: run.before[BLOCK] + 1})
    found = verify(other, run.checkpoint, path)
    assert found.status == 0
    assert found.verdict.startswith(
        "OK: as certified: all 23 frozen tensors (22 identical to BASE, 1 re-initialised); "
    )
    assert "6 identical, 1 re-initialised" in str(found)
    entry = {t.name: t.to_dict() for t in found.tensors}[BLOCK]
    assert (entry["status"], entry["reinitialised"]) == ("changed", True)
    # as certified it has to be all the same
    changed = run.changed(tmp_path / "x.ckpt", {BLOCK: run.after[BLOCK] + 1})
    assert verify(other, changed, path).status == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_a_run_converted_counts_as_that_of_base(
    run: Run, tmp_path: Path, dtype: torch.dtype
) -> None:
    after = {n: t.to(dtype) if t.is_floating_point() else t for n, t in run.after.items()}
    frozen = {n: t for n, t in after.items() if n.startswith("backbone.")}
    path = write_certificate(tmp_path / "c.json", certificate(frozen))
    name = str(dtype).removeprefix("torch.")
    checkpoint = save(tmp_path / "x.pt", after)
    found = verify(run.base, checkpoint, path)
    assert found.status == 0
    assert found.verdict.startswith("OK: as certified: all 23 frozen tensors (")
    assert f"20 as BASE, converted to {name}" in found.verdict
    assert "3 identical to BASE" in found.verdict
    assert f"as BASE, converted to {name}" in str(found)
    found = verify(run.base, checkpoint)
    assert found.status == 1
    assert f"(float32, now {name}: as BASE, converted, float32, now {name}; " in found.verdict
    # converted or not, it has to be that of BASE
    other = save(tmp_path / "b.pt", {**run.before, BLOCK: run.before[BLOCK] * 1.5})
    found = verify(other, checkpoint, path)
    assert found.status == 1
    assert f"not as in BASE: 1 tensor in backbone.blocks.1 (float32, now {name}; " in found.verdict


def test_a_checkpoint_that_holds_little_of_what_was_frozen_is_still_verified(
    run: Run, tmp_path: Path
) -> None:
    few = {f"trained.{i}": torch.zeros(i + 1) for i in range(40)} | {BLOCK: run.after[BLOCK]}
    found = verify(None, save(tmp_path / "x.pt", few), run.certificate)
    assert found.status == 2
    assert "as certified: 1 of 23 frozen tensors" in found.verdict
    few[BLOCK] = few[BLOCK] + 1
    assert verify(None, save(tmp_path / "x.pt", few), run.certificate).status == 1


def test_a_head_is_not_taken_for_a_layer_of_the_same_shape(run: Run, tmp_path: Path) -> None:
    head = {"head.weight": torch.zeros(8, 4), "head.bias": torch.zeros(8)}
    path = save(tmp_path / "x.pt", head)
    with pytest.raises(
        VerifyError, match=r"different models, or CHECKPOINT was saved without what was frozen"
    ):
        verify(None, path, run.certificate)
    assert verify(None, path, run.certificate, prefix="backbone.embed").status == 1


def in_checkpoint(
    run: Run, path: Path, held: Certificate, weights: Any = None, **state: Any
) -> str:
    """The run's checkpoint, with a certificate in it."""
    audit = {"certificate": held.to_dict(), **state}
    content = {**run.content, "callbacks": {"TrainableParamAudit": audit}}
    return save(path, {**content, "state_dict": {**run.after, **(weights or {})}})


def test_the_certificate_in_a_checkpoint_is_used_by_default(run: Run, tmp_path: Path) -> None:
    held = read_certificate(run.certificate)
    path = in_checkpoint(run, tmp_path / "x.ckpt", held)
    for found in (verify(run.base, path), verify(None, path), verify(run.base, path, path)):
        assert found.verdict.startswith("OK: as certified: all 23 frozen tensors")
        assert found.certificate_side.path == f"in {path}"
    path = in_checkpoint(run, tmp_path / "x.ckpt", held, {BLOCK: run.after[BLOCK] + 1})
    for found in (verify(run.base, path), verify(None, path), verify(run.base, path, path)):
        assert found.verdict.startswith("CHANGED: not as certified: 1 tensor in backbone.blocks.1")
    # another one, or none
    other = certificate({"head.weight": run.after["head.weight"]}, step=9)
    assert verify(None, path, write_certificate(tmp_path / "c.json", other)).ok
    found = verify(run.base, path, own=False)
    assert found.certificate is None
    assert "changed: 3 tensors in backbone.blocks.1, head" in found.verdict
    with pytest.raises(ArgumentError, match="nothing to compare"):
        verify(None, path, own=False)


def test_a_damaged_certificate_in_a_checkpoint_is_not_passed_over(run: Run, tmp_path: Path) -> None:
    held = read_certificate(run.certificate).to_dict()
    state = {"certificate": {**held, "step": 9}}
    path = save(tmp_path / "x.ckpt", {**run.content, "callbacks": {"A": state}})
    with pytest.raises(VerifyError, match="was changed after it was written, or damaged"):
        verify(run.base, path)
    state = {"certificate": {**held, "step": torch.ones(1)}}
    path = save(tmp_path / "x.ckpt", {**run.content, "callbacks": {"A": state}})
    with pytest.raises(VerifyError, match="something else than plain values, such as a tensor"):
        verify(run.base, path)
    assert not verify(run.base, path, own=False).ok


MOMENTS = [
    {"epoch": 0, "step": 0, "lr": {"body": None, "top\x1b": None, "head": 0.1}},
    {"epoch": 1, "step": 4, "lr": {"body": None, "top\x1b": 0.1, "head": 0.1}},
    {"epoch": 2, "step": 8, "lr": {"body": 0.1, "top\x1b": 0.1, "head": 0.1}},
]


def test_where_nothing_is_frozen_any_more_it_is_told_what_was_until_when(
    run: Run, tmp_path: Path
) -> None:
    path = in_checkpoint(run, tmp_path / "x.ckpt", certificate({}), moments=MOMENTS)
    told = r"top\\x1b until epoch 1, step 4, body until epoch 2, step 8"
    with pytest.raises(VerifyError, match=rf"certifies no tensor.*{told}.*`lightning-freeze veri"):
        verify(run.base, path)
    with pytest.raises(VerifyError, match=rf"certifies no tensor.*{told}"):
        verify(None, path, path)
    # the best checkpoint that is known there, quoted
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    callbacks["ModelCheckpoint"] = {"best_model_path": "my runs/best.ckpt"}
    path = save(tmp_path / "y.ckpt", {**run.content, "callbacks": callbacks})
    with pytest.raises(VerifyError, match=r"`lightning-freeze verify 'my runs/best\.ckpt'`"):
        verify(run.base, path)
    assert verify(run.base, path, own=False).status == 1
    # nothing was ever frozen: no earlier checkpoint says more
    with pytest.raises(VerifyError, match=r"nor before\. All tensors"):
        verify(run.base, in_checkpoint(run, tmp_path / "z.ckpt", certificate({})))


def test_a_certificate_of_nothing_leaves_it_to_the_one_that_the_best_checkpoint_holds(
    run: Run, tmp_path: Path
) -> None:
    last = write_certificate(tmp_path / "c.json", certificate({}, until={"body": (2, 8)}))
    held = read_certificate(run.certificate)
    best = in_checkpoint(run, tmp_path / "best.ckpt", held)
    for base in (run.base, None):
        found = verify(base, best, last)
        assert found.status == 0
        assert found.certificate == held
        assert "frozen were body until epoch 2, step 8" in found.notes[0]
        assert "holds a certificate of its own, which was taken" in str(found)
    best = in_checkpoint(run, tmp_path / "best.ckpt", held, {BLOCK: run.after[BLOCK] + 1})
    assert verify(run.base, best, last).status == 1


def test_an_exact_name_wins_over_a_copy_elsewhere(run: Run, tmp_path: Path) -> None:
    two = ("backbone.embed.weight", "backbone.embed.bias")
    path = write_certificate(tmp_path / "c.json", certificate({n: run.after[n] for n in two}))
    moved = {n: torch.zeros(3) for n in two} | {f"old.{n}": t for n, t in run.after.items()}
    found = verify(None, save(tmp_path / "x.pt", {**run.after, **moved}), path)
    assert (found.status, marks(found)) == (1, dict.fromkeys(two, "not as certified"))
    assert found.verdict.startswith("CHANGED: not as certified: 2 tensors in backbone.embed")
    # control: with the exact ones as they were
    kept = {**run.after, **{n: t + 1 for n, t in moved.items() if n.startswith("old.")}}
    assert verify(None, save(tmp_path / "x.pt", kept), path).status == 0


def test_a_certificate_may_be_of_sha256(run: Run, tmp_path: Path) -> None:
    frozen = {
        name: replace(entry, fingerprint=str(sha256(run.after[name])))
        for name, entry in read_certificate(run.certificate).frozen.items()
    }
    path = write_certificate(tmp_path / "c.json", certificate({}, frozen=frozen, digest="sha256"))
    found = verify(run.base, run.checkpoint, path)
    assert found.status == 0
    assert "sha256" in str(found)
    changed = run.changed(tmp_path / "x.ckpt", {BLOCK: flipped(run.after[BLOCK], 3)})
    assert marks(verify(None, changed, path))[BLOCK] == "not as certified"


def test_a_certificate_fits_a_model_that_was_taken_out_of_its_module(
    bert: BertForSequenceClassification, folder: Path, tmp_path: Path
) -> None:
    frozen = {f"model.bert.{name}": t for name, t in bert.bert.state_dict().items()}
    path = write_certificate(tmp_path / "c.json", certificate(frozen))
    found = verify(None, folder, path)
    assert found.ok
    assert set(marks(found)) == {f"bert.{name}" for name in bert.bert.state_dict()}
    name = "model.bert.pooler.dense.bias"
    frozen[name] = frozen[name] + 1
    path = write_certificate(tmp_path / "c.json", certificate(frozen))
    assert not verify(None, folder, path).ok


def test_a_certificate_of_another_model_is_an_error(run: Run, folder: Path) -> None:
    with pytest.raises(VerifyError, match="The certificate and CHECKPOINT are different models"):
        verify(None, folder, run.certificate)


def test_a_certificate_of_nothing_proves_nothing(run: Run, tmp_path: Path) -> None:
    path = write_certificate(tmp_path / "c.json", certificate({}))
    with pytest.raises(VerifyError, match="certifies no tensor: nothing was frozen when it was"):
        verify(run.base, run.checkpoint, path)


def test_a_model_that_stands_twice_is_told_by_a_prefix(run: Run, tmp_path: Path) -> None:
    student = {f"student.{name}": tensor for name, tensor in run.after.items()}
    teacher = {f"teacher.{name}": tensor + 1 for name, tensor in run.after.items()}
    path = save(tmp_path / "x.pt", {**student, **teacher})
    with pytest.raises(VerifyError, match=r"under `student\.` .* under `teacher\.`"):
        verify(None, path, run.certificate)
    assert verify(run.base, path, run.certificate, prefix="student").ok
    assert not verify(run.base, path, run.certificate, prefix="teacher").ok


def test_the_names_of_a_certificate_of_the_whole_outweigh_the_prefix_of_base(
    run: Run, tmp_path: Path
) -> None:
    both = {f"{p}.{n}": t for p in ("student", "teacher") for n, t in run.after.items()}
    path = save(tmp_path / "x.pt", both)
    whole = write_certificate(tmp_path / "c.json", certificate(both))
    found = verify(save(tmp_path / "b.pt", run.after), path, whole, prefix="student")
    assert found.ok
    assert set(marks(found)) == set(both)


def test_with_nothing_to_compare_with_an_error_says_what_to_give(run: Run) -> None:
    with pytest.raises(ArgumentError, match=r"nothing to compare .* `--certificate FILE`"):
        verify(None, run.checkpoint)


def test_the_fingerprint_is_that_of_the_package(run: Run) -> None:
    entry = read_certificate(run.certificate).frozen[BLOCK]
    assert entry.fingerprint == fingerprint(run.after[BLOCK])


# The result


def test_a_result_is_plain_values_for_json(run: Run) -> None:
    found = verify(run.base, run.checkpoint, run.certificate)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["format"] == 1
    assert (content["ok"], content["status"]) == (True, 0)
    assert content["verdict"] == found.verdict
    assert content["tensors"][0] == {
        "name": "backbone.embed.weight",
        "group": "backbone.embed",
        "base": {"dtype": "float32", "shape": [8, 4]},
        "checkpoint": {"dtype": "float32", "shape": [8, 4]},
        "status": "identical",
        "difference": None,
        "certified": "as certified",
        "converted": False,
        "reinitialised": False,
    }
    assert len(content["tensors"]) == len(run.before)


def test_the_table_is_that_of_the_golden_files(run: Run, here: Path) -> None:
    for name, source in (
        ("base.pt", run.base), ("run.ckpt", run.checkpoint), ("audit.json", run.certificate)
    ):  # fmt: skip
        (here / name).symlink_to(source)
    # numbers that don't depend on what a processor rounds
    head = {"head.weight": run.before["head.weight"] + 1, "head.bias": run.before["head.bias"] - 2}
    run.changed(here / "good.ckpt", head)
    broken = {BLOCK: torch.zeros(8, 8), STATISTICS: run.after[STATISTICS] + 0.5}
    run.changed(here / "broken.ckpt", {**head, **broken, "head.weight": torch.zeros(9, 8)})
    assert_golden("verify/files.txt", str(verify("base.pt", "good.ckpt")))
    assert_golden("verify/certificate.txt", str(verify("base.pt", "good.ckpt", "audit.json")))
    assert_golden("verify/alone.txt", str(verify(None, "good.ckpt", "audit.json")))
    broke = verify("base.pt", "broken.ckpt", "audit.json")
    assert repr(broke) == str(broke)
    assert_golden("verify/broken.txt", broke.to_text(tensors=True))
