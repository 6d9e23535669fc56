"""LP-FT: a linear probe first, then everything, so that the head's first steps distort nothing.

Kumar et al. 2022, https://arxiv.org/abs/2202.10054. Here the backbone joins at epoch 3, with a
tenth of the head's learning rate.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone.lp_ft(epoch=3, lr_scale=0.1), TrainableParamAudit()]
