"""What the tests of callers share: the server and the places of the client's tests, and no network beyond loopback."""

from __future__ import annotations

import os

from tests.client.conftest import place, server, shared, talk, threads

__all__ = ["place", "server", "shared", "talk", "threads"]

# Read when transformers and huggingface_hub are imported, which the tests of this room do: nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
