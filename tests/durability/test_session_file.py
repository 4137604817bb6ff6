"""A session as a file: its layout to the byte, everything in it, and one version of it whatever is going on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from farstep.errors import InvalidFile, InvalidOption, TensorMismatch
from farstep.protocol.fields import PRESENT
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from farstep.protocol.session_file import DESCRIPTION, FORMAT
from farstep.protocol.tensor_file import METADATA
from farstep_service.durability import file_of
from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import PRECISION
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings
from farstep_service.tensors.contents import PARAM
from tests.session.failing import FailingKernels
from tests.session.writers import Writer, begun, new_session, parameters, sync, values
from tests.support.client.twins import some_rows
from tests.support.durability.files import described, joined, parts, read, restored, written

# -- what is in it


def test_the_layout_of_a_file() -> None:
    """Names, dtypes, shapes, order, metadata and bytes of a small session; whoever changes them changes the format."""
    session = new_session(optimizer="SGD", names=("w", "scale", "z"), groups=({"lr": 0.5, "momentum": 0.5},))
    (writer,) = begun(session)
    ones = [torch.ones_like(each) for each in values(session, 0)]
    writer.put({"param": ones})
    writer.push([None, *ones[1:]], groups={0: {"lr": 0.25}})
    head, data = parts(written(session))
    metadata = head.pop(METADATA)
    assert head == {
        "param/scale": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
        "momentum_buffer/scale": {"dtype": "F64", "shape": [], "data_offsets": [8, 16]},
        "present": {"dtype": "F64", "shape": [3], "data_offsets": [16, 40]},
        "param/w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [40, 88]},
        "param/z": {"dtype": "F32", "shape": [2, 2], "data_offsets": [88, 104]},
        "momentum_buffer/w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [104, 152]},
        "momentum_buffer/z": {"dtype": "F32", "shape": [2, 2], "data_offsets": [152, 168]},
    }
    assert list(head) == sorted(head, key=lambda name: head[name]["data_offsets"])
    assert metadata.keys() == {"farstep_format", "farstep_session"}
    assert metadata["farstep_format"] == "1"
    sgd = {
        "lr": 0.5, "momentum": 0.5, "dampening": 0, "weight_decay": 0, "nesterov": False,
        "maximize": False, "foreach": None, "differentiable": False, "fused": None,
    }  # fmt: skip
    assert json.loads(metadata["farstep_session"]) == {
        "name": "s",
        "optimizer": "SGD",
        "version": 2,
        "groups": [sgd],
        "options": [{**sgd, "lr": 0.25}],
        "consistency": {"mode": "async"},
        "nonfinite": "refuse",
        "kernel": "reference",
        "fields": {"momentum_buffer": "optional"},
        "shapes": {},
        "segments": [
            {"name": "w", "shape": [3, 4], "dtype": "float32", "group": 0},
            {"name": "scale", "shape": [], "dtype": "float64", "group": 0},
            {"name": "z", "shape": [2], "dtype": "complex64", "group": 0},
        ],
    }
    tensors = load(joined(head, data))
    assert tensors["present"].tolist() == [0, 1, 1]
    assert tensors["param/w"].eq(1).all()
    assert tensors["param/scale"].item() == 0.75
    assert tensors["param/z"].tolist() == [[0.75, 0.0]] * 2


COMPLEX = ["complex64", "complex128"]
DIMENSIONS = {"Muon": (2, 2), "SparseAdam": (1, 3)}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, list[SegmentSpec]]:
    """Choose an optimizer and parameters that it takes."""
    optimizer = draw(st.sampled_from(sorted(RULES)))
    least, most = DIMENSIONS.get(optimizer, (0, 3))
    real = [] if optimizer in ("Adafactor", *DIMENSIONS) else COMPLEX
    spec = st.builds(
        SegmentSpec,
        name=st.text(min_size=1, max_size=8).filter(str.isprintable),
        shape=st.lists(st.integers(optimizer == "Adafactor", 3), min_size=least, max_size=most),
        dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16", *real]),
        group=st.integers(0, 1),
    )
    return optimizer, draw(st.lists(spec, min_size=1, max_size=6, unique_by=lambda each: each.name))


@given(layouts(), st.integers(0, 3), st.integers(0, 10**9))
def test_a_file_gives_the_session_again(chosen: tuple[str, list[SegmentSpec]], steps: int, seed: int) -> None:
    """Any names, shapes and dtypes, before and after steps in which some gradients are missing: all of it is there."""
    optimizer, specs = chosen
    plan = Plan.build(
        name="s",
        optimizer=optimizer,
        groups=[{}, {"lr": 0.5}],
        segments=specs,
        consistency={"mode": "sync", "workers": 1, "deadline_s": 5.0},
        nonfinite="allow",
        kernel="reference",
    )
    session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
    (writer,) = begun(session, seed=seed)
    for step in range(steps):
        drawn = values(session, seed + step)
        drawn = [some_rows(each, step) for each in drawn] if optimizer == "SparseAdam" else drawn
        gradients = [None if (index + step) % 3 == 0 else each for index, each in enumerate(drawn)]
        writer.push(gradients, groups={1: {"lr": -0.1 / (1 + step)}})
    file = written(session)
    again = restored(file)
    assert (again.version, again.initialised) == (session.version, True)
    assert again.plan.difference(session.plan) is None
    assert list(again.groups) == list(session.groups)
    fields = (PARAM, *plan.rule.kinds, PRESENT)
    (here, _), (there, _) = session.copy(fields), again.copy(fields)
    assert here.fields == there.fields
    assert b"".join(here.memory()) == b"".join(there.memory())
    assert written(again) == file
    found = load(file)
    for each, expected in zip(plan.layout.segments, parameters(session), strict=True):
        shown = torch.view_as_real(expected) if expected.is_complex() else expected
        tensor = found[f"param/{each.name}"]
        assert (tensor.dtype, tensor.shape) == (shown.dtype, shown.shape)
        assert bytes(tensor_memory(tensor)) == bytes(tensor_memory(shown.contiguous()))


def test_a_name_cannot_be_taken_for_another() -> None:
    """Parameters called like fields, or like parts of other names, keep apart."""
    names = ["step", "present", "param", "param/param", "exp_avg/param", "__metadata__", "/", "a b", "é😀"]
    specs = [SegmentSpec(name, (1,), "float32") for name in names]
    plan = Plan.build(
        name="s", optimizer="Adam", groups=[{}], segments=specs, consistency={"mode": "async"},
        nonfinite="refuse", kernel="reference",
    )  # fmt: skip
    session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
    (writer,) = begun(session)
    writer.push(values(session, 1))
    head, _ = parts(written(session))
    assert len(head) == 1 + 2 + 3 * len(names)
    assert written(restored(written(session))) == written(session)


def test_many_small_parameters_are_sent_in_few_pieces() -> None:
    """Thousands of parameters, with and without elements, take a few pieces, and large ones none that is copied."""
    shapes = [(0,)] * 1500 + [(1,)] * 1500 + [(100_000,)]
    specs = [SegmentSpec(str(index), shape, "float32") for index, shape in enumerate(shapes)]
    plan = Plan.build(
        name="s", optimizer="SGD", groups=[{}], segments=specs, consistency={"mode": "async"},
        nonfinite="refuse", kernel="reference",
    )  # fmt: skip
    session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
    begun(session)
    pieces = file_of(session.snapshot()[0])
    assert [type(each) for each in pieces] == [bytes, memoryview, bytes, bytes, bytes, memoryview]
    assert written(restored(written(session))) == written(session)


# -- what is going on meanwhile


def test_what_waits_at_a_barrier_is_not_in_it() -> None:
    """One of two workers has pushed: the file is that of the last complete version, and the push goes on waiting."""
    session = new_session(consistency=sync(2))
    first, second = begun(session, "w0", "w1")
    before = written(session)
    assert first.push(values(session, 1)) == {}
    assert written(session) == before
    assert len(second.push(values(session, 2))) == 2
    assert described(parts(written(session))[0])["version"] == 1


@pytest.mark.parametrize("block", [0, 3])
def test_a_step_that_failed_in_the_middle_is_finished_first(block: int) -> None:
    """A file never holds half a step: one whose kernel failed is finished, and whoever pushed it gets the receipt."""
    kernels = FailingKernels()
    session, whole = new_session(names=("w", "b"), kernels=kernels), new_session(names=("w", "b"))
    (writer,), (other,) = begun(session), begun(whole)
    other.push(values(whole, 1))
    kernels.fault.at = block
    writer.push(values(session, 1))
    snapshot, outcomes = session.snapshot()
    assert outcomes.keys() == {writer.named(2)}
    assert b"".join(file_of(snapshot)) == written(whole)


def test_a_worker_of_before_is_refused() -> None:
    """A write named with the life that was exported is no write of the one that was imported."""
    session = new_session()
    (writer,) = begun(session)
    writer.push(values(session, 1))
    snapshot = read(written(session))
    again = Session(snapshot.plan, incarnation="there", kernels=Kernels("reference"), device="cpu")
    again.restore(snapshot)
    worker = Writer.join(again)
    assert (worker.epoch, worker.last) == (1, 0)
    with pytest.raises(Exception, match="created anew"):
        worker.push(values(again, 2), incarnation="here")
    assert again.version == 1
    worker.push(values(again, 2), incarnation="there")
    writer.push(values(session, 2))
    assert written(again) == written(session)


# -- files that are not what they should be


def adam() -> Session:
    session = new_session(optimizer="Adam", names=("w", "b"))
    (writer,) = begun(session)
    writer.push(values(session, 1))
    return session


def saying(**changes: Any) -> bytes:
    """Return a file whose session says something else; a value of `...` takes it out."""
    head, data = parts(written(adam()))
    said = {key: value for key, value in {**described(head), **changes}.items() if value is not ...}
    head[METADATA][DESCRIPTION] = json.dumps(said)
    return joined(head, data)


def with_metadata(metadata: Mapping[str, str]) -> bytes:
    head, data = parts(written(adam()))
    return joined({**head, METADATA: dict(metadata)}, data)


def with_tensors(change: Mapping[str, Any]) -> bytes:
    head, data = parts(written(adam()))
    return joined({**head, **change}, data)


def renamed(old: str, new: str) -> bytes:
    head, data = parts(written(adam()))
    return joined({new if name == old else name: each for name, each in head.items()}, data)


def reshaped(name: str, shape: Sequence[int]) -> bytes:
    head, _ = parts(written(adam()))
    return with_tensors({name: {**head[name], "shape": list(shape)}})


def with_averages(*names: str) -> bytes:
    """Return a file whose session keeps averages, of which only these are there, and of no element."""
    head, data = parts(saying(policy={"ema": 0.5}))
    return joined({**head, **{name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}}, data)


SEGMENTS = [{"name": "w", "shape": [3, 4], "dtype": "float32"}, {"name": "b", "shape": [5], "dtype": "float32"}]
FIELDS = {"step": "number", "exp_avg": "element", "exp_avg_sq": "element", "max_exp_avg_sq": "optional"}
REFUSED: dict[str, tuple[type[Exception], str, bytes]] = {
    "another safetensors file": (InvalidFile, "no farstep session", with_metadata({})),
    "half our metadata": (InvalidFile, "no farstep session", with_metadata({FORMAT: "1"})),
    "a newer format": (InvalidFile, "format '2'", with_metadata({FORMAT: "2", DESCRIPTION: "{}"})),
    "a session that is no JSON": (InvalidFile, "cannot be read", with_metadata({FORMAT: "1", DESCRIPTION: "{"})),
    "a session that is no object": (InvalidFile, "no JSON object", with_metadata({FORMAT: "1", DESCRIPTION: "[]"})),
    "depth": (InvalidFile, "cannot be read", with_metadata({FORMAT: "1", DESCRIPTION: "[" * 99_999})),
    "no optimizer": (InvalidFile, "optimizer", saying(optimizer=...)),
    "an unknown optimizer": (InvalidOption, "Adam2", saying(optimizer="Adam2")),
    "an unknown key": (InvalidFile, "hook", saying(hook="import os")),
    "no version": (InvalidFile, "version", saying(version=...)),
    "a version below zero": (InvalidFile, "version", saying(version=-1)),
    "a version beyond counting": (InvalidFile, "version", saying(version=2**53)),
    "a name that is none": (InvalidFile, "name", saying(name="../../etc")),
    "an unknown option at creation": (InvalidOption, "speed", saying(groups=[{"speed": 3}])),
    "an unknown option in force": (InvalidOption, "speed", saying(options=[{"speed": 3}])),
    "an option of another type": (InvalidOption, "lr", saying(options=[{"lr": "fast"}])),
    "no options in force": (InvalidFile, "options", saying(options=[])),
    "options for another group": (InvalidFile, "2", saying(options=[{}, {}])),
    "an unknown mode": (InvalidOption, "mode", saying(consistency={"mode": "never"})),
    "an unknown policy": (InvalidFile, "nonfinite", saying(nonfinite="maybe")),
    "a policy that nobody knows": (InvalidOption, "'clip'", saying(policy={"clip": 1})),
    "a policy out of range": (InvalidOption, "ema", saying(policy={"ema": 2.0})),
    "an average that nobody keeps": (InvalidFile, "has no tensor 'ema/w'", with_tensors(
        {"ema/w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "an average of some parameters": (InvalidFile, "'ema/w'", with_averages("ema/b")),
    "state of another release": (InvalidFile, "momentum", saying(fields={**FIELDS, "momentum": "element"})),
    "state in another order": (InvalidFile, "state", saying(fields=dict(reversed(FIELDS.items())))),
    "a parameter that is missing": (InvalidFile, "'param/c' is missing", saying(
        segments=[*SEGMENTS, {"name": "c", "shape": [1], "dtype": "float32"}])),
    "a parameter too many": (InvalidFile, "'step' is float64.2., and its session says", saying(segments=SEGMENTS[:1])),
    "a tensor too many": (InvalidFile, "has no tensor 'param/v'", with_tensors(
        {"param/v": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "a parameter of another dtype": (InvalidFile, "float16", saying(
        segments=[SEGMENTS[0], {**SEGMENTS[1], "dtype": "float16"}])),
    "a parameter twice": (TensorMismatch, "called 'w'", saying(segments=[SEGMENTS[0], SEGMENTS[0]])),
    "no parameter": (InvalidFile, "its session says", saying(segments=[])),
    "a dtype that nobody knows": (TensorMismatch, "int8", saying(segments=[{**SEGMENTS[0], "dtype": "int8"}])),
    "a tensor of another name": (InvalidFile, "'exp_avg/w' is missing", renamed("exp_avg/w", "exp_avg/v")),
    "a field that nobody knows": (InvalidFile, "missing", renamed("step", "steps")),
    "a tensor of another shape": (InvalidFile, "'param/w' is float32", reshaped("param/w", [4, 3])),
    "no presence": (InvalidFile, "'present' is missing", renamed("present", "x")),
}  # fmt: skip


@pytest.mark.promise(
    "A damaged, foreign or newer file is refused, and the culprit is named.",
    area="sessions and files",
)
@pytest.mark.parametrize(("kind", "words", "file"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_not_right_is_refused(kind: type[Exception], words: str, file: bytes) -> None:
    """What is damaged, foreign, newer or hostile is refused with its own error, which names the culprit."""
    with pytest.raises(kind, match=words):
        read(file)


@pytest.mark.parametrize(
    ("field", "value"), [("step", -1.0), ("step", 0.5), ("step", float("nan")), (PRESENT, 99.0), (PRESENT, 0.5)]
)
def test_numbers_that_no_session_can_have_leave_nothing_behind(field: str, value: float) -> None:
    """Tensors may be of the right shape and still be nonsense: there is no session then, and the name is free."""
    good = written(adam())
    head, data = parts(good)
    begin, end = head[field]["data_offsets"]
    numbers = torch.full(((end - begin) // 8,), value, dtype=TORCH_DTYPES["float64"])
    bad = read(joined(head, data[:begin] + numbers.numpy().tobytes() + data[end:]))

    async def talk() -> None:
        sessions = Registry(Settings(), ThreadPoolExecutor(1))
        with pytest.raises(TensorMismatch):
            await sessions.restore(bad)
        assert len(sessions) == 0
        assert (await sessions.restore(read(good))).name == "s"

    asyncio.run(talk())


def without_precision(file: bytes) -> bytes:
    """Return a file as it was before numbers had precisions."""
    head, data = parts(file)
    first, last = head.pop(PRECISION)["data_offsets"]
    data = data[:first] + data[last:]
    for name, entry in head.items():
        if name != METADATA:
            entry["data_offsets"] = [each - (last - first) * (each > first) for each in entry["data_offsets"]]
    begin, end = head[PRESENT]["data_offsets"]
    said = described(head)
    bit = 1 << list(said["fields"]).index(PRECISION)
    masks = torch.frombuffer(bytearray(data[begin:end]), dtype=TORCH_DTYPES["float64"]) - bit
    del said["fields"][PRECISION]
    head[METADATA][DESCRIPTION] = json.dumps(said)
    return joined(head, data[:begin] + masks.numpy().tobytes() + data[end:])


def test_a_file_of_before_there_were_precisions_is_taken() -> None:
    """Whatever has no precision in a file was float32 then, and is float32 in the session that begins with it."""
    session = new_session(optimizer="NAdam", names=("w", "b"))
    (writer,) = begun(session)
    writer.push(values(session, 1))
    good = written(session)
    assert written(restored(without_precision(good))) == good


@pytest.mark.parametrize("bits", [-1.0, 23.0, 24.5, 64.0, float("nan")])
def test_a_precision_that_no_dtype_has_is_refused(bits: float) -> None:
    """It says how numbers are rounded, so it has to be one of the four."""
    session = new_session(optimizer="NAdam", names=("w", "b"))
    (writer,) = begun(session)
    writer.push(values(session, 1))
    head, data = parts(written(session))
    begin, end = head[PRECISION]["data_offsets"]
    odd = torch.full(((end - begin) // 8,), bits, dtype=TORCH_DTYPES["float64"]).numpy().tobytes()
    with pytest.raises(TensorMismatch, match="precision"):
        restored(joined(head, data[:begin] + odd + data[end:]))
