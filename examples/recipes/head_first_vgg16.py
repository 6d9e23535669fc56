"""VGG16, head first: `features` is frozen until epoch 3, then everything trains.

The question of https://discuss.pytorch.org/t/how-the-pytorch-freeze-network-in-some-layers-only-the-rest-of-the-training/7088
and of Keras' guide to transfer learning, https://keras.io/guides/transfer_learning: train the new
classifier first, or its large gradients destroy the features. Then fine-tune with a low rate.
"""

from lightning_freeze import FreezeBackbone, TrainableParamAudit

CALLBACKS = [FreezeBackbone(unfreeze_at_epoch=3, lr_scale=0.01), TrainableParamAudit()]
