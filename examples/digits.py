"""Train a digit classifier with farstep's Adagrad: one script, one optimizer.

    python examples/digits.py                                            # embedded: the optimizer is in this process
    FARSTEP_SERVER=http://127.0.0.1:7171 python examples/digits.py       # its state is on a server

The data are scikit-learn's 1,797 handwritten digits, which come with the package (`pip install 'farstep[demo]'`).
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn

import farstep

EPOCHS = 20
BATCH = 64
TEST_IMAGES = 359

digits = load_digits()
torch.manual_seed(0)
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[order] / 16
labels = torch.tensor(digits.target)[order]
test_images, test_labels = images[:TEST_IMAGES], labels[:TEST_IMAGES]
images, labels = images[TEST_IMAGES:], labels[TEST_IMAGES:]

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
# The one line that is not torch's. Where the optimizer lives, FARSTEP_SERVER says; `server=` says it here.
optimizer = farstep.optim.Adagrad(model.parameters(), lr=0.05)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)

for epoch in range(EPOCHS):
    for batch in torch.randperm(len(images)).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch + 1:2}  loss {loss.item():.3f}  version {optimizer.version}")

with torch.no_grad():
    accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean().item()
where = os.environ.get("FARSTEP_SERVER") or "this process"
print(f"accuracy {accuracy:.3f} after {optimizer.version} steps; the optimizer was in {where}")
optimizer.close()
