"""The result of a bench, and estimates for other sizes: `seconds = fixed + per_byte · bytes`, piece by piece.

Straight lines connect the measured sizes; the first and the last one go on beyond them. A single line would be wrong by
half, because small models fit into a cache and large ones do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farstep import __version__
from farstep_service.bench.steps import Steps

STEP_SHARE = 0.1
"""The largest share of a training step that the optimizer may take, in the sentence about the backward pass."""
OTHER_SIZES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Estimate the seconds of steps of any size from measured ones.

    Args:
        points: bytes of parameters and seconds of a step, ascending, at least two.
    """

    points: Sequence[tuple[int, float]]

    @property
    def fixed_s(self) -> float:
        """Return the seconds of a step without bytes: the line through the two smallest sizes, at 0."""
        nbytes, seconds = self.points[0]
        return max(0.0, seconds - nbytes * _slope(self.points[0], self.points[1]))

    @property
    def per_byte_s(self) -> float:
        """Return the seconds that each further byte adds: the slope between the two largest sizes."""
        return _slope(self.points[-2], self.points[-1])

    def at(self, nbytes: int) -> float:
        """Return the seconds of a step with `nbytes` of parameters."""
        points = [(0, self.fixed_s), *self.points]
        if nbytes >= points[-1][0]:
            return points[-1][1] + (nbytes - points[-1][0]) * self.per_byte_s
        index = next(index for index, (larger, _) in enumerate(points) if larger > nbytes)
        (x0, y0), (x1, y1) = points[index - 1 : index + 1]
        return y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0)


def _slope(smaller: tuple[int, float], larger: tuple[int, float]) -> float:
    """Return the seconds per byte between two sizes; at least 0, because less can only be noise."""
    return max(0.0, (larger[1] - smaller[1]) / (larger[0] - smaller[0]))


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Record the round-trip time of empty requests."""

    median_s: float
    p99_s: float
    requests: int


@dataclass(frozen=True)
class Expectation:
    """Hold the result of one bench.

    Attributes:
        server: the server's URL; None for an embedded session.
        device: the device of the session.
        round_trip: of an empty request, None without a server.
        requested: the steps of the model that was requested.
        sizes: the steps of every size, the model's among them, ascending.
    """

    server: str | None
    device: str
    round_trip: RoundTrip | None
    requested: Steps
    sizes: Sequence[Steps]

    @property
    def costs(self) -> CostModel:
        """Return the seconds of steps of any size."""
        return CostModel([(each.workload.nbytes, each.median_s) for each in self.sizes])

    @property
    def backward_s(self) -> float:
        """Return how long the backward pass must take for the step to be no more than `STEP_SHARE` of it."""
        return self.requested.median_s / STEP_SHARE

    def bytes_per_s(self, part: str) -> float | None:
        """Return the rate of bytes `up` or `down` in steps of the largest size; None without any."""
        largest = self.sizes[-1]
        nbytes = largest.report.bytes_sent if part == "up" else largest.report.bytes_received
        seconds = largest.typical().parts_s[part]
        return nbytes / seconds if nbytes and seconds > 0 else None

    def estimates(self) -> list[tuple[int, float]]:
        """Return numbers of parameters, each with the estimated seconds of a step."""
        itemsize = self.requested.workload.itemsize
        return [(count, self.costs.at(count * itemsize)) for count in OTHER_SIZES]

    def document(self) -> dict[str, Any]:
        """Return the result as `--json` prints it."""
        requested, costs, trip = self.requested, self.costs, self.round_trip
        typical = requested.typical()
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
            "model": requested.workload.document(),
            "link": link,
            "device": {"name": self.device, "kernel": requested.report.kernel, "update_s": typical.parts_s["update"]},
            "step_s": {"median": requested.median_s, "p90": requested.p90_s, "steps": len(requested.samples)},
            "steps_per_s": 1 / requested.median_s,
            "bytes": {"sent": requested.report.bytes_sent, "received": requested.report.bytes_received},
            "where_s": {"total": typical.total_s, **typical.parts_s},
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
            "break_even": {"share": STEP_SHARE, "backward_s": self.backward_s},
        }
