"""Over many families: marks and files tell the same, on a new head and on the old."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.origin.asking import states
from tests.zoo import TRANSFORMERS


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_marks_and_file_agree(family: str, tmp_path: Path) -> None:
    made: Any = TRANSFORMERS[family]()
    made.base_model.save_pretrained(tmp_path)
    model, info = type(made).from_pretrained(tmp_path, config=made.config, output_loading_info=True)
    marks = states(model)
    assert "loaded" in marks.values()
    assert set(marks.values()) <= {"loaded", "new"}
    assert states(model, tmp_path) == marks
    assert ("new" in marks.values()) == bool(info["missing_keys"])
    made.save_pretrained(tmp_path / "whole")
    whole = type(made).from_pretrained(tmp_path / "whole")
    # what the class has beside the model that was saved, such as a pooler
    beside = {name for name, _ in whole.named_parameters()} - made.state_dict().keys()
    for found in (states(whole), states(whole, tmp_path / "whole")):
        assert {name for name, state in found.items() if state == "new"} == beside
        assert {found[name] for name in found.keys() - beside} == {"loaded"}
    assert set(states(made, tmp_path / "whole").values()) == {"loaded"}
