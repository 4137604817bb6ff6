"""No private session stays on the server whose optimizer never was: nobody else knows its name."""

from __future__ import annotations

import httpx
import pytest
import torch

from farstep.errors import Unavailable
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from farstep.transport import SocketTransport
from tests.support.service.servers import RunningServer, sessions_at


class Lost(httpx.BaseTransport):
    """Lose the answers of joins: an error in their place, after the server has given them."""

    def __init__(self, error: BaseException) -> None:
        self._inner = SocketTransport()
        self._error = error

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        if (request.method, request.url.path) == ("POST", "/v1/sessions"):
            response.read()
            assert response.status_code == 200
            raise self._error
        return response

    def close(self) -> None:
        self._inner.close()


def optimizer_at(url: str, **remote: object) -> Adagrad:
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Adagrad([torch.zeros(3, requires_grad=True)], **place)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (MemoryError(), MemoryError), (httpx.ReadError(""), Unavailable)],
    ids=["interrupt", "exception", "given up"],
)
def test_an_optimizer_that_never_was_leaves_no_session_behind(
    server: RunningServer, error: BaseException, raised: type[BaseException]
) -> None:
    """A private session whose maker did not hear of it is removed by its name."""
    before = sessions_at(server.url)
    with pytest.raises(raised):
        optimizer_at(server.url, transport=Lost(error), timeout_s=0.1)
    assert sessions_at(server.url) == before


def test_a_session_with_a_name_is_left_to_those_who_share_it(server: RunningServer) -> None:
    """Whoever fails to join a named session removes nothing: others may be in it."""
    with pytest.raises(KeyboardInterrupt):
        optimizer_at(server.url, transport=Lost(KeyboardInterrupt()), session="shared-by-some")
    assert "shared-by-some" in sessions_at(server.url)
