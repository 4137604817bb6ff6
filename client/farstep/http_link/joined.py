"""Where one worker stands in its session: what the session is, and the version of it that is here.

A session that was created anew is another one, and so is one that has grown by a param group which this worker does not
know: what they answer is refused before any of it reaches a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

from farstep.conversation.answers import Joined
from farstep.conversation.replies import invalid_answer
from farstep.errors import SessionLost, UnknownSession
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
    """

    def __init__(self, spec: SessionSpec, settings: WorkerSettings, writer: Writer) -> None:
        self.spec = spec
        self.fields: Mapping[str, FieldKind] = {}
        self.has_initial_state = False
        self.version = 0
        self._settings = settings
        self._writer = writer

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
        """
        if header.get("incarnation") != self._writer.incarnation:
            raise self._lost("was created anew at")
        self.arriving(header, count)

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
        """Tell in the worker's words that the session is gone.

        Raises:
            SessionLost: it is.
        """
        try:
            yield
        except UnknownSession as exc:
            raise self.gone() from exc

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
