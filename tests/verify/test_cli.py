"""The command line: what it prints, and with which exit status it ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_freeze import __version__
from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.cli import main
from tests.test_architecture import loaded_by
from tests.verify.files import Run, save, write_certificate
from tests.verify.test_refused import Touch

UNKNOWN = "CANNOT VERIFY"
BLOCK = "backbone.blocks.1.linear.weight"
Captured = pytest.CaptureFixture[str]


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "lightning_freeze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def fails(
    capsys: Captured, arguments: list[str], *said: str, label: str = "lightning-freeze"
) -> None:
    """Status 2, nothing on stdout, a message without a traceback on stderr."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith((f"{label}: ", "usage"))
    assert "Traceback" not in output.err
    assert "\x1b" not in output.err
    for text in said:
        assert text in output.err


# Answers


def test_two_files_that_are_identical_end_with_0_and_two_that_are_not_with_1(
    run: Run,
    capsys: Captured,
) -> None:
    assert main(["verify", run.base, run.base]) == 0
    assert "\nOK: identical: all 25 tensors that both have." in capsys.readouterr().out
    assert main(["verify", run.base, run.checkpoint]) == 1
    output = capsys.readouterr()
    assert "\nCHANGED: identical: 23 of 25 tensors that both have; changed: 2" in output.out
    assert output.err == ""


def test_with_a_certificate_a_trained_head_ends_with_0_and_a_changed_backbone_with_1(
    run: Run,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    changed = run.changed(tmp_path / "x.ckpt", {BLOCK: run.after[BLOCK] + 1})
    for base in ([run.base], []):
        option = ["--certificate", run.certificate]
        assert main(["verify", *base, run.checkpoint, *option]) == 0
        assert "\nOK: as certified: all 23 frozen tensors" in capsys.readouterr().out
        assert main(["verify", *base, changed, *option]) == 1
        assert (
            "\nCHANGED: not as certified: 1 tensor in backbone.blocks.1" in capsys.readouterr().out
        )


def test_every_changed_tensor_is_listed_on_demand(run: Run, capsys: Captured) -> None:
    main(["verify", run.base, run.checkpoint])
    assert "head.weight" not in capsys.readouterr().out
    main(["verify", run.base, run.checkpoint, "--tensors"])
    assert "head.weight" in capsys.readouterr().out


def test_the_result_is_written_as_json(run: Run, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "out" / "result.json"
    assert main(["verify", run.base, run.checkpoint, "--json", str(path)]) == 1
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["ok"] is False
    assert content["verdict"] in capsys.readouterr().out


def test_a_model_that_stands_twice_is_told_by_a_prefix(
    run: Run,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    two = {f"{p}.{n}": t for p in ("student", "teacher") for n, t in run.before.items()}
    path = save(tmp_path / "two.pt", two)
    said = ("`student.`", "`teacher.`", "`--prefix teacher`")
    fails(capsys, ["verify", run.base, path], *said, label=UNKNOWN)
    assert main(["verify", run.base, path, "--prefix", "teacher"]) == 0


def test_a_certified_tensor_that_is_not_there_ends_with_2_unless_another_changed(
    run: Run,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    fewer = {name: tensor for name, tensor in run.after.items() if name != BLOCK}
    path = save(tmp_path / "x.pt", fewer)
    assert main(["verify", path, "--certificate", run.certificate]) == 2
    assert "\nCANNOT VERIFY: missing: 1 tensor in backbone.blocks.1" in capsys.readouterr().out
    other = "backbone.embed.bias"
    path = save(tmp_path / "x.pt", {**fewer, other: fewer[other] + 1})
    assert main(["verify", path, "--certificate", run.certificate]) == 1


@pytest.mark.parametrize(("code", "status"), [("frozen-changed", 1), ("no-gradient", 0)])
def test_only_a_finding_about_weights_ends_with_1(
    run: Run,
    tmp_path: Path,
    capsys: Captured,
    code: str,
    status: int,
) -> None:
    findings = ({"code": code, "names": [BLOCK], "message": "Look here."},)
    whole = replace(read_certificate(run.certificate), findings=findings)
    path = write_certificate(tmp_path / "c.json", whole)
    assert main(["verify", run.checkpoint, "--certificate", path]) == status
    assert f"the certificate records [{code}] Look here." in capsys.readouterr().out


# No answer


def test_wrong_arguments_end_with_2(run: Run, tmp_path: Path, capsys: Captured) -> None:
    fails(capsys, [], "subcommand")
    fails(capsys, ["verfy"], "verify")
    fails(capsys, ["verify"], "`verify` needs a file: `lightning-freeze verify BASE CHECKPOINT`")
    fails(capsys, ["verify", run.base], "nothing to compare", "`--certificate FILE`")
    fails(capsys, ["verify", run.base, run.checkpoint, "--tensor", "x"], "x")
    fails(capsys, ["verify", "null", "1.0"], "There is no file or folder `1.0`", label=UNKNOWN)
    both = ["verify", run.base, run.checkpoint]
    fails(capsys, [*both, "--prefix", "bart"], "`--prefix bart`: no name", label=UNKNOWN)
    fails(capsys, [*both, "--certificate", "x", "--no-certificate"], "exclude each other")
    fails(capsys, [*both, "--json", str(tmp_path)], "is a folder. Name a file to write")
    (tmp_path / "file").touch()
    fails(capsys, [*both, "--json", str(tmp_path / "file" / "x.json")], "can't be written")


@pytest.mark.parametrize("position", range(3))
def test_the_result_is_never_written_over_what_it_is_about(
    run: Run,
    capsys: Captured,
    position: int,
) -> None:
    path = (run.base, run.checkpoint, run.certificate)[position]
    content = Path(path).read_bytes()
    arguments = ["verify", run.base, run.checkpoint, "--certificate", run.certificate]
    fails(capsys, [*arguments, "--json", path], "would be written over what it is about")
    assert Path(path).read_bytes() == content


def test_nor_over_a_file_in_a_folder_of_weights(
    folder: Path,
    run: Run,
    capsys: Captured,
) -> None:
    target = str(folder / "config.json")
    fails(
        capsys, ["verify", str(folder), run.checkpoint, "--json", target], "would be written over"
    )


def test_files_that_cannot_be_verified_end_with_2(
    run: Run,
    folder: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    mark = tmp_path / "mark"
    code = save(tmp_path / "code.ckpt", {"state_dict": run.after, "hparams": Touch(mark)})
    fails(
        capsys,
        ["verify", run.base, code],
        "was refused",
        "Nothing of it was executed",
        label=UNKNOWN,
    )
    assert not mark.exists()
    for source, name in (
        (Path(run.checkpoint), "cut.ckpt"), (folder / "model.safetensors", "cut.safetensors")
    ):  # fmt: skip
        (tmp_path / name).write_bytes(source.read_bytes()[:-100])
        fails(
            capsys, ["verify", run.base, str(tmp_path / name)], "cut off or damaged", label=UNKNOWN
        )
    fails(capsys, ["verify", run.base, str(folder)], "are different models", label=UNKNOWN)
    fails(capsys, ["verify", str(folder), run.checkpoint], "are different models", label=UNKNOWN)
    odd = save(tmp_path / "odd.pt", {**run.before, BLOCK: torch.zeros(8, 8).to_sparse()})
    fails(capsys, ["verify", run.base, odd], "only dense tensors can be compared", label=UNKNOWN)


def test_a_message_cannot_act_on_a_terminal(here: Path, capsys: Captured) -> None:
    path = save(here / "x.pt", {"\x1b[31m": 3})
    fails(capsys, ["verify", path, path], "holds a dict with `\\x1b[31m`", label=UNKNOWN)
    gone = ["verify", path, "\x1b[31m\nOK: fine"]
    fails(capsys, gone, "There is no file or folder `\\x1b[31m\\nOK: fine`", label=UNKNOWN)


def test_the_certificate_in_a_checkpoint_is_used_unless_it_is_left_out(
    run: Run, tmp_path: Path, capsys: Captured
) -> None:
    held = {"certificate": read_certificate(run.certificate).to_dict()}
    path = save(tmp_path / "x.ckpt", {**run.content, "callbacks": {"A": held}})
    for arguments in ([run.base, path], [path]):
        assert main(["verify", *arguments]) == 0
        assert "\nOK: as certified: all 23 frozen tensors" in capsys.readouterr().out
    assert main(["verify", run.base, path, "--no-certificate"]) == 1
    assert "\nCHANGED: identical: 23 of 25" in capsys.readouterr().out
    fails(capsys, ["verify", path, "--no-certificate"], "nothing to compare")


def test_a_certificate_that_is_none_ends_with_2(
    run: Run,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    text = Path(run.certificate).read_text(encoding="utf-8")
    position = text.index('"fingerprint": "') + 16
    flipped = text[:position] + ("1" if text[position] == "0" else "0") + text[position + 1 :]
    for content, said in (
        (flipped, "was changed after it was written, or damaged"),
        ("not JSON", "is neither JSON"),
        ('{"model": "bert"}', "is no certificate"),
        (text.replace('"version": 1', '"version": 2'), "upgrade"),
    ):
        (tmp_path / "c.json").write_text(content, encoding="utf-8")
        arguments = ["verify", run.base, run.checkpoint, "--certificate", str(tmp_path / "c.json")]
        fails(capsys, arguments, said, "c.json", label=UNKNOWN)
    fails(
        capsys,
        ["verify", run.base, run.checkpoint, "--certificate", run.checkpoint],
        "holds no certificate",
        label=UNKNOWN,
    )


def test_a_mistake_of_ours_does_not_look_like_changed_weights(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("lightning_freeze.checkpoints.verify.compare.identical", broken)
    fails(capsys, ["verify", run.base, run.base], "unexpected KeyError: 'oops'. Please report it")


# The process


def test_help_says_what_is_compared_and_what_the_exit_status_means(capsys: Captured) -> None:
    assert main(["verify", "--help"]) == 0
    text = capsys.readouterr().out
    for line in (
        "usage: lightning-freeze verify BASE [CHECKPOINT] [options]",
        "  lightning-freeze verify BASE CHECKPOINT --certificate FILE",
        "exit status and first words: 0, OK, if it is as it has to be; 1, CHANGED, if anything ch",
        "frozen-buffer-changed, frozen-changed, parameter-replaced, rank-mismatch, resume-mismatch",
        "such as no-gradient, is printed and doesn't count",
    ):
        assert line in text
    assert "null" not in text
    assert main(["--help"]) == 0
    assert "compare weights to the bit" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_it_runs_as_a_process_without_lightning(run: Run, tmp_path: Path) -> None:
    # a folder of this name that can't be imported
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = process("verify", run.base, run.checkpoint, env={**os.environ, "PYTHONPATH": path})
    assert (found.returncode, found.stderr) == (1, "")
    assert "changed: 2 tensors in head" in found.stdout
    found = process("verify", run.base, "gone.ckpt")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("CANNOT VERIFY: There is no file or folder `gone.ckpt`.")


def test_the_command_is_installed_under_its_name() -> None:
    content = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\nlightning-freeze = "lightning_freeze.cli:main"' in content


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_reader_who_leaves_is_no_error_and_a_full_disk_is(run: Run) -> None:
    base = shlex.quote(str(run.base))
    python = shlex.quote(sys.executable)
    command = f"{python} -W ignore -m lightning_freeze verify {base} {base}"
    for after, status in (
        ("| true; echo ${PIPESTATUS[0]} >&2", 0),
        ("> /dev/full; echo $? >&2", 2),
    ):
        found = subprocess.run(
            ["bash", "-c", f"{command} {after}"], capture_output=True, text=True, check=True
        )
        *said, last = found.stderr.splitlines()
        assert int(last) == status
        assert len(said) == (status == 2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_a_complaint_that_nobody_can_read_still_ends_with_2(run: Run, stderr: str) -> None:
    python, base = shlex.quote(sys.executable), shlex.quote(run.base)
    for arguments in (f"{base} nope", "", f"{base} {base} --certificate nope >/dev/full"):
        command = f"{python} -W ignore -m lightning_freeze verify {arguments} {stderr}"
        found = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
        assert (found.returncode, found.stdout) == (2, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd/1").exists(), reason="needs /proc")
def test_the_result_may_go_where_the_text_goes(run: Run, tmp_path: Path) -> None:
    # as /dev/stdout, which a mistake here must not be able to replace
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    arguments = ["verify", run.base, run.base, "--json", str(link)]
    out = process(*arguments).stdout
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        command = [sys.executable, "-W", "ignore", "-m", "lightning_freeze", *arguments]
        subprocess.run(command, stdout=file, check=True)
    assert link.is_symlink()
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == out
    content, end = json.JSONDecoder().raw_decode(out)
    assert content["ok"] is True
    assert "identical: all 25 tensors that both have." in out[end:]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_terminal_without_lines_to_draw_still_gets_the_words(run: Run) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = process("verify", run.base, run.base, env=environment)
    assert found.returncode == 0
    assert "identical: all 25 tensors" in found.stdout


def test_importing_the_package_or_the_command_loads_nothing_that_only_some_need() -> None:
    loaded = loaded_by(
        "import lightning_freeze, lightning_freeze.cli, lightning_freeze.checkpoints.certificate"
    )
    assert "torch" in loaded
    assert not loaded & {"jsonargparse", "rich", "safetensors", "lightning"}
