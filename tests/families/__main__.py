"""`python -m tests.families`: what discovery finds in each family of models.

python -m tests.families                 the page docs/families.md, printed
python -m tests.families --write         ... written
python -m tests.families --all           a line for each family that transformers has
python -m tests.families bert clip       those alone, in full
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import tests.conftest  # noqa: F401  # offline and quiet; torchvision's operators are declared
from tests.families.rows import row_of
from tests.families.table import page, timm_rows, torchvision_rows, transformers_rows
from tests.families.tiny import on_meta

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def main(arguments: list[str] | None = None) -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", help="families of transformers")
    parser.add_argument("--all", action="store_true", help="every family of transformers")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.families or options.all:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        failed = 0
        for family in options.families or CONFIG_MAPPING_NAMES:
            try:
                row = row_of(family, on_meta(family))
            except LookupError:
                continue  # a part of another family's model, without a class of its own
            except Exception as error:
                print(f"{family}: not built ({type(error).__name__}: {str(error).strip()[:90]})")
                continue
            failed += not row.partition or not row.stacks
            print(" | ".join(cell or "-" for cell in row.cells()))
        return int(failed > 0)
    text = page(list(transformers_rows()), list(timm_rows()), list(torchvision_rows()))
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
