"""The table of codecs, by their names in headers, and the option that chooses them.

A codec of this package is one file and an entry in `_table`. One of another package is registered in the processes of
both sides before its first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from farstep.errors import InvalidRequest, Side, invalid_option
from farstep.protocol.codecs.codec import Codec
from farstep.protocol.codecs.elementwise import BFloat16, Float16, Full
from farstep.protocol.plain import take_pythons_own_

FULL: Final[Codec] = Full()
_table: dict[str, Codec] = {codec.name: codec for codec in (BFloat16(), Float16())}


def codecs() -> Sequence[Codec]:
    """Return every codec that a header can name."""
    return tuple(_table.values())


def register(codec: Codec) -> None:
    """Add a codec to the table of this process.

    Raises:
        ValueError: the table has one of that name.
    """
    if any(codec.name == each.name or codec.option == each.option for each in (FULL, *codecs())):
        raise ValueError(f"There is a codec {codec.name!r}, or one for wire={codec.option!r}, already.")
    _table[codec.name] = codec


def unregister(name: str) -> None:
    """Remove a registered codec."""
    del _table[name]


def codec_named(name: str | None) -> Codec:
    """Return the codec of a checked name; the full one for None."""
    return FULL if name is None else _table[name]


def check_codec(key: str, name: str | None, *, side: Side = "server") -> str | None:
    """Return the received name of a codec, or None, if it is known.

    Raises:
        InvalidRequest: the codec is unknown.
    """
    if name is not None and name not in _table:
        raise InvalidRequest(f"{key!r} is {name!r:.80}; there are {_listed(list(_table))}.", field=key, side=side)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """The codecs of a worker's float32 tensors, in each direction.

    Attributes:
        gradients: "bf16" or "fp16", or a registered codec, on the way to the server; None for unchanged.
        parameters: the same for the way back.
    """

    gradients: str | None = None
    parameters: str | None = None

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        options = [codec.option for codec in codecs()]
        for name, value in (("gradients", self.gradients), ("parameters", self.parameters)):
            if value is not None and value not in options:
                raise invalid_option(
                    f"Invalid wire: {name} as {value!r:.80}. There are {_listed(options)}.", field="wire"
                )

    @classmethod
    def of(cls, wire: Wire | str | None) -> Wire:
        """Return the value of an option: a name stands for both directions.

        Raises:
            InvalidOption: neither a `Wire` nor the option of a codec.
        """
        if isinstance(wire, Wire):
            return wire
        return cls(gradients=wire, parameters=wire)

    def __bool__(self) -> bool:
        """Return whether any tensor is encoded."""
        return bool(self.gradients or self.parameters)

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Return the codecs of both directions, gradients first."""
        return _of_option(self.gradients), _of_option(self.parameters)


def _of_option(option: str | None) -> Codec:
    return FULL if option is None else next(codec for codec in codecs() if codec.option == option)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
