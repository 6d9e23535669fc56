"""One test for each known way in which freezing fails; `python -m tests.catalogue` runs them."""
