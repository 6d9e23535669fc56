"""Fine-tuning as anybody writes it. The other files in this folder add at most five lines to it."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=2,
        )
        self.bert = BertForSequenceClassification(config)  # from_pretrained("bert-base-uncased")

    def training_step(self, batch, batch_idx):
        return self.bert(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


pl.seed_everything(0)
model = Classifier()
words = torch.randint(0, 100, (32, 12))
data = DataLoader(TensorDataset(words, words[:, 0] % 2), batch_size=8)
callbacks = []
trainer = pl.Trainer(max_epochs=3, callbacks=callbacks, accelerator="cpu", logger=False)
trainer.fit(model, data)
