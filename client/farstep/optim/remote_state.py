"""`optimizer.state` of a session: fetched when it is read, and compared with what was fetched before the next step.

    unknown    the client knows nothing of the session's state, as after each step
    known      the client asked which parameters have state: eight bytes each
    read       a parameter's state was fetched because the program read it

The state of one parameter is a plain dict of tensors, as in torch. Edits by the user, in place or by other tensors, are
found by comparison with a record of the fetched state, which misses edits through `.data`. Entries under other keys
than the optimizer's are the user's own and stay here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from farstep.link import Link, in_ordinary_memory
from farstep.optim.mapping import Fetched
from farstep.optim.torch_form import as_torch, to_session
from farstep.protocol.fields import State
from farstep.tensors import Seen, same_bits

Own = dict[str, Any]


class _Unread(NamedTuple):
    """A placeholder for a parameter's state in the session; `own` are the user's own entries."""

    own: Own


@final
class RemoteState(Fetched):
    """Map parameters to their state, as `torch.optim.Optimizer.state` does.

    Args:
        link: the way to the session.
        parameters: the session's, in order.
        check: raises if the link is closed; called before each read.
        groups: returns the param groups, whose options determine the types of torch's numbers.
    """

    def __init__(
        self,
        link: Link,
        parameters: Sequence[Tensor],
        check: Callable[[], None],
        groups: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        super().__init__()
        self._link = link
        self._check = check
        self._groups = groups
        self._indices = {p: index for index, p in enumerate(parameters)}
        self._held: Sequence[Tensor] = parameters
        self._known = False
        self._version = -1
        self._present: set[int] = set()
        self._seen: dict[int, dict[str, Seen]] = {}

    # -- what the optimizer asks ------------------------------------------------------------------------------------

    def forget_(self) -> None:
        """Drop what was read; the user's own entries stay."""
        self._keep_(dict(dict.items(self)))

    def replace_(self, other: Mapping[Any, Any]) -> None:
        """Drop what was read, and take the user's own entries from another mapping."""
        self._keep_({key: value for key, value in other.items() if isinstance(value, Mapping)})

    def hold_(self, parameters: Sequence[Tensor]) -> None:
        """Read and write state in the forms of these tensors: the parameters, or their stand-ins."""
        self._held = parameters

    def append_(self, parameters: Sequence[Tensor]) -> None:
        """Add parameters that the session has just grown by; what was read or edited of the others stays."""
        for index, p in enumerate(parameters, len(self._indices)):
            self._indices[p] = index
            if self._known and self._link.has_initial_state:
                self._present.add(index)
                own = dict.get(self, p, {})
                if not self._fields_of(own):
                    dict.__setitem__(self, p, _Unread(own))

    def refresh_(self) -> None:
        """Drop what was read if it is incomplete or out of date: a state_dict is of one version."""
        if self._known:
            partly = any(isinstance(own, _Unread) for own in dict.values(self))
            if partly or self._link.stateful()[0] != self._version:
                self.forget_()

    def edits(self) -> dict[int, State | None]:
        """Return what the user changed since it was read, by the parameter's index, None where state was removed.

        Raises:
            ValueError: a part of a parameter's state is missing.
        """
        found: dict[int, State | None] = {}
        if not self._known:
            return found
        for p, index in self._indices.items():
            own = dict.get(self, p)
            if isinstance(own, _Unread):
                continue
            state = self._fields_of(own)
            if not state:
                if index in self._present:
                    found[index] = None
            elif not self._is_as_read(index, state):
                found[index] = to_session(self._held[index], state, self._link.fields)
        return found

    def differences(self, other: Mapping[Any, Any]) -> dict[int, State | None]:
        """Return the differences between another state and the session's, by the parameter's index.

        Raises:
            ValueError: a part of a parameter's state is missing.
        """
        self.know_()
        found: dict[int, State | None] = {}
        for p, index in self._indices.items():
            state = to_session(self._held[index], other.get(p) or {}, self._link.fields)
            if state is None:
                if index in self._present:
                    found[index] = None
            elif not self._is_equal(p, index, state):
                found[index] = state
        return found

    def brought(self, parameters: Sequence[Tensor]) -> dict[int, State | None]:
        """Return the state that replacing parameters bring along, by index, None for one without state.

        Raises:
            ValueError: a part of a parameter's state is missing.
        """
        replaced = {index: p for p, index in self._indices.items() if p is not parameters[index]}
        self.read_(list(replaced.values()))
        own = {index: self._fields_of(dict.get(self, parameters[index])) for index in replaced}
        fields = self._link.fields
        return {index: to_session(parameters[index], state, fields) for index, state in own.items()}

    def rebind_(self, parameters: Sequence[Tensor], brought: Mapping[int, State | None]) -> None:
        """Switch to other parameters, whose state the session has now; the old ones keep their entries."""
        self._indices = {p: index for index, p in enumerate(parameters)}
        for index, state in brought.items():
            entry = dict.pop(self, parameters[index], {})
            own = {key: value for key, value in entry.items() if key not in self._link.fields}
            self._seen.pop(index, None)
            self._present.discard(index)
            if state is not None:
                self._present.add(index)
                dict.__setitem__(self, parameters[index], _Unread(own))
            elif own:
                dict.__setitem__(self, parameters[index], own)

    def settle_(self, other: Mapping[Any, Any], changed: Mapping[int, State | None]) -> None:
        """Adopt a state that the session has now; what did not change need not be read again."""
        kept = dict(dict.items(self))
        self.replace_(other)
        for p, index in self._indices.items():
            own = dict.pop(self, p, {})
            if index in changed:
                self._seen.pop(index, None)
                self._present.add(index)
                if changed[index] is None:
                    self._present.discard(index)
                else:
                    own = _Unread(own)
            elif index in self._present:
                own = {**self._fields_of(kept[p]), **own}
            if own or isinstance(own, _Unread):
                dict.__setitem__(self, p, own)
        self._known = True

    # -- inside -----------------------------------------------------------------------------------------------------

    def _fields_of(self, own: Any) -> Own:
        return {key: own[key] for key in self._link.fields if own.get(key) is not None} if own else {}

    def _keep_(self, entries: dict[Any, Any]) -> None:
        """Forget what is known of the session; keep the user's own among these entries."""
        self._known = False
        dict.clear(self)
        for key, value in entries.items():
            value = value.own if isinstance(value, _Unread) else value
            if key in self._indices and isinstance(value, Mapping):
                value = {name: each for name, each in value.items() if name not in self._link.fields}
                if not value:
                    continue
            dict.__setitem__(self, key, value)

    def know_(self) -> None:
        """Find out which parameters have state."""
        if self._known:
            return
        self._check()
        self._version, present = self._link.stateful()
        own = dict(dict.items(self))
        dict.clear(self)
        for p, index in self._indices.items():
            if present[index]:
                dict.__setitem__(self, p, _Unread(own.pop(p, {})))
        dict.update(self, own)
        self._present = {index for index, each in enumerate(present) if each}
        self._seen = {}
        self._known = True

    @in_ordinary_memory
    def read_(self, keys: Sequence[Any]) -> None:
        """Fetch what has not been read of these keys, in one request."""
        self.know_()
        unread = [key for key in keys if isinstance(dict.get(self, key), _Unread)]
        unread.sort(key=self._indices.__getitem__)
        if not unread:
            return
        self._check()
        group_of = {p: group for group in self._groups() for p in group["params"]}
        for p, values in zip(unread, self._link.read_state([self._indices[p] for p in unread]), strict=True):
            read = {} if values is None else as_torch(p, values, self._link.fields, group_of.get(p, {}))
            self._seen[self._indices[p]] = {name: Seen.of(value) for name, value in read.items()}
            dict.__setitem__(self, p, {**read, **dict.__getitem__(self, p).own})

    def _is_as_read(self, index: int, state: Own) -> bool:
        seen = self._seen.get(index, {})
        return seen.keys() == state.keys() and all(seen[key].is_still(value) for key, value in state.items())

    def _is_equal(self, p: Tensor, index: int, state: State) -> bool:
        """Return whether the session is known to have this state, bit for bit."""
        own = dict.get(self, p)
        mine = {} if isinstance(own, _Unread) else self._fields_of(own)
        if not mine or not self._is_as_read(index, mine):
            return False
        here = to_session(self._held[index], mine, self._link.fields)
        if here is None or here.keys() != state.keys():
            return False
        return all(same_bits(here[key], value) for key, value in state.items())
