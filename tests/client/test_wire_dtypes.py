"""Float32 in 16 bits on the wire: torch's steps along rounded gradients, and rounded parameters here, bit by bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import count

import pytest
import torch

from farstep.errors import InvalidOption, NonFinite, Unavailable
from farstep.optim import SGD, Adagrad, Adam
from farstep.protocol.codecs import Wire, codec_named
from farstep.protocol.consistency import Sync
from farstep.settings import NonFinitePolicy, RemoteOptions, resolve
from farstep.tensors import HalfPrecisionReceiver
from farstep.tensors.half_precision_receiver import BLOCK, WideEdits
from tests.support.client.rounding import ONE_WAY, SHAPES, WIRES, Rounded, at, like, rounded
from tests.support.client.twins import check_parameters, drawn, parameters, some_rows
from tests.support.faults import Network
from tests.support.service.servers import RunningServer

FRESH = count()


@pytest.fixture
def place(server: RunningServer) -> RemoteOptions:
    """Name a session of our own on the server."""
    return {"server": server.url, "session": f"wire-{next(FRESH)}", "kernel": "reference"}


@pytest.mark.promise('`wire="bf16"` rounds float32 on the way and nothing in the session.', area="wire")
@pytest.mark.parametrize("wire", [*WIRES, *ONE_WAY], ids=str)
@pytest.mark.parametrize("name", ["Adagrad", "Adam", "ASGD"])
def test_a_training_is_torchs_with_rounded_gradients(
    name: str, wire: Wire, place: RemoteOptions, server: RunningServer
) -> None:
    """Bit by bit: the session has torch's parameters for the rounded gradients, and the worker has them rounded."""
    both = Rounded(place, wire, drawn(0, SHAPES), name)
    for seed in range(1, 9):
        both.train(1, first=seed)
        both.check()
    both.check_session(server)
    both.ours.close()


def test_only_float32_is_narrowed(place: RemoteOptions, server: RunningServer) -> None:
    """Among all dtypes, side by side in any order, the others travel as they are."""
    dtypes = [torch.float32, torch.complex64, torch.float64, torch.float32, torch.bfloat16, torch.float32]
    start = [drawn(0, [(9, 3)], dtype)[0] for dtype in [*dtypes, torch.float16]]
    both = Rounded(place, WIRES[0], start)
    both.train(4)
    both.check()
    both.check_session(server)
    report = both.ours.last_step
    assert report is not None
    elements = 9 * 3
    assert report.bytes_sent == report.bytes_received == elements * (3 * 2 + 8 + 8 + 2 + 2)
    both.ours.close()


def test_half_as_many_bytes_travel(server: RunningServer) -> None:
    """Each direction that is narrowed carries half of what it did, the other one all."""
    full, sent = 4 * 1000, {}
    wires: list[Wire | str | None] = [None, "bf16", Wire(gradients="fp16"), Wire(parameters="bf16")]
    for wire in wires:
        (p,) = parameters([torch.zeros(1000)])
        optimizer = SGD([p], lr=0.1, server=server.url, wire=wire)
        p.grad = torch.ones(1000)
        optimizer.step()
        assert optimizer.last_step is not None
        sent[str(wire)] = (optimizer.last_step.bytes_sent, optimizer.last_step.bytes_received)
        optimizer.close()
    assert list(sent.values()) == [(full, full), (full // 2, full // 2), (full // 2, full), (full, full // 2)]


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_missing_gradients_leave_parameters_alone(wire: Wire, place: RemoteOptions, server: RunningServer) -> None:
    """A parameter without a gradient is not stepped; what had arrived of it is not written again."""
    both = Rounded(place, wire, drawn(0, SHAPES))
    both.train(1)
    for seed in range(2, 7):
        counters = [p._version for p in both.here]
        gradients = [None if (seed + index) % 2 else g for index, g in enumerate(like(both.here, seed))]
        both.step(gradients)
        both.check()
        for p, before, gradient in zip(both.here, counters, gradients, strict=True):
            assert (p._version > before) == (gradient is not None)
    both.check_session(server)
    both.ours.close()


@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
def test_values_of_sparse_gradients_are_narrowed(name: str, place: RemoteOptions, server: RunningServer) -> None:
    """Their indices are not."""
    both = Rounded(place, WIRES[0], drawn(0, [(12, 3)]), name)
    for seed in range(1, 6):
        (dense,) = like(both.here, seed)
        gradient = some_rows(dense, seed)
        both.here[0].grad = gradient.clone()
        values = rounded(gradient.values(), "bf16")
        both.there[0].grad = torch.sparse_coo_tensor(
            gradient.indices(), values, gradient.shape, check_invariants=True
        ).coalesce()
        both.ours.step()
        both.theirs.step()
        report = both.ours.last_step
        assert report is not None
        assert report.bytes_sent == gradient.indices().nbytes + gradient.values().nbytes // 2
        both.check()
    both.check_session(server)
    both.ours.close()


@pytest.mark.promise('`wire="bf16"` rounds float32 on the way and nothing in the session.', area="wire")
@pytest.mark.parametrize("wire", [*WIRES, Wire(parameters="bf16")], ids=str)
def test_edits_are_sent_in_full_and_nothing_else_is(wire: Wire, place: RemoteOptions, server: RunningServer) -> None:
    """An edited parameter replaces the session's with all its bits; unedited ones keep what rounding hid from here."""
    both = Rounded(place, wire, drawn(0, SHAPES))
    both.train(3)
    tiny = torch.finfo(torch.float32).eps
    for p, q in ((both.here[0], both.there[0]), (both.here[5], both.there[5])):
        edited = p.detach() * (1 + 2 * tiny)  # lost by rounding, and an edit all the same
        assert not torch.equal(edited, p)
        p.data.copy_(edited)
        q.data.copy_(edited)
    assert both.edited() == [0, 5]
    both.train(2, first=4)
    both.check()
    both.check_session(server)
    both.ours.close()


def test_an_edit_that_is_taken_back_is_none(place: RemoteOptions) -> None:
    """The bytes decide, also of parameters in other memory or of other strides."""
    both = Rounded(place, WIRES[0], drawn(0, SHAPES))
    both.train(2)
    p = both.here[0]
    before = p.data
    p.data = before.t().contiguous().t()
    assert both.edited() == []
    p.data[3, 2] += 1
    assert both.edited() == [0]
    p.data[3, 2] = before[3, 2]
    p.data = before
    assert both.edited() == []
    both.ours.close()


def test_a_pull_brings_rounded_parameters_and_takes_edits_away(place: RemoteOptions) -> None:
    """A worker that joins, and one that pulls, have what a step would have brought."""
    both = Rounded(place, WIRES[0], drawn(0, SHAPES))
    both.train(3)
    late = parameters(torch.zeros(shape) for shape in SHAPES)
    other = Adagrad(late, lr=0.1, **at(place, wire="bf16"))
    check_parameters(late, both.here)
    late[0].data.zero_()
    assert other.pull() == both.ours.version
    check_parameters(late, both.here)
    other.close()
    both.ours.close()


def test_a_group_that_is_added_late_travels_in_full(place: RemoteOptions) -> None:
    """The session grows by float32 parameters, and the next step narrows them as the others."""
    both = Rounded(place, WIRES[0], drawn(0, SHAPES))
    both.train(2)
    start = drawn(9, [(300,), (4, 4)])
    here, there = parameters(start), parameters(start)
    both.ours.add_param_group({"params": here})
    both.theirs.add_param_group({"params": there})
    both.here, both.there = [*both.here, *here], [*both.there, *there]
    check_parameters(here, there)
    both.train(3, first=3)
    both.check()
    both.ours.close()


@pytest.mark.parametrize("kind", [Adagrad, Adam])
def test_workers_with_other_wires_share_a_sync_session(kind: type[Adagrad], place: RemoteOptions) -> None:
    """Gradients are widened and then reduced in float32; each worker has the result as its own wire brings it."""
    wires = {"w0": WIRES[0], "w1": Wire(), "w2": WIRES[1]}
    reference = parameters(drawn(0, SHAPES))
    theirs = getattr(torch.optim, kind.__name__)(reference, lr=0.1, foreach=False)
    models = {name: parameters(drawn(0, SHAPES)) for name in wires}
    mode = Sync(workers=3, deadline_s=30)
    workers = {
        name: kind(models[name], lr=0.1, **at(place, wire=wire, worker=name, consistency=mode))
        for name, wire in wires.items()
    }
    with ThreadPoolExecutor(3) as threads:
        for seed in range(1, 5):
            gradients = {name: like(reference, 10 * seed + place) for place, name in enumerate(wires)}
            for name, model in models.items():
                for p, gradient in zip(model, gradients[name], strict=True):
                    p.grad = gradient.clone()
            for q, *each in zip(reference, *gradients.values(), strict=True):
                first, *others = (rounded(g, w.gradients) for g, w in zip(each, wires.values(), strict=True))
                q.grad = sum(others, start=first) / 3
            list(threads.map(lambda worker: worker.step(), workers.values()))
            theirs.step()
    for name, wire in wires.items():
        check_parameters(models[name], [rounded(q.detach(), wire.parameters) for q in reference])
        workers[name].close()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_lost_answer_is_repeated_with_the_same_bytes(wire: Wire, network: Network) -> None:
    """A retry carries the same narrowed gradients, so it is the same push: applied once, the receipt comes back."""
    place: RemoteOptions = {"server": network.url, "kernel": "reference"}
    both = Rounded(place, wire, drawn(0, SHAPES))
    both.train(1)
    network.cut_response(after=100)
    both.train(1, first=2)
    report = both.ours.last_step
    assert report is not None
    assert report.duplicate
    assert both.ours.version == 2
    network.cut_request(after=300)
    both.train(1, first=3)
    both.check()
    both.ours.close()


def test_a_step_that_was_given_up_is_taken_up_again(network: Network) -> None:
    """Parameters stay as they were when the answer is cut off; the same gradients again are the same push."""
    place: RemoteOptions = {"server": network.url, "kernel": "reference", "timeout_s": 1.0}
    both = Rounded(place, WIRES[0], drawn(0, [(200, 300), (5,)]))
    both.train(1)
    before = [p.detach().clone() for p in both.here]
    for p, gradient in zip(both.here, like(both.here, 2), strict=True):
        p.grad = gradient
    network.cut_response(after=50_000, then_down=True)
    with pytest.raises(Unavailable):
        both.ours.step()
    check_parameters(both.here, before)
    assert both.edited() == []
    network.down = False
    both.train(1, first=2)
    report = both.ours.last_step
    assert report is not None
    assert report.duplicate
    both.check()
    both.ours.close()


@pytest.mark.parametrize("policy", ["refuse", "allow"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_float16_does_not_make_a_finite_gradient_infinite(
    policy: NonFinitePolicy, sparse: bool, place: RemoteOptions
) -> None:
    """A number beyond 65504 is refused before anything is sent, whatever the session's policy; the next step works."""
    (p,) = parameters([torch.zeros(3, 2)])
    optimizer = SGD([p], lr=1.0, **at(place, wire="fp16", nonfinite=policy))
    gradient = torch.zeros(3, 2)
    gradient[1, 1] = 65520.0
    p.grad = gradient.to_sparse(1) if sparse else gradient
    with pytest.raises(NonFinite, match="finite number beyond 65504") as refused:
        optimizer.step()
    assert (refused.value.field, optimizer.version) == ("wire", 0)
    gradient[1, 1] = 65504.0
    p.grad = gradient
    optimizer.step()
    assert p[1, 1].item() == -65504.0
    optimizer.close()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_what_is_not_finite_is_the_sessions_matter(wire: Wire, server: RunningServer) -> None:
    """NaN and Inf travel as what they are: refused with the worker's name, or taken where the session allows them."""
    policies: tuple[NonFinitePolicy, ...] = ("refuse", "allow")
    for policy in policies:
        (p,) = parameters([torch.zeros(3)])
        options: RemoteOptions = {"server": server.url, "worker": "w7", "wire": wire, "nonfinite": policy}
        optimizer = SGD([p], lr=1.0, **options)
        p.grad = torch.tensor([1.0, float("nan"), float("-inf")])
        if policy == "refuse":
            came = wire.codecs[0].name
            with pytest.raises(NonFinite, match=f"'w7' holds NaN or Inf, as it came in {came}"):
                optimizer.step()
        else:
            optimizer.step()
            check_parameters([p], [torch.tensor([-1.0, float("nan"), float("inf")])])
        optimizer.close()


def test_a_copy_takes_its_wire_along(server: RunningServer) -> None:
    """What is made from an optimizer travels as it does."""
    (p,) = parameters([torch.ones(100)])
    optimizer = SGD([p], lr=0.1, server=server.url, wire="bf16")
    copied = deepcopy(optimizer)
    (q,) = copied.param_groups[0]["params"]
    q.grad = torch.ones(100)
    copied.step()
    assert copied.last_step is not None
    assert copied.last_step.bytes_sent == 200
    optimizer.close()
    copied.close()


# -- the option ----------------------------------------------------------------------------------------------------


def test_a_name_is_for_both_directions_and_the_environment_is_a_default() -> None:
    """`wire="bf16"` is both; FARSTEP_WIRE says the same where nothing is said, and where there is a server."""
    server = {"FARSTEP_SERVER": "http://box", "FARSTEP_WIRE": "fp16"}
    assert resolve({"wire": "bf16"}, server).wire == Wire(gradients="bf16", parameters="bf16")
    assert resolve({}, server).wire == Wire(gradients="fp16", parameters="fp16")
    assert resolve({"wire": Wire()}, server).wire == Wire()
    assert resolve({}, {"FARSTEP_WIRE": "fp16"}).wire == Wire()
    assert resolve({}, {"FARSTEP_SERVER": "http://box"}).wire == Wire()


@pytest.mark.parametrize("wire", ["bf8", "float16", 16, ["bf16"]])
def test_another_dtype_is_refused(wire: object) -> None:
    """The error names what there is."""
    with pytest.raises(InvalidOption, match=r"There are bf16\b.*\bfp16") as refused:
        resolve({"server": "http://box", "wire": wire})  # type: ignore[typeddict-item]
    assert refused.value.field == "wire"


def test_an_embedded_session_has_no_wire() -> None:
    """Nothing travels there, so nothing could be rounded; an option that does nothing is refused."""
    with pytest.raises(InvalidOption, match="embedded session has no wire") as refused:
        Adagrad(parameters([torch.zeros(2)]), wire="bf16")
    assert refused.value.field == "wire"


# -- the comparison itself -----------------------------------------------------------------------------------------


def test_widened_bits_are_compared() -> None:
    """Any bit of any tensor, at the borders of blocks too, is found, and the tensors that did not change are not."""
    sizes = [3, 0, BLOCK - 5, 7, 2 * BLOCK, 1, 4]
    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    copies = list(torch.split(flat, sizes))
    tensors = [copy.to(torch.float32) for copy in copies]
    addresses = [tensor.data_ptr() for tensor in tensors]
    edits = WideEdits(tensors, copies)
    assert edits.found(addresses) == []
    for index, place in ((0, 0), (2, -1), (3, 1), (3, 2), (4, BLOCK), (4, -1), (5, 0), (6, 3)):
        tensors[index].view(torch.int32)[place] ^= 1
        assert edits.found(addresses) == [index]
        tensors[index].view(torch.int32)[place] ^= 1
    assert edits.found(addresses) == []


def test_a_half_that_arrived_takes_half_the_memory() -> None:
    """What is known in full is kept while it is; afterwards 16 bits are."""
    (p,) = parameters([torch.ones(10)])
    receiver = HalfPrecisionReceiver([p], codec_named("bfloat16"))
    receiver.keep_()
    (view,) = receiver.targets(None)
    assert view.nbytes == 20
    view[:] = bytes([0xC0, 0x3F]) * 10  # 1.5
    receiver.settle_(None)
    check_parameters([p], [torch.full((10,), 1.5)])
    (view,) = receiver.targets(None, whole=True)
    assert view.nbytes == 40
