"""ULMFiT: the head first, one layer more each epoch, each layer slower than the one above it.

Howard and Ruder 2018, https://arxiv.org/abs/1801.06146. Their slanted triangular learning rate is
`torch.optim.lr_scheduler.OneCycleLR(..., pct_start=0.1)` in your `configure_optimizers`.
"""

from lightning_freeze import GradualUnfreeze, TrainableParamAudit

CALLBACKS = [GradualUnfreeze.ulmfit(), TrainableParamAudit()]
