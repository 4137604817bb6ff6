"""Train a digit classifier with several workers: `farstep launch -n 4 examples/digits_workers.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import farstep

STEPS = 200

me = farstep.worker()
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
test_images, test_labels, images, labels = images[1400:], labels[1400:], images[:1400], labels[:1400]
mine, wanted = me.share(images), me.share(labels)  # every count-th row: each is one worker's, and none is left out

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = farstep.optim.Adagrad(model.parameters(), lr=0.05, worker=me, consistency=farstep.Sync(workers=me.count))
while optimizer.version < STEPS:  # the session says how far the training is, also to a worker that was started again
    batch = torch.randint(len(mine), (32,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(mine[batch]), wanted[batch]).backward()
    optimizer.step()

if me.rank == 0:
    accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean().item()
    print(f"{me.name} of {me.count}, after {me.restart} restarts: accuracy {accuracy:.3f}")
optimizer.close()
