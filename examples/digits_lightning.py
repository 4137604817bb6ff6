"""Train a digit classifier with PyTorch Lightning: `python examples/digits_lightning.py`.

The optimizer is made in `configure_optimizers`; nothing else is different. FARSTEP_SERVER says where it lives; without
it, in this process.
"""

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import farstep

EPOCHS = 5


class Classifier(lightning.LightningModule):
    """Two linear layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log how many images of a batch are recognised."""
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule."""
        optimizer = farstep.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


lightning.seed_everything(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target))
training, validation = random_split(data, [0.8, 0.2])
trainer = lightning.Trainer(
    max_epochs=EPOCHS, accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False
)
trainer.fit(Classifier(), DataLoader(training, batch_size=64, shuffle=True), DataLoader(validation, batch_size=360))
print(f"accuracy {trainer.callback_metrics['accuracy'].item():.3f} after {trainer.global_step} steps")
