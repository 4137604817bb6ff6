"""What one worker holds: the parameters, and the memory through which they and their gradients move.

All of it is for the same parameters, in the session's order. What arrives lies in shared memory (`sharing`) exactly as
long as that is in use, and in memory of the worker's own otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from farstep.codecs import FULL, Codec, Wire
from farstep.http_link.sharing import Sharing
from farstep.messages import Fill
from farstep.tensors import DecodingReceiver, Encoder, Form, GradientSender, HalfPrecisionReceiver, ParameterReceiver
from farstep.wire.memory import TORCH_DTYPES


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
        self.forms = list(map(Form.of, self.parameters))
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
        self.forms = list(map(Form.of, parameters))
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

    def fill_(self, epoch: int, present: Sequence[int], gradients: Sequence[Tensor | None]) -> Fill | None:
        """Put gradients into shared memory, if there is any; return how a push names them.

        Args:
            epoch: the worker's, for memory that is offered now.
            present: which parameters have a gradient.
            gradients: one for each parameter, None where it has none.
        """
        self.leave_foreign_()
        if self.sharing.offer(epoch, self.parameters) and self.sharing.area:
            halves = self.sharing.area.parameters
            self.receiver = self.receiver.within({TORCH_DTYPES[name]: flat for name, flat in halves.items()})
        return self.sharing.fill(present, gradients)

    def share_no_more_(self) -> None:
        """Give shared memory up until more is offered."""
        if self.sharing.area is not None:
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
