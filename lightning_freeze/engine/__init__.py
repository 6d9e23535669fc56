"""The only writers: flags, weights, optimizers, ranks."""
