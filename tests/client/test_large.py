"""Steps of large models: gradients, edits and answers are worked on in parts, and nobody can tell by the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import httpx
import pytest
import torch
from torch import Tensor

from farstep.errors import NonFinite, Unavailable
from farstep.optim import Adagrad
from farstep.protocol.codecs import codec_named
from farstep.settings import RemoteOptions
from farstep.tensors import Encoder, GradientSender, outgoing
from farstep.tensors.gradient_sender import LARGE_BYTES
from farstep.transport import StreamedBody
from farstep.transport.pieces import batches_of
from tests.support.client.carrying import Carrying
from tests.support.client.rounding import HALVES
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.faults import Network
from tests.support.service.servers import RunningServer

SHAPES = [(3, 5), (1200, 1000), (0, 3), (), (900, 1000), (123, 321), (4,)]
"""A bit over 8 MB: large ones, and small, empty and scalar ones before and between them."""
SHORT_S = 1.0


class Noting(Carrying):
    """Write down which requests there were; while it is armed, a push is interrupted in the middle of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path.rpartition("/")[2])
        response = super().handle_request(request)
        if not self.armed:
            return response
        kind = {"content-type": response.headers["content-type"]}
        return httpx.Response(response.status_code, headers=kind, stream=Interrupted(response), extensions={})


class Interrupted(httpx.SyncByteStream):
    """Give a part of a body, and then the user's Ctrl-C."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        left = 3_000_000
        for chunk in self._response.iter_raw():
            yield chunk
            left -= len(chunk)
            if left < 0:
                raise KeyboardInterrupt

    def close(self) -> None:
        self._response.close()


def twins_at(url: str, **remote: object) -> Twins:
    """Return an Adagrad on a server and torch's, over parameters of a few megabytes."""
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))


def edit(twins: Twins, index: int, by: Callable[[Tensor], object]) -> None:
    """Change a parameter on both sides behind its version counter."""
    for p in (twins.here[index], twins.there[index]):
        by(p.data)


def given_up(twins: Twins, seed: int, kind: type[BaseException] = Unavailable) -> None:
    """Let our step fail, after which the parameters are as they were; torch does not take it."""
    before = [p.detach().clone() for p in twins.here]
    versions = [p._version for p in twins.here]
    twins.give(drawn(seed, SHAPES))
    with pytest.raises(kind):
        twins.ours.step()
    check_parameters(twins.here, before)
    assert [p._version for p in twins.here] == versions


# -- steps -----------------------------------------------------------------------------------------------------------


def test_steps_are_torchs(server: RunningServer) -> None:
    """Parameters have torch's values bit by bit, in the memory that they had, and autograd knows that they changed."""
    twins = twins_at(server.url)
    addresses = [p.data_ptr() for p in twins.here]
    versions = [p._version for p in twins.here]
    twins.train(4)
    twins.check()
    assert [p.data_ptr() for p in twins.here] == addresses
    assert all(p._version > version for p, version in zip(twins.here, versions, strict=True))
    twins.ours.close()


def test_parameters_of_any_strides(server: RunningServer) -> None:
    """What is transposed, has gaps or shares memory with something else is updated where it lies."""
    transposed, gaps, shared = drawn(1, [(1000, 900), (1000, 800), (300, 400)])
    here = [transposed.clone().t(), gaps.clone()[::2], shared.clone()]
    tied = here[2].view(-1)
    there = parameters([transposed.t(), gaps[::2], shared])
    ours = Adagrad([p.requires_grad_() for p in here], lr=0.1, server=server.url, kernel="reference")
    theirs = torch.optim.Adagrad(there, lr=0.1, foreach=False)
    for seed in range(2, 5):
        gradients = drawn(seed, [p.shape for p in here])
        for p, q, gradient in zip(here, there, gradients, strict=True):
            p.grad, q.grad = gradient.t().contiguous().t(), gradient
        ours.step()
        theirs.step()
        here[0].data[3, 4] = there[0].data[3, 4] = 7.0
    check_parameters(here, there)
    assert torch.equal(tied, there[2].detach().view(-1))
    ours.close()


def test_missing_gradients(server: RunningServer) -> None:
    """A parameter without a gradient stays untouched between others that are updated."""
    twins = twins_at(server.url)
    twins.train(1)
    for seed in (2, 3):
        gradients: list[Tensor | None] = [*drawn(seed, SHAPES)]
        gradients[1] = None
        version = twins.here[1]._version
        twins.step(gradients)
        assert twins.here[1]._version == version
    twins.train(1, first=4)
    twins.check()
    twins.ours.close()


# -- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("index", [0, 1, 3, 4, 6])
def test_an_edit_is_found_while_gradients_are_sent(index: int, wire: str | None, server: RunningServer) -> None:
    """The session has an edit before the step that follows it, wherever it is, and the step is taken once."""
    transport = Noting()
    twins = twins_at(server.url, transport=transport, wire=wire)
    step(twins, 1, wire)
    transport.paths.clear()
    twins.there[index].data = rounded(twins.there[index].data, wire)  # an edited parameter is sent as it is here
    edit(twins, index, lambda p: p.view(-1)[-1:].add_(1))
    step(twins, 2, wire)
    assert transport.paths[-2:] == ["contents", "push"]
    assert transport.paths.count("contents") == 1
    assert twins.ours.version == 3
    step(twins, 3, wire)
    check_parameters(twins.here, [rounded(q.detach(), wire) for q in twins.there])
    twins.ours.close()


def rounded(tensor: Tensor, wire: str | None) -> Tensor:
    return tensor if wire is None else tensor.to(HALVES[wire]).to(tensor.dtype)


def step(twins: Twins, seed: int, wire: str | None) -> None:
    twins.step([rounded(g, wire) for g in drawn(seed, SHAPES)])


def test_whoever_edits_each_time_is_looked_at_first(server: RunningServer) -> None:
    """After a step that met an edit the next one looks before it sends, and sends its gradients once."""
    transport = Noting()
    twins = twins_at(server.url, transport=transport)
    for seed in range(1, 5):
        transport.paths.clear()
        edit(twins, 4, lambda p: p.clamp_(-0.5, 0.5))
        twins.step(drawn(seed, SHAPES))
        assert transport.paths == (["push", "contents", "push"] if seed == 1 else ["contents", "push"])
    twins.check()
    for seed in (5, 6):
        transport.paths.clear()
        twins.step(drawn(seed, SHAPES))
        assert transport.paths == ["push"]
    twins.check()
    twins.ours.close()


def test_an_edit_is_not_forgotten_when_a_step_was_given_up(network: Network) -> None:
    """A step that ended before all edits were looked for leaves them to the next one."""
    twins = twins_at(network.url, timeout_s=SHORT_S)
    twins.train(1)
    edit(twins, 6, lambda p: p.zero_())
    network.down = True
    given_up(twins, 2)
    network.down = False
    twins.train(2, first=3)
    twins.check()
    twins.ours.close()


# -- answers that are cut off ----------------------------------------------------------------------------------------


@pytest.mark.promise("Parameters change only by an answer that is complete.", area="client errors")
@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("after", [500, 1_300_000, 2_000_000])
def test_an_answer_that_is_cut_off_leaves_the_model_as_it_was(after: int, wire: str | None, network: Network) -> None:
    """Nothing of it is left in the parameters, and no edit is seen; the step tried again is the same push."""
    twins = twins_at(network.url, timeout_s=SHORT_S, wire=wire)
    step(twins, 1, wire)
    network.cut_response(after=after, then_down=True)
    given_up(twins, 2)
    network.down = False
    step(twins, 2, wire)
    report = twins.ours.last_step
    assert report is not None
    assert report.duplicate
    assert twins.ours.version == 2
    step(twins, 3, wire)
    assert twins.ours.version == 3
    check_parameters(twins.here, [rounded(q.detach(), wire) for q in twins.there])
    twins.ours.close()


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_step_that_is_cut_is_repeated_with_the_same_bytes(way: str, network: Network) -> None:
    """Gradients that are made while they are sent are made again, and an answer that begins anew is the one taken."""
    twins = twins_at(network.url, wire="bf16")
    step(twins, 1, "bf16")
    for seed, after in ((2, 100), (3, 1_500_000)):
        (network.cut_request if way == "request" else network.cut_response)(after=after)
        step(twins, seed, "bf16")
        report = twins.ours.last_step
        assert report is not None
        assert report.duplicate == (way == "response")
    assert twins.ours.version == 3
    check_parameters(twins.here, [rounded(q.detach(), "bf16") for q in twins.there])
    twins.ours.close()


def test_an_interrupt_while_an_answer_arrives(server: RunningServer) -> None:
    """Ctrl-C in the middle of an answer leaves the model as it was; the server has taken the step."""
    transport = Noting()
    twins = twins_at(server.url, transport=transport)
    twins.train(1)
    transport.armed = True
    given_up(twins, 2, KeyboardInterrupt)
    transport.armed = False
    twins.theirs.step()
    twins.train(1, first=3)
    assert twins.ours.version == 3
    twins.check()
    twins.ours.close()


def test_what_float16_cannot_hold_is_found_while_it_is_sent(server: RunningServer) -> None:
    """The step is not taken, nothing is unclear afterwards, and the next step is."""
    transport = Noting()
    twins = twins_at(server.url, transport=transport, wire="fp16")
    step(twins, 1, "fp16")
    gradients = drawn(2, SHAPES)
    gradients[4].view(-1)[-1] = 1e6
    twins.give(gradients)
    with pytest.raises(NonFinite, match="parameter 4 holds a finite number beyond 65504"):
        twins.ours.step()
    transport.paths.clear()
    step(twins, 3, "fp16")
    assert transport.paths == ["push"]
    assert twins.ours.version == 2
    check_parameters(twins.here, [rounded(q.detach(), "fp16") for q in twins.there])
    twins.ours.close()


# -- gradients on their way out --------------------------------------------------------------------------------------


def body(sender: GradientSender, gradients: Sequence[Tensor]) -> bytes:
    """Return a payload's bytes, each batch taken when it is made."""
    payload = sender.payload(gradients)
    assert isinstance(payload, StreamedBody)
    assert payload.nbytes == sender.nbytes
    return b"".join(bytes(each) for batch in batches_of(payload) for each in batch)


@pytest.mark.parametrize("half", [None, "bfloat16", "float16"])
def test_a_large_payload_is_the_gradients_one_after_the_other(half: str | None) -> None:
    """Whatever is joined, cut, cast or out of order, the bytes are those of each gradient as it travels."""
    shapes = [*SHAPES, *[(100,)] * 50, (900, 800), (2000,)]
    dtypes = [torch.float64 if place == 5 else torch.float32 for place in range(len(shapes))]
    gradients = [g.to(dtype) for g, dtype in zip(drawn(1, shapes), dtypes, strict=True)]
    gradients[1] = gradients[1].t().contiguous().t()
    encoder = Encoder(gradients, codec_named(half))
    sender = GradientSender(gradients, encoder)
    assert sender.nbytes >= LARGE_BYTES
    travelling = [encoder.encoded(place, g) for place, g in enumerate(gradients)]
    expected = b"".join(map(bytes, map(outgoing, travelling)))
    for _ in range(2):
        assert body(sender, gradients) == expected
