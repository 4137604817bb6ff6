"""Whose options a step has: those that are in force in the session, or those that came with its pushes.

    a push of "session" options    what it changes is in force from this step on, for all workers
    a push of "push" options       what it names are all options of a group, for this step alone

Of two workers whose pushes make one step the later one's value counts, in the order in which their gradients are
summed; options for the step alone count before those that stay. Where two say different things, it is said in words.

Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from farstep.protocol.messages import PushHead

SHOWN = 3
"""Differences, and workers of one value, that are named; of more the number."""

Groups = Mapping[int, Mapping[str, Any]]
_Values = dict[tuple[int, str], list[tuple[str, Any]]]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the options that came with the pushes of a step amount to.

    Attributes:
        lasting: changes that are in force from now on.
        passing: all options of some groups, for the step alone.
        disagreement: where workers said different things, as a sentence; "" if they did not.
    """

    lasting: dict[int, dict[str, Any]] = field(default_factory=dict)
    passing: dict[int, dict[str, Any]] = field(default_factory=dict)
    disagreement: str = ""


NOTHING_NAMED: Final = Agreed()


def agreed(heads: Sequence[PushHead]) -> Agreed:
    """Return what the options of some pushes, in the order of the sum, amount to."""
    naming = [head for head in heads if head.groups]
    if not naming:
        return NOTHING_NAMED
    lasting: dict[int, dict[str, Any]] = {}
    passing: dict[int, dict[str, Any]] = {}
    values: _Values = {}
    for head in naming:
        for index, options in head.groups.items():
            if head.options == "push":
                passing[index] = dict(options)
            else:
                lasting.setdefault(index, {}).update(options)
            if len(naming) > 1:
                for name, value in options.items():
                    values.setdefault((index, name), []).append((head.name.worker, value))
    return Agreed(lasting, passing, _disagreement(values, lasting, passing))


def _disagreement(values: _Values, lasting: Groups, passing: Groups) -> str:
    different = [key for key, own in values.items() if any(value != own[0][1] for _, value in own)]
    if not different:
        return ""
    sentences = []
    for index, name in different[:SHOWN]:
        used = passing.get(index, lasting.get(index, {})).get(name)
        of_value: dict[str, list[str]] = {}
        for worker, value in values[index, name]:
            of_value.setdefault(f"{value!r:.40}", []).append(worker)
        shown = [f"{value} from {_listed(workers)}" for value, workers in [*of_value.items()][:SHOWN]]
        more = f" and {len(of_value) - SHOWN} other values" if len(of_value) > SHOWN else ""
        sentences.append(f"{name} of group {index} is {', '.join(shown)}{more}; {used!r:.40} was used.")
    if len(different) > SHOWN:
        sentences.append(f"So it is with {len(different) - SHOWN} other options.")
    return " ".join(sentences)


def _listed(workers: Sequence[str]) -> str:
    more = f" and {len(workers) - SHOWN} more" if len(workers) > SHOWN else ""
    return ", ".join(workers[:SHOWN]) + more
