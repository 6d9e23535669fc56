"""A model -> where its stem, its stacks of blocks and its head are."""
