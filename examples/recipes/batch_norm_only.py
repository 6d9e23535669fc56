"""BatchNorm-only: of a network with random weights the batch norms train, and nothing else.

Frankle et al. 2021, https://arxiv.org/abs/2003.00152. For a pretrained network with a new head
leave `head=False` out: then the head trains as well.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone.batch_norm_only(head=False), TrainableParamAudit()]
