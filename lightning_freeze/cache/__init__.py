"""Outputs of the frozen prefix, computed once per sample and replayed afterwards."""
