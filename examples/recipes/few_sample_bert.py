"""Few-sample BERT: a fresh start for the top layers and the pooler, lower layers slower.

Zhang et al. 2021, https://arxiv.org/abs/2006.05987. They re-initialise 1 to 6 layers, correct
Adam's bias (as `torch.optim.AdamW` does) and train for longer than three epochs.
"""

from lightning_freeze import GradualUnfreeze, ReinitTopLayers, TrainableParamAudit

CALLBACKS = [
    ReinitTopLayers(2, seed=0),
    GradualUnfreeze.layerwise_lr_decay(0.95),
    TrainableParamAudit(),
]
