"""What one worker holds: the parameters, and the memory through which they and their gradients move.

All of it is for the same parameters, in the session's order. What arrives lies in shared memory (`sharing`) exactly as
long as that is in use, and in memory of the worker's own otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from farstep.http_link.sharing import Sharing
from farstep.messages import Fill
from farstep.narrow import Wire
from farstep.tensors import Arrivals, Departures, Form, NarrowArrivals, Narrowing
from farstep.wire.memory import TORCH_DTYPES


@final
class Holdings:
    """Keep the memory of one worker in step with its parameters.

    Args:
        parameters: what is trained, in the session's order.
        wire: the dtypes in which tensors travel.
        sharing: memory that the server may share.

    Attributes:
        parameters: as above; updated in place.
        forms: their shapes, dtypes and devices, as the session has them.
        wire_gradients, wire_parameters: 16-bit dtypes in which float32 tensors travel; None for their own.
        arrivals: where parameters arrive.
        departures: what gradients are sent from.
        narrowing: casts gradients; None if none are cast.
        sharing: as above.
    """

    def __init__(self, parameters: Sequence[Tensor], wire: Wire, sharing: Sharing) -> None:
        self.parameters = list(parameters)
        self.wire_gradients, self.wire_parameters = wire.dtypes
        self.sharing = sharing
        self.arrivals = (
            Arrivals(self.parameters)
            if self.wire_parameters is None
            else NarrowArrivals(self.parameters, self.wire_parameters)
        )
        self._set_out()

    def _set_out(self) -> None:
        self.forms = list(map(Form.of, self.parameters))
        half = self.wire_gradients
        self.narrowing = None if half is None else Narrowing(half, self.parameters)
        self.departures = Departures(self.parameters, self.narrowing)

    @property
    def addresses(self) -> list[int]:
        """Return where each parameter's memory begins now."""
        return list(map(Tensor.data_ptr, self.parameters))

    @property
    def on_cpu(self) -> bool:
        """Say whether every parameter is in this machine's memory."""
        return all(p.device.type == "cpu" for p in self.parameters)

    def rebind_(self, parameters: Sequence[Tensor]) -> None:
        """Take other tensors of the same shapes and dtypes in the parameters' place."""
        self.parameters = list(parameters)
        self.forms = list(map(Form.of, parameters))
        self.arrivals.rebind_(parameters)  # the departures go by shapes and dtypes, which are the same

    def grow_(self, parameters: Sequence[Tensor], arrivals: Arrivals) -> None:
        """Hold more parameters behind these, which arrive in memory that was made with `Arrivals.grown`."""
        self.parameters, self.arrivals = [*self.parameters, *parameters], arrivals
        self._set_out()

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
            self.arrivals = self.arrivals.within({TORCH_DTYPES[name]: flat for name, flat in halves.items()})
        return self.sharing.fill(present, gradients)

    def share_no_more_(self) -> None:
        """Give shared memory up until more is offered."""
        if self.sharing.area is not None:
            self.arrivals = self.arrivals.within(None)
            self.sharing.give_up()

    def leave_foreign_(self) -> None:
        """Leave shared memory to the process that this one was forked from."""
        if self.sharing.foreign:
            self.share_no_more_()
