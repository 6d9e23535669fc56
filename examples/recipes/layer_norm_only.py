"""LayerNorm-only: the layer norms and the head train, nothing else.

Qi et al. 2022, https://arxiv.org/abs/2211.08682. Found by class, so RMS norms count, whatever they
are called.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone.layer_norm_only(), TrainableParamAudit()]
