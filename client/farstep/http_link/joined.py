"""Where one worker stands in its session: what the session is, and the version of it that is here.

A session that was created anew is another one, and so is one that has grown by a param group which this worker does not
know: what they answer is refused before any of it reaches a parameter. So is one that went back to an older version
than this worker has seen: a server that rolled a session back says so, and a version that is too low shows it as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, final

import httpx

from farstep.conversation.answers import Joined
from farstep.conversation.replies import invalid_answer
from farstep.errors import FarstepError, SessionLost, StateRolledBack, UnknownSession
from farstep.http_link.writer import Writer
from farstep.link import Options, Parameter, SessionSpec
from farstep.protocol import from_ranges
from farstep.protocol.consistency import Consistency
from farstep.protocol.fields import FieldKind
from farstep.protocol.growth import outgrown
from farstep.protocol.messages import OptionsMode
from farstep.settings import WorkerSettings


@final
class JoinedSession:
    """Know one session as its worker does.

    Args:
        spec: what the session is.
        settings: where it is, and under which name this worker joins it.
        writer: the worker's writes, which belong to the life of the session that was joined.

    Attributes:
        spec: as above, with the groups that were added and the mode that was set since.
        fields: the optimizer's state fields; none before the session was joined.
        has_initial_state: whether a parameter has state before its first step.
        version: the version of the parameters that are here.
        seen: the latest version that this life of the session has shown this worker.
        durability: what the server keeps of the session, as text.
    """

    def __init__(self, spec: SessionSpec, settings: WorkerSettings, writer: Writer) -> None:
        self.spec = spec
        self.fields: Mapping[str, FieldKind] = {}
        self.has_initial_state = False
        self.seen = self._version = 0
        self.durability = ""
        self._settings = settings
        self._writer = writer

    @property
    def version(self) -> int:
        """The version of the parameters that are here."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.seen = max(self.seen, version)

    @property
    def options(self) -> OptionsMode:
        """Return whether the options that this worker sends are the session's, or those of its pushes alone."""
        return self._settings.options or "session"

    @property
    def forked(self) -> bool:
        """Return whether this process is a fork of the worker, whose session and streams are its parent's."""
        return self._writer.forked

    def join_(self, joined: Joined) -> None:
        """Begin a new epoch of the worker, with what the server said when it joined."""
        self.fields = joined.fields
        self.has_initial_state = joined.has_initial_state
        self.durability = joined.durability
        self.seen = 0
        self._writer.join(joined.epoch, joined.incarnation)

    def grow_(self, options: Options, parameters: Sequence[Parameter]) -> None:
        """Take note that the session has another param group."""
        spec = self.spec
        self.spec = replace(spec, groups=(*spec.groups, options), parameters=(*spec.parameters, *parameters))

    def follow_(self, mode: Consistency) -> None:
        """Go on with the mode that the session is in."""
        if mode != self.spec.consistency:
            self.spec = replace(self.spec, consistency=mode)
            barrier_s = mode.longest_wait_s
            self._writer.wait_for(barrier_s, self._settings.timeout_s + barrier_s)

    # -- answers ----------------------------------------------------------------------------------------------------

    def check_arriving(self, header: Mapping[str, Any], count: int) -> None:
        """Refuse what another life of the session answers, or a session that has grown.

        Args:
            header: of the answer.
            count: how many parameters are here.

        Raises:
            SessionLost, Fenced: it is another session, or has more of them.
            StateRolledBack: it is older than what this worker has seen.
        """
        if header.get("incarnation") != self._writer.incarnation:
            raise self._lost("was created anew at")
        self.check_version(header["version"])
        self.arriving(header, count)

    def check_version(self, version: int, seen: int | None = None) -> None:
        """Refuse a version that is older than one this life of the session has shown.

        Args:
            version: of an answer.
            seen: the latest one when the request was sent; by default the latest one of all.

        Raises:
            StateRolledBack: it is.
        """
        if version < (self.seen if seen is None else seen):
            raise self.rolled_back(version)

    def arriving(self, header: Mapping[str, Any], count: int, *, whole: bool = False) -> list[int] | None:
        """Return which parameters an answer holds, None for all that are here, which are so many.

        Args:
            header: of the answer.
            count: how many parameters are here.
            whole: all of them were asked for.

        Raises:
            Fenced: it holds all that the session has, which are not so many.
            InvalidAnswer: it holds others than those asked for.
        """
        ranges = header.get("segments")
        if ranges is not None:
            if whole and ranges != [0, count]:
                raise invalid_answer(
                    f"The answer has the segments {ranges!r:.80}; all {count} were asked for.", "segments"
                )
            return from_ranges(ranges, count, side="client")
        if header.get("count", count) != count:
            raise outgrown(self.spec.name, self._settings.worker, len(self.spec.groups), side="client")
        return None

    @contextmanager
    def there(self) -> Iterator[None]:
        """Tell in the worker's words that the session is gone, or went back.

        Raises:
            SessionLost, StateRolledBack: it is, or did.
        """
        try:
            yield
        except (UnknownSession, SessionLost, StateRolledBack) as exc:
            if (explained := self.explained(exc)) is exc:
                raise
            raise explained from exc

    def explained(self, error: FarstepError) -> FarstepError:
        """Return an error of the server in the worker's words; other errors as they are."""
        match error:
            case UnknownSession():
                return self.gone()
            case StateRolledBack(side="server"):
                now = error.extra.get("version")
                return self.rolled_back(now if type(now) is int else None)
            case SessionLost(side="client"):  # an answer to a read, which names no life of the session
                with suppress(httpx.TransportError):
                    if (told := self._writer.other_life()) is not None:
                        return self.explained(told)
        return error

    def rolled_back(self, now: int | None) -> StateRolledBack:
        """Return the error for a session that went back to the version `now`, None if that is not known."""
        where = "an older version" if now is None else f"version {now}"
        return StateRolledBack(
            f"Session {self.spec.name!r} at {self._writer.server} went back to {where}, and worker "
            f"{self._settings.worker!r} had seen version {self.seen}: the server ended before the steps between were "
            "kept, or they were undone.",
            remedy="rejoin() goes on from the session's parameters, and on_rollback='accept' does that by itself; a "
            "session with durability=farstep.Journal() loses no acknowledged step when its server ends.",
            side="client",
            version=now,
            seen=self.seen,
        )

    def gone(self) -> SessionLost:
        """Return the error for a session that the server does not know any more, in the worker's words."""
        return self._lost("is gone from")

    def _lost(self, what: str) -> SessionLost:
        return SessionLost(
            f"Session {self.spec.name!r}, of which worker {self._settings.worker!r} held version {self.version}, "
            f"{what} {self._writer.server}: the server restarted, or the session was removed.",
            remedy="Its optimizer state is lost, unless it was imported from a file: then call rejoin(), "
            "else load your last checkpoint and call rejoin(state_dict).",
            side="client",
        )
