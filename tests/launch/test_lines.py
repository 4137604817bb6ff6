"""Whole lines out of pieces."""

from hypothesis import given
from hypothesis import strategies as st

from farstep_service.launch.children import LONGEST_BYTES, Lines


def fed(*pieces: bytes) -> list[bytes]:
    lines = Lines()
    return [line for piece in pieces for line in lines.feed(piece)] + lines.end()


@given(st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\r", b"").replace(b"\n", b""))), st.data())
def test_lines_are_whole_however_they_are_cut(written: list[bytes], data: st.DataObject):
    """What is written line by line comes out line by line, whatever the pieces are."""
    whole = b"".join(line + b"\n" for line in written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert fed(*pieces) == written


def test_a_last_line_needs_no_end():
    """What a process wrote last is a line, also without a line's end."""
    assert fed(b"one\ntw", b"o") == [b"one", b"two"]


def test_a_line_that_is_written_over_is_what_it_became():
    """Of a progress bar its last state remains, and while it runs no memory is taken."""
    assert fed(b" 1%\r", b" 2%\r 3%\r", b"done\nnext\r\n") == [b"done", b"next"]
    assert fed(b" 1%\r 2%\r") == [b" 2%"]
    lines = Lines()
    for _ in range(100):
        assert lines.feed(b"\r" + b"x" * (LONGEST_BYTES - 2) + b"\r") == []


def test_an_endless_line_is_cut():
    """A line without an end comes out in pieces instead of filling the memory."""
    assert list(map(len, fed(b"x" * (2 * LONGEST_BYTES + 5)))) == [LONGEST_BYTES, LONGEST_BYTES, 5]
