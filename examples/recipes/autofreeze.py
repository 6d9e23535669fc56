"""AutoFreeze: everything trains at first, and the lowest layers freeze as their gradients settle.

Liu et al. 2021, https://arxiv.org/abs/2102.01386. The head never freezes, and what freezes gives
its gradients and optimizer state back. On a clock instead: `GradualFreeze(start=2, every=1)`.
"""

from lightning_freeze import GradualFreeze, TrainableParamAudit

CALLBACKS = [GradualFreeze.autofreeze(every=1, percentile=50), TrainableParamAudit()]
