"""LISA: two random layers train at a time, drawn anew every 20 optimizer steps.

Pan et al. 2024, https://arxiv.org/abs/2403.17919. Embeddings and head always train. Gradients and
optimizer state are kept of what trains alone, and the draws are the same on every rank and after a
resume.
"""

from lightning_freeze import GradualUnfreeze, TrainableParamAudit

CALLBACKS = [GradualUnfreeze.lisa(layers=2, every=20, seed=0), TrainableParamAudit()]
