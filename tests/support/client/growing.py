"""Groups that are added late, to both of two trainings."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, parameters
from tests.support.service.servers import RunningServer

LATE: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}
FRESH = itertools.count()


def named(server: RunningServer) -> RemoteOptions:
    return {"kernel": "reference", "server": server.url, "session": f"groups-{next(FRESH)}"}


def add(twins: Twins, tensors: list[Tensor], **options: Any) -> None:
    """Add a group to both."""
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        late = parameters(tensors)
        each.add_param_group({"params": late, **options})
        ps += late
