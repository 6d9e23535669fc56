"""Surgical fine-tuning: one block trains, and neither the rest nor the head.

Lee et al. 2022, https://arxiv.org/abs/2210.11466: the first block for a shift of the input (noise,
blur), a middle one for a shift of features, the last for a shift of the output.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone.surgical("layer.0"), TrainableParamAudit()]
