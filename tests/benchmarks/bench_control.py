"""How long control routes keep an event loop: the wait of a task that asks for its turn each millisecond.

    python tests/benchmarks/bench_control.py [--sessions 2000] [--workers 10000] [--segments 100000]

The server is in this process, without sockets, with the collector and the interpreter set as `farstep serve` sets them.
For each request: the time of its answer, and how much later than asked for the other task had its turn, in the middle
and at most. Lateness is wall time: on a machine that does something else it is that of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from dataclasses import dataclass

import httpx

from farstep_service.app import create_app
from farstep_service.server.process import loaded_for_good, take_turns
from farstep_service.settings import Settings

EVERY_S = 0.001
JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Figure:
    """What one request did to the event loop, in milliseconds."""

    what: str
    answer_ms: float
    middle_ms: float
    longest_ms: float


class Beat:
    """A task that asks for its turn again and again, and notes how late it comes."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(EVERY_S)
            self.late_s.append(time.perf_counter() - began - EVERY_S)


def document(session: str, worker: str, segments: int = 1) -> str:
    """Return what a worker joins with."""
    specs = [{"name": f"layers.{i}.weight", "shape": [1, 2], "dtype": "float32"} for i in range(segments)]
    body = {"name": session, "worker": worker, "optimizer": "Adam", "groups": [{"lr": 0.1}], "segments": specs}
    return json.dumps(body)


async def figures(sessions: int, workers: int, segments: int) -> list[Figure]:
    """Fill a server, and ask each route once."""
    found: list[Figure] = []
    transport = httpx.ASGITransport(create_app(Settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for number in range(sessions):
            await client.post("/v1/sessions", content=document(f"s{number:05}", "w0"), headers=JSON)
        for number in range(workers):
            await client.post("/v1/sessions", content=document("crowd", f"w{number:05}"), headers=JSON)
        large = document("large", "w0", segments)
        size = f"{segments} parameters, {len(large) / 1e6:.1f} MB"
        asked = [
            (f"create: {size}", "POST", "/v1/sessions", large),
            (f"join: {size}", "POST", "/v1/sessions", large),
            (f"one of {sessions} sessions' pages", "GET", "/v1/sessions", None),
            (f"a session of {workers} workers", "GET", "/v1/sessions/crowd", None),
            (f"a session of {segments} parameters", "GET", "/v1/sessions/large", None),
            ("the description, made", "GET", "/openapi.json", None),
            ("the page of it", "GET", "/docs", None),
            (f"remove {segments} parameters", "DELETE", "/v1/sessions/large", None),
        ]
        beat = Beat()
        beating = asyncio.create_task(beat.run())
        for what, method, path, content in asked:
            await asyncio.sleep(10 * EVERY_S)
            beat.late_s.clear()
            began = time.perf_counter()
            answer = await client.request(method, path, content=content, headers=JSON)
            answer_s = time.perf_counter() - began
            assert answer.is_success, answer.text
            await asyncio.sleep(3 * EVERY_S)
            late = sorted(beat.late_s)
            found.append(Figure(what, 1e3 * answer_s, 1e3 * late[len(late) // 2], 1e3 * late[-1]))
        beating.cancel()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sessions", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--segments", type=int, default=100_000)
    chosen = parser.parse_args()
    gc.collect()
    take_turns()
    with loaded_for_good():
        pass
    print("| request | answer | turn late, middle | turn late, longest |\n|---|---|---|---|")
    for each in asyncio.run(figures(chosen.sessions, chosen.workers, chosen.segments)):
        print(f"| {each.what} | {each.answer_ms:.1f} ms | {each.middle_ms:.2f} ms | {each.longest_ms:.1f} ms |")


if __name__ == "__main__":
    main()
