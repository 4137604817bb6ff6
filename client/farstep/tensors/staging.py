"""Client-side memory: for outgoing gradients and state, and for incoming state.

Contiguous CPU tensors are sent from their own memory. `parameter_receiver` has the memory of incoming parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor

from farstep.errors import InvalidRequest, ResponseTooLarge, TensorMismatch
from farstep.protocol.fields import (
    EVERYWHERE,
    NUMBERS,
    PRESENT,
    FieldKind,
    Shapes,
    State,
    check_shape,
    mask_of,
    names_of,
    shape_of,
)
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import Sparse
from farstep.tensors.encoder import Encoder

MOST_PAIRS: Final = 2**14
"""The most rows of all parameters' elements in a free field, such as the history of LBFGS."""
LONGEST_LIST: Final = 2**20


def outgoing(tensor: Tensor) -> memoryview:
    """Return a dense tensor's bytes in row-major order, without a copy if its memory on the CPU has that order."""
    return tensor_memory(tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous())


def outgoing_gradients(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], encoder: Encoder
) -> tuple[list[int], list[Sparse], list[memoryview]]:
    """Return which parameters have a gradient, which of them are sparse, and the payload.

    Raises:
        TensorMismatch: a gradient of another dtype than its parameter.
        NonFinite: see `Encoder.check`.
    """
    present: list[int] = []
    sparse: list[Sparse] = []
    payload: list[memoryview] = []
    for index, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        if gradient is None:
            continue
        if gradient.dtype != parameter.dtype:
            raise TensorMismatch(
                f"The gradient of parameter {index} is {gradient.dtype}, the parameter {parameter.dtype}.",
                side="client",
            )
        present.append(index)
        if gradient.is_sparse:
            coalesced = gradient.detach().coalesce()
            sparse.append(Sparse(index, coalesced.sparse_dim(), coalesced._nnz()))
            values = encoder.encoded(index, coalesced.values(), sparse=True)
            payload += [outgoing(coalesced.indices()), outgoing(values)]
        else:
            payload.append(outgoing(encoder.encoded(index, gradient)))
    return present, sparse, payload


def outgoing_presence(fields: Mapping[str, FieldKind], states: Sequence[State | None]) -> list[memoryview]:
    """Return the masks of each parameter's fields."""
    names = list(fields)
    return [
        outgoing(torch.tensor([float(mask_of(own or (), names)) for own in states], dtype=torch.float64, device="cpu"))
    ]


def outgoing_state(field: str, kind: FieldKind, chosen: Sequence[tuple[Tensor, State | None]]) -> list[memoryview]:
    """Return one state field of some parameters: zeros for those without it, nothing for those that never have it.

    Args:
        field: the field's name.
        kind: the field's kind.
        chosen: the parameters with their states.

    Raises:
        ValueError: a state has another shape than the field's.
    """
    if kind == "free":
        parameter, own = chosen[0]
        value = (own or {})[field]
        number = torch.tensor(value, dtype=torch.float64, device="cpu") if not isinstance(value, Tensor) else None
        return [outgoing(cast(Tensor, value).to(parameter.dtype.to_real()) if number is None else number)]
    if kind in NUMBERS:
        return [
            outgoing(
                torch.tensor(
                    [float((own or {}).get(field, 0.0)) for _, own in chosen], dtype=torch.float64, device="cpu"
                )
            )
        ]
    views = []
    for parameter, own in chosen:
        if own and field in own:
            value = cast(Tensor, own[field])
            check_shape(field, kind, value.shape, parameter.shape)
            views.append(outgoing(value.to(parameter.dtype)))
        elif (shape := shape_of(kind, parameter.shape)) is not None:
            views.append(outgoing(torch.zeros(shape, dtype=parameter.dtype, device="cpu")))
    return views


def outgoing_contents(
    fields: Sequence[str], kinds: Mapping[str, FieldKind], chosen: Sequence[tuple[Tensor, State | None]]
) -> list[memoryview]:
    """Return parameters and state fields of some parameters.

    Args:
        fields: the fields to send, in this order: `param`, `present` and state fields.
        kinds: the optimizer's state fields.
        chosen: the parameters with their states.
    """
    payload: list[memoryview] = []
    for field in fields:
        if field == "param":
            payload += [outgoing(parameter) for parameter, _ in chosen]
        elif field == PRESENT:
            payload += outgoing_presence(kinds, [own for _, own in chosen])
        else:
            payload += outgoing_state(field, kinds[field], chosen)
    return payload


class TensorMeta(NamedTuple):
    """The form of a parameter when the session took it, which its state keeps."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> TensorMeta:
        return cls(parameter.shape, parameter.dtype, parameter.device)


class StateArrivals:
    """Memory for the incoming optimizer state of some parameters.

    Args:
        parameters: the forms of the parameters.
        fields: its fields; none if only `present` is requested.
        elements: the elements of all parameters of the session, which bound free fields.
    """

    def __init__(self, parameters: Sequence[TensorMeta], fields: Mapping[str, FieldKind], elements: int) -> None:
        self._parameters = parameters
        self._largest = MOST_PAIRS * elements + LONGEST_LIST
        self._fields = fields
        self._numbers: dict[str, Tensor] = {}
        self._elements: dict[str, dict[int, Tensor]] = {}
        self._free: dict[str, Tensor] = {}
        self._plain: set[str] = set()

    def targets(self, names: Sequence[str], shapes: Shapes) -> list[memoryview]:
        """Return the memory for the payload of these fields.

        Args:
            names: the fields.
            shapes: the shapes of free fields.

        Raises:
            InvalidRequest: not the requested fields; those that no parameter has may be missing.
            ResponseTooLarge: no optimizer of these parameters has such a shape.
        """
        needed = {name for name, kind in self._fields.items() if kind in EVERYWHERE} | {PRESENT}
        if not needed <= set(names) <= {*self._fields, PRESENT}:
            raise InvalidRequest(f"The answer has the fields {names!r:.200}, not those asked for.", side="client")
        views: list[memoryview] = []
        for name in names:
            kind = self._fields.get(name, "number")
            if kind in NUMBERS:
                self._numbers[name] = torch.empty(len(self._parameters), dtype=torch.float64, device="cpu")
                views.append(tensor_memory(self._numbers[name]))
            elif kind == "free":
                views.append(self._free_target(name, shapes))
            else:
                own = [shape_of(kind, p.shape) for p in self._parameters]
                self._elements[name] = {
                    i: torch.empty(shape, dtype=self._parameters[i].dtype, device="cpu")
                    for i, shape in enumerate(own)
                    if shape is not None
                }
                views += [tensor_memory(each) for each in self._elements[name].values()]
        return views

    def _free_target(self, name: str, shapes: Shapes) -> memoryview:
        if name not in shapes:
            raise InvalidRequest(f"The answer does not tell the shape of {name!r}.", field="shapes", side="client")
        shape = shapes[name]
        dtype = torch.float64 if shape is None else self._parameters[0].dtype.to_real()
        try:
            if math.prod(shape or ()) > self._largest:
                raise ValueError(shape)
            self._free[name] = torch.empty(shape or (), dtype=dtype, device="cpu")
        except (ValueError, RuntimeError) as exc:
            raise ResponseTooLarge(
                f"The answer has {name!r} of shape {shape!r:.80}.", field="shapes", limit=self._largest, side="client"
            ) from exc
        if shape is None:
            self._plain.add(name)
        return tensor_memory(self._free[name])

    def states(self) -> list[State | None]:
        """Return the received states, on the parameters' devices; None for a parameter without state.

        Raises:
            InvalidRequest: a field that a parameter is said to have did not arrive.
        """
        names = list(self._fields)
        states: list[State | None] = []
        for i, (p, mask) in enumerate(zip(self._parameters, self._numbers[PRESENT].tolist(), strict=True)):
            own: State = {}
            try:
                for name in names_of(mask, names):
                    own[name] = self._value(name, i, p.device)
            except (KeyError, ValueError) as exc:
                raise InvalidRequest(
                    f"The answer's state of parameter {i} is incomplete: {exc}", side="client"
                ) from exc
            states.append(own or None)
        return states

    def _value(self, name: str, index: int, device: torch.device) -> Tensor | float:
        if name in self._numbers:
            return float(self._numbers[name][index])
        if self._fields[name] == "free":
            free = self._free[name]
            return float(free) if name in self._plain else free.to(device)
        return self._elements[name][index].to(device)

    def present(self) -> list[bool]:
        """Return for each parameter whether it has state, once `present` has arrived."""
        return [mask != 0 for mask in self._numbers[PRESENT].tolist()]
