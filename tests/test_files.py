"""Files that are whole or not there, whatever stands at their path."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lightning_freeze.checkpoints.files import write_json, write_whole


def test_json_is_written_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.json"
    write_json(path, {"x": [1, None, "é"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": [1, None, "é"]}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    write_json(path, {"new": True})
    assert json.loads(path.read_text(encoding="utf-8")) == {"new": True}


def test_content_that_is_no_json_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"x": object()})
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_write_that_is_cut_off_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")

    def cut_off(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut_off)
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"new": True})
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    write_json(path, {"new": True})
    assert path.read_text(encoding="utf-8") != "old"


def test_a_folder_that_is_a_file_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        write_json(tmp_path / "file" / "report.json", {})


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("other threads share the umask"))
            write_whole(path, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_json_has_no_nan(tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    path = tmp_path / "x.json"
    write_json(path, {"lr": [nan, (-infinity, 1.5)], "x": {"y": infinity}})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
        "lr": ["nan", ["-inf", 1.5]],
        "x": {"y": "inf"},
    }


def test_a_path_may_begin_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_json("~/a/report.json", {})
    assert (tmp_path / "a" / "report.json").exists()


def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("there.json", "new.json"):
        (tmp_path / name).symlink_to(tmp_path / "out" / name)
    (tmp_path / "out" / "there.json").write_text("old", encoding="utf-8")
    for name in ("there.json", "new.json"):
        write_json(tmp_path / name, {"new": True})
        assert (tmp_path / name).is_symlink()
        content = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert json.loads(content) == {"new": True}
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_whole(tmp_path / name, b"hello")
            assert os.read(reader, 10) == b"hello"
        finally:
            os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "pipe"]
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path, b"hello")


def test_json_is_written_to_a_url_that_fsspec_knows() -> None:
    write_json("memory://a/b/report.json", {"x": 1})
    assert json.loads(fsspec.filesystem("memory").cat("/a/b/report.json")) == {"x": 1}
