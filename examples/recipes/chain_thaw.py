"""Chain-thaw: the new head, then each layer alone from the bottom up, then everything.

Felbo et al. 2017 (DeepMoji), https://arxiv.org/abs/1708.00524. A stage lasts one epoch here; as in
the paper, until the validation loss stalls, it is `chain_thaw(monitor="val_loss")`.
"""

from lightning_freeze import GradualUnfreeze, TrainableParamAudit

CALLBACKS = [GradualUnfreeze.chain_thaw(every=1), TrainableParamAudit()]
