"""What was measured, and what to expect of it for other sizes: `seconds = fixed + per_byte · bytes`, piece by piece.

Between two sizes that were measured a straight line is drawn; the first line and the last one are drawn on. One single
line would be wrong by half where small models fit into a cache and large ones do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farstep import __version__
from farstep_service.bench.steps import Steps

SHARE = 0.1
"""The part of a training step that its optimizer may take in the sentence about when it is worth it."""
OTHER_SIZES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True, slots=True)
class Costs:
    """Say what steps of any size take, from some that were measured.

    Args:
        points: bytes of parameters and seconds of a step, ascending, two or more.
    """

    points: Sequence[tuple[int, float]]

    @property
    def fixed_s(self) -> float:
        """Return what a step takes beside its bytes: the line through the two smallest, at no bytes."""
        nbytes, seconds = self.points[0]
        return max(0.0, seconds - nbytes * _slope(self.points[0], self.points[1]))

    @property
    def per_byte_s(self) -> float:
        """Return what each further byte adds: the slope between the two largest."""
        return _slope(self.points[-2], self.points[-1])

    def at(self, nbytes: int) -> float:
        """Return the seconds of a step with so many bytes of parameters."""
        points = [(0, self.fixed_s), *self.points]
        if nbytes >= points[-1][0]:
            return points[-1][1] + (nbytes - points[-1][0]) * self.per_byte_s
        place = next(place for place, (larger, _) in enumerate(points) if larger > nbytes)
        (x0, y0), (x1, y1) = points[place - 1 : place + 1]
        return y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0)


def _slope(smaller: tuple[int, float], larger: tuple[int, float]) -> float:
    """Return the seconds of each byte between two sizes; not below 0, which could only be noise."""
    return max(0.0, (larger[1] - smaller[1]) / (larger[0] - smaller[0]))


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """State what an empty request takes there and back."""

    median_s: float
    p99_s: float
    requests: int


@dataclass(frozen=True)
class Expectation:
    """Hold all that one run found.

    Attributes:
        server: the server's URL, None for an embedded session.
        device: where the session was.
        round_trip: of an empty request, None without a server.
        asked: the steps of the model that was asked for.
        sizes: the steps of every size, ascending, that of the model among them.
    """

    server: str | None
    device: str
    round_trip: RoundTrip | None
    asked: Steps
    sizes: Sequence[Steps]

    @property
    def costs(self) -> Costs:
        """Return what steps of any size take."""
        return Costs([(each.workload.nbytes, each.median_s) for each in self.sizes])

    @property
    def backward_s(self) -> float:
        """Return what forward and backward have to take for the step to be no more than `SHARE` of it."""
        return self.asked.median_s / SHARE

    def bytes_per_s(self, part: str) -> float | None:
        """Return how fast bytes went `up` or `down` in steps of the largest size; None if none did."""
        largest = self.sizes[-1]
        nbytes = largest.report.bytes_sent if part == "up" else largest.report.bytes_received
        seconds = largest.usual().parts_s[part]
        return nbytes / seconds if nbytes and seconds > 0 else None

    def estimates(self) -> list[tuple[int, float]]:
        """Return numbers of parameters and the seconds that a step of so many would take."""
        itemsize = self.asked.workload.itemsize
        return [(count, self.costs.at(count * itemsize)) for count in OTHER_SIZES]

    def document(self) -> dict[str, Any]:
        """Return it for `--json`."""
        asked, costs, trip = self.asked, self.costs, self.round_trip
        usual = asked.usual()
        link = None
        if trip is not None:
            link = {
                "round_trip_s": {"median": trip.median_s, "p99": trip.p99_s},
                "requests": trip.requests,
                "up_bytes_per_s": self.bytes_per_s("up"),
                "down_bytes_per_s": self.bytes_per_s("down"),
            }
        return {
            "farstep": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "server": self.server,
            "model": asked.workload.document(),
            "link": link,
            "device": {"name": self.device, "kernel": asked.report.kernel, "update_s": usual.parts_s["update"]},
            "step_s": {"median": asked.median_s, "p90": asked.p90_s, "steps": len(asked.samples)},
            "steps_per_s": 1 / asked.median_s,
            "bytes": {"sent": asked.report.bytes_sent, "received": asked.report.bytes_received},
            "where_s": {"total": usual.total_s, **usual.parts_s},
            "sizes": [
                {
                    "parameters": each.workload.parameters,
                    "bytes": each.workload.nbytes,
                    "median_s": each.median_s,
                    "steps": len(each.samples),
                }
                for each in self.sizes
            ],
            "costs": {"fixed_s": costs.fixed_s, "per_byte_s": costs.per_byte_s},
            "estimates": [{"parameters": count, "step_s": seconds} for count, seconds in self.estimates()],
            "break_even": {"share": SHARE, "backward_s": self.backward_s},
        }
