"""What one worker holds: the parameters, and the memory through which they and their gradients move.

All of it is for the same parameters, in the session's order. What arrives lies in shared memory (`sharing`) exactly as
long as that is in use, and in memory of the worker's own otherwise.

The worker's side of shared memory: when there is any, and when it must not be used again.

    offered      at a push that can use it, over a unix socket: the server maps it, or refuses, and bodies are used
    filled       gradients are copied in before a push is first sent, and stay until it is answered
    given up     as soon as a push was not answered at its first try: a late answer to that try may still write to it
    offered again    as it is, to a server that was started again and does not know it: the push that names it is the
                 same then, and so is what it names. Memory that was given up is left alone until that push is settled

So the bytes that a push names never change under the server, and the parameters of an answer never change under the
worker. What follows moves in bodies until everything is clear; then a new area is offered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final, final

import httpx
import torch
from torch import Tensor

from farstep.conversation import Conversation
from farstep.errors import Busy, FarstepError, OutOfMemory, Unavailable
from farstep.protocol.codecs import FULL, Codec, Wire
from farstep.protocol.dtypes import DTYPES
from farstep.protocol.memory import TORCH_DTYPES, wire_dtype
from farstep.protocol.messages import SharedPush
from farstep.protocol.shared_memory import SUPPORTED, OwnedSharedMemory, SharedMemory, make
from farstep.tensors import (
    DecodingReceiver,
    Encoder,
    GradientSender,
    HalfPrecisionReceiver,
    ParameterReceiver,
    TensorMeta,
)
from farstep.transport import this

LEAST_BYTES: Final = 256 * 1024
"""Parameters of fewer bytes move in bodies, which then take no longer."""

_LOG = logging.getLogger("farstep.sharing")


@final
class Sharing:
    """Share memory with one server for one worker.

    Args:
        server: the conversation with it.
        path: the worker's path there.
        possible: the two are on one machine, as far as this side can tell.

    Attributes:
        possible: there is shared memory, or there may be.
    """

    def __init__(self, server: Conversation, path: str, *, possible: bool) -> None:
        self._server = server
        self._path = f"{path}/memory"
        self.possible = possible and SUPPORTED
        self._process = this.process
        self._made: OwnedSharedMemory | None = None
        self._left: OwnedSharedMemory | None = None  # given up, and named by a push whose outcome may be unknown
        self._epoch = 0
        self._gradients: list[Tensor] = []
        self._fills = 0

    @property
    def memory(self) -> SharedMemory | None:
        """Return the memory in use, None while there is none."""
        return self._made.memory if self._made else None

    @property
    def foreign(self) -> bool:
        """Return whether the memory in use is that of the process this one was forked from."""
        return self._made is not None and self._process is not this.process

    def offer(self, epoch: int, parameters: Sequence[Tensor]) -> bool:
        """Make memory for these parameters and offer it; return whether there is new memory.

        There is none while some is in use, and never again once it was refused.
        """
        if not self.possible or self._made is not None or not _suitable(parameters):
            return False
        try:
            made = make(_sizes(parameters))
        except (OSError, ValueError) as exc:
            self._without(str(exc))
            return False
        try:
            if not self._offered(made, epoch):
                return False
        except (Unavailable, httpx.TransportError):
            return False  # the push that follows finds out what is the matter
        self._made, self._left, self._process, self._epoch = made, None, this.process, epoch
        self._gradients = _placed(parameters, made.memory)
        return True

    def offer_again(self, key: str) -> bool:
        """Offer the memory of that key again, to a server that does not know it; return whether the server takes it.

        Raises:
            Unavailable, httpx.TransportError: the server does not answer now.
        """
        known = [each for each in (self._made, self._left) if each is not None and each.key == key]
        return bool(known) and self._process is this.process and self._offered(known[0], self._epoch)

    def _offered(self, made: OwnedSharedMemory, epoch: int) -> bool:
        """Offer memory; return whether the server takes it. If not, none is offered any more."""
        try:
            offer = {"epoch": epoch, "key": made.key, "pid": os.getpid(), "fd": made.fd}
            self._server.control("PUT", self._path, offer)
        except FarstepError as exc:
            if isinstance(exc, Unavailable) and not isinstance(exc, (Busy, OutOfMemory)):
                raise
            self._without(exc.detail)
            return False
        return True

    def fill(self, present: Sequence[int], gradients: Sequence[Tensor | None]) -> SharedPush | None:
        """Copy gradients in and return how a push names them, None if there is no memory."""
        if self._made is None:
            return None
        sources = [each for each in gradients if each is not None]
        with torch.no_grad():
            torch._foreach_copy_([self._gradients[i] for i in present], sources)
        self._fills += 1
        return SharedPush(self._made.key, self._fills)

    def give_up(self) -> None:
        """Never touch the memory in use again."""
        self._made, self._left, self._gradients = None, self._made, []

    def settled(self) -> None:
        """Take note that every push that named memory given up has an outcome."""
        self._left = None

    def _without(self, why: str) -> None:
        self.possible = False
        _LOG.info("No shared memory with %s, so tensors move in bodies: %s", self._server.server, why)


def _suitable(parameters: Sequence[Tensor]) -> bool:
    real = all(p.device.type == "cpu" and not p.is_complex() for p in parameters)
    return real and sum(p.nbytes for p in parameters) >= LEAST_BYTES


def _sizes(parameters: Sequence[Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for p in parameters:
        sizes[_dtype_name(p)] = sizes.get(_dtype_name(p), 0) + p.numel()
    return sizes


def _placed(parameters: Sequence[Tensor], area: SharedMemory) -> list[Tensor]:
    at = dict.fromkeys(area.gradients, 0)
    placed = []
    for p in parameters:
        name = _dtype_name(p)
        placed.append(area.gradients[name][at[name] : at[name] + p.numel()].view(p.shape))
        at[name] += p.numel()
    return placed


def _dtype_name(parameter: Tensor) -> str:
    dtype = wire_dtype(parameter.dtype)
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"{parameter.dtype} has no name on the wire")
    return dtype.name


@final
class WorkerBuffers:
    """Keep the memory of one worker in step with its parameters.

    Args:
        parameters: what is trained, in the session's order.
        wire: the codecs in which tensors travel.
        sharing: memory that the server may share.

    Attributes:
        parameters: as above; updated in place.
        forms: their shapes, dtypes and devices, as the session has them.
        wire_gradients, wire_parameters: the codecs' names in headers; None where tensors travel as they are.
        receiver: where parameters arrive.
        sender: what gradients are sent from.
        encoder: what gradients are encoded by.
        sharing: as above.
    """

    def __init__(self, parameters: Sequence[Tensor], wire: Wire, sharing: Sharing) -> None:
        self.parameters = list(parameters)
        gradients, incoming = wire.codecs
        self.wire_gradients, self.wire_parameters = _name(gradients), _name(incoming)
        self.sharing = sharing
        self.receiver = _arrivals(self.parameters, incoming)
        self.encoder = Encoder(self.parameters, gradients)
        self._set_out()

    def _set_out(self) -> None:
        self.forms = list(map(TensorMeta.of, self.parameters))
        self.sender = GradientSender(self.parameters, self.encoder)

    @property
    def addresses(self) -> list[int]:
        """Return where each parameter's memory begins now."""
        return list(map(Tensor.data_ptr, self.parameters))

    @property
    def on_cpu(self) -> bool:
        """Return whether every parameter is in this machine's memory."""
        return all(p.device.type == "cpu" for p in self.parameters)

    def rebind_(self, parameters: Sequence[Tensor]) -> None:
        """Take other tensors of the same shapes and dtypes in the parameters' place."""
        self.parameters = list(parameters)
        self.forms = list(map(TensorMeta.of, parameters))
        self.receiver.rebind_(parameters)  # the sender goes by shapes and dtypes, which are the same

    def grow_(self, parameters: Sequence[Tensor], receiver: ParameterReceiver) -> None:
        """Hold more parameters behind these, which arrive in memory that was made with `ParameterReceiver.grown`."""
        self.parameters, self.receiver = [*self.parameters, *parameters], receiver
        self.encoder = self.encoder.grown(self.parameters)
        self._set_out()

    def settle(self, push: object) -> bool:
        """Take note that a push in doubt was applied; see `Encoder.settle`."""
        return self.encoder.settle(push)  # which is another one after the group that was added

    # -- shared memory ----------------------------------------------------------------------------------------------

    def fill_(self, epoch: int, present: Sequence[int], gradients: Sequence[Tensor | None]) -> SharedPush | None:
        """Put gradients into shared memory, if there is any; return how a push names them.

        Args:
            epoch: the worker's, for memory that is offered now.
            present: which parameters have a gradient.
            gradients: one for each parameter, None where it has none.
        """
        self.leave_foreign_()
        if self.sharing.offer(epoch, self.parameters) and self.sharing.memory:
            halves = self.sharing.memory.parameters
            self.receiver = self.receiver.within({TORCH_DTYPES[name]: flat for name, flat in halves.items()})
        return self.sharing.fill(present, gradients)

    def share_no_more_(self) -> None:
        """Give shared memory up until more is offered."""
        if self.sharing.memory is not None:
            self.receiver = self.receiver.within(None)
            self.sharing.give_up()

    def leave_foreign_(self) -> None:
        """Leave shared memory to the process that this one was forked from."""
        if self.sharing.foreign:
            self.share_no_more_()


def _name(codec: Codec) -> str | None:
    return None if codec is FULL else codec.name


def _arrivals(parameters: Sequence[Tensor], codec: Codec) -> ParameterReceiver:
    """Return memory for parameters that arrive in a codec."""
    if codec is FULL:
        return ParameterReceiver(parameters)
    return DecodingReceiver(parameters, codec) if codec.element is None else HalfPrecisionReceiver(parameters, codec)
