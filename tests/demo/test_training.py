"""What both runs of the demo train on: shards, batches and the first parameters are functions of their numbers."""

import pytest
import torch

from farstep.errors import InvalidOption
from farstep_service.demo.digits import accuracy_of, build_model, fingerprint_of, largest_difference, load_digits, shard
from farstep_service.demo.reports import ACCURACY_WANTED
from farstep_service.demo.training import BATCH_IMAGES, OPTIONS, Training, local_optimizer, train_locally, worker_name


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_shards_are_disjoint_and_cover_the_training_images(workers: int):
    """Every training image belongs to exactly one worker, and no worker has two more than another."""
    count = len(Training().train)
    shards = [shard(count, worker, workers) for worker in range(workers)]
    assert torch.cat(shards).sort().values.tolist() == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_training_and_test_images_are_all_the_digits():
    """1,797 images of 8 x 8 pixels between 0 and 1, of ten digits, split in two; the same split every time."""
    train, test = load_digits()
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert (float(train.images.min()), float(train.images.max())) == (0, 1)
    assert set(test.labels.tolist()) == set(range(10))
    assert torch.equal(load_digits()[1].images, test.images)
    assert not torch.equal(load_digits(1)[1].images, test.images)


def test_an_epoch_shows_a_worker_its_own_images_once():
    """The batches of one epoch hold no image twice and come from the worker's shard; the next epoch shuffles them."""
    training = Training(workers=2)
    seen = [training.indices(step, 1) for step in range(training.steps_per_epoch)]
    flat = torch.cat(seen).tolist()
    assert len(set(flat)) == len(flat) == training.steps_per_epoch * BATCH_IMAGES
    assert set(flat) <= set(shard(len(training.train), 1, 2).tolist())
    assert not torch.equal(training.indices(training.steps_per_epoch, 1), seen[0])


def test_a_batch_depends_on_its_numbers_alone():
    """Another process that asks for the same step and worker gets the same images, whatever it asked for before."""
    one, other = Training(workers=2), Training(workers=2)
    other.batch(7, 0)
    torch.rand(3)
    assert torch.equal(one.batch(123, 1).images, other.batch(123, 1).images)
    assert not torch.equal(one.batch(123, 1).images, one.batch(123, 0).images)


def test_the_first_parameters_depend_on_the_seed_alone():
    """Two processes build the same network, and torch's random state is left as it was."""
    before = torch.get_rng_state()
    assert fingerprint_of(build_model(3)) == fingerprint_of(build_model(3)) != fingerprint_of(build_model(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_largest_difference_is_that_of_one_number():
    """Models that differ in one parameter by a quarter are a quarter apart."""
    one, other = build_model(), build_model()
    assert largest_difference(one, other) == 0
    with torch.no_grad():
        next(other.parameters()).view(-1)[5] += 0.25
    assert largest_difference(one, other) == pytest.approx(0.25)


@pytest.mark.parametrize("optimizer", OPTIONS)
def test_the_local_training_reaches_the_target(optimizer: str):
    """Each optimizer of the demo recognises 97 % of the test images at the end."""
    training = Training(optimizer=optimizer)
    assert accuracy_of(train_locally(training), training.test) >= ACCURACY_WANTED


def test_the_local_training_steps_on_the_average_of_the_workers():
    """A step of the loop equals a step of torch's optimizer on (g0 + g1 + g2) / 3, bit for bit."""
    threads = torch.get_num_threads()
    training = Training(workers=3, epochs=1)
    steps: list[int] = []
    trained = train_locally(training, lambda step, loss: steps.append(step))
    model = build_model(training.seed)
    optimizer = local_optimizer(training, model)
    parameters = list(model.parameters())
    torch.set_num_threads(1)
    try:
        for step in range(training.steps):
            each = []
            for worker in range(3):
                batch = training.batch(step, worker)
                loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
                each.append(torch.autograd.grad(loss, parameters))
            for p, first, second, third in zip(parameters, *each, strict=True):
                p.grad = (first + second + third) / 3
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    assert largest_difference(trained, model) == 0
    assert steps == list(range(1, training.steps + 1))
    assert torch.get_num_threads() == threads


def test_worker_names_sort_like_their_numbers():
    """Sync mode reduces in the order of the names, the local loop in the order of the numbers: they are the same."""
    names = [worker_name(index) for index in range(64)]
    assert sorted(names) == names


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workers": 0}, "Invalid workers: 0"),
        ({"epochs": -1}, "Invalid epochs: -1"),
        ({"workers": 64}, "Invalid workers: 64"),
        ({"optimizer": "Adam2"}, "no optimizer 'Adam2'; it has Adagrad"),
    ],
)
def test_a_training_that_cannot_be_is_refused(options: dict, complaint: str):
    """Numbers out of range and optimizers without options for the demo are refused, with the valid ones."""
    with pytest.raises(InvalidOption, match=complaint):
        Training(**options)
