"""The callbacks; the only place that knows Lightning."""

from lightning_freeze.callbacks.freeze_backbone import FreezeBackbone
from lightning_freeze.callbacks.frozen_feature_cache import FrozenFeatureCache
from lightning_freeze.callbacks.gradual_freeze import GradualFreeze
from lightning_freeze.callbacks.gradual_unfreeze import GradualUnfreeze
from lightning_freeze.callbacks.reinit_top_layers import ReinitTopLayers
from lightning_freeze.callbacks.trainable_param_audit import TrainableParamAudit

__all__ = [
    "FreezeBackbone",
    "FrozenFeatureCache",
    "GradualFreeze",
    "GradualUnfreeze",
    "ReinitTopLayers",
    "TrainableParamAudit",
]
