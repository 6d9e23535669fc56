"""BitFit: the biases and the head train, nothing else.

Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199. A model without biases, such as Llama, is
told so.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone.bitfit(), TrainableParamAudit()]
