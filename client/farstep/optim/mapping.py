"""A mapping that fetches what it needs first: every method of a dict.

know_      which keys there are
read_      the values of some of them
read_all_  the values of all of them
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any


class Fetched(defaultdict[Any, Any]):
    """A `defaultdict(dict)` that fetches its keys and values from elsewhere on demand."""

    def __init__(self) -> None:
        super().__init__(dict)

    @abstractmethod
    def know_(self) -> None:
        """Fetch the keys."""

    @abstractmethod
    def read_(self, keys: Sequence[Any]) -> None:
        """Fetch the values of these keys that are not here."""

    def read_all_(self) -> None:
        """Fetch all values that are not here."""
        self.know_()
        self.read_(list(dict.keys(self)))

    def __getitem__(self, key: Any) -> Any:
        self.read_([key])
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a parameter's state, or the default where it has none."""
        self.read_([key])
        return super().get(key, default)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.know_()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.know_()
        super().__delitem__(key)

    def __contains__(self, key: object) -> bool:
        self.know_()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        self.know_()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self.know_()
        return super().__reversed__()

    def __len__(self) -> int:
        self.know_()
        return super().__len__()

    def keys(self) -> Any:
        """Return the parameters that have state; moves no tensors."""
        self.know_()
        return super().keys()

    def values(self) -> Any:
        """Return the states of all parameters."""
        self.read_all_()
        return super().values()

    def items(self) -> Any:
        """Return all parameters that have state, with it."""
        self.read_all_()
        return super().items()

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove a parameter's state and return it."""
        self.read_([key])
        return super().pop(key, *default)

    def popitem(self) -> tuple[Any, Any]:
        """Remove the last parameter's state and return both."""
        self.read_all_()
        return super().popitem()

    def clear(self) -> None:
        """Remove all state; each parameter starts anew."""
        self.know_()
        super().clear()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return a parameter's state; where it has none, set it to the default."""
        self.read_([key])
        return super().setdefault(key, default)

    def update(self, *args: Any, **named: Any) -> None:
        """Replace the states of some parameters."""
        self.know_()
        super().update(*args, **named)

    def copy(self) -> Any:
        """Return a plain mapping with the state of all parameters."""
        return defaultdict(dict, self.items())

    def __copy__(self) -> Any:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self.items()))

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self.copy() == other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(self.copy())
