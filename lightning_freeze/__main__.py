"""`python -m lightning_freeze` is `lightning-freeze`."""

import sys

from lightning_freeze.cli import main

if __name__ == "__main__":
    sys.exit(main())
