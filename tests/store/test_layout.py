"""Where parameters lie: in order, back to back, one buffer per real dtype."""

from typing import Any

import pytest

from farstep.errors import FarstepError, InvalidRequest, LimitExceeded, TensorMismatch
from farstep_service.layout import MAX_SEGMENTS, Layout, SegmentSpec


def test_segments_lie_back_to_back():
    """Segments keep their order within the buffer of their real dtype; complex numbers are pairs."""
    layout = Layout.build(
        [
            SegmentSpec("w", (3, 4), "float32"),
            SegmentSpec("h", (5,), "bfloat16", 1),
            SegmentSpec("z", (2,), "complex64"),
            SegmentSpec("s", (), "float32"),
            SegmentSpec("e", (0, 9), "float32", 2),
        ]
    )
    assert [(each.buffer, each.offset, each.length, each.nbytes) for each in layout.segments] == [
        ("float32", 0, 12, 48),
        ("bfloat16", 0, 5, 10),
        ("float32", 12, 4, 16),
        ("float32", 16, 1, 4),
        ("float32", 17, 0, 0),
    ]
    assert dict(layout.sizes) == {"float32": 17, "bfloat16": 5}
    assert (layout.nbytes, layout.groups) == (78, 3)
    assert layout.bytes_of([0, 2]) == 64


def test_a_layout_grows_at_its_end():
    """More segments leave the places of the present ones as they are."""
    layout = Layout.build([SegmentSpec("a", (3,), "float32"), SegmentSpec("b", (2,), "float64")])
    more = layout.append([SegmentSpec("c", (4,), "float32", 1)])
    assert more.segments[:2] == layout.segments
    assert more.segments[2].offset == 3
    with pytest.raises(TensorMismatch, match="Two parameters are called 'a'"):
        layout.append([SegmentSpec("a", (4,), "float32")])


def test_spans_are_cut_where_memory_is_not_one_piece():
    """A list of segments becomes spans of neighbours of one dtype, in the order given."""
    dtypes = ["float32", "float32", "float64", "float32", "float32"]
    layout = Layout.build(SegmentSpec(str(index), (2,), dtype) for index, dtype in enumerate(dtypes))
    assert layout.spans([0, 1, 2, 3, 4]) == [(0, 2), (2, 3), (3, 5)]
    assert layout.spans([0, 3, 4]) == [(0, 1), (3, 5)]
    assert layout.spans([]) == []
    assert list(layout.chosen(None)) == [0, 1, 2, 3, 4]
    assert list(layout.chosen([1, 3])) == [1, 2]
    with pytest.raises(InvalidRequest):
        layout.chosen([3, 9])


def test_terabytes_can_be_described():
    """Sizes beyond 32 bits are Python integers; nothing is allocated for them."""
    layout = Layout.build([SegmentSpec("a", (2**21, 2**20), "float32"), SegmentSpec("b", (2**33,), "complex128")])
    assert layout.nbytes == 2**43 + 2**37


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        (SegmentSpec("", (1,), "float32"), TensorMismatch, "no name"),
        (SegmentSpec("a\n", (1,), "float32"), TensorMismatch, "no name"),
        (SegmentSpec("\ud800", (1,), "float32"), TensorMismatch, "no name"),
        (SegmentSpec("ü" * 129, (1,), "float32"), TensorMismatch, "no name"),
        (SegmentSpec(7, (1,), "float32"), TensorMismatch, "no name"),
        (SegmentSpec("a", (1,), "int8"), TensorMismatch, "dtype"),
        (SegmentSpec("a", (1,), "int64"), TensorMismatch, "dtype"),
        (SegmentSpec("a", (1,), ["float32"]), TensorMismatch, "dtype"),
        (SegmentSpec("a", (-1,), "float32"), TensorMismatch, "Dimensions"),
        (SegmentSpec("a", (True,), "float32"), TensorMismatch, "Dimensions"),
        (SegmentSpec("a", (1.0,), "float32"), TensorMismatch, "Dimensions"),
        (SegmentSpec("a", (1,), "float32", -1), TensorMismatch, "group"),
        (SegmentSpec("a", (1,), "float32", None), TensorMismatch, "group"),
        (SegmentSpec("a", (1,), "float32", MAX_SEGMENTS), LimitExceeded, "group"),
        (SegmentSpec("a", (1,) * 17, "float32"), LimitExceeded, "17 dimensions"),
        (SegmentSpec("a", (2**40, 2**40), "float32"), LimitExceeded, "larger than"),
        (SegmentSpec("a", (2**70,), "float32"), TensorMismatch, "Dimensions"),
    ],
)
def test_what_cannot_be_stored_is_refused(spec: SegmentSpec, kind: type[FarstepError], words: str):
    """Names, dtypes, shapes and groups that cannot be are refused, naming what is wrong."""
    with pytest.raises(kind) as caught:
        Layout.build([spec])
    assert words in str(caught.value)


def test_a_session_may_begin_without_parameters():
    """An optimizer may have groups without a parameter, to which some are added later."""
    layout = Layout.build([])
    assert (layout.segments, layout.nbytes) == ((), 0)
    assert len(layout.append([SegmentSpec("late", (3,), "float32")]).segments) == 1


def test_too_many_segments_are_refused():
    """The number of segments has an end."""
    specs: Any = (SegmentSpec(str(index), (), "float32") for index in range(MAX_SEGMENTS + 1))
    with pytest.raises(LimitExceeded) as caught:
        Layout.build(specs)
    assert caught.value.limit == MAX_SEGMENTS


def test_a_stretch_is_contiguous_or_none() -> None:
    """Segments of one buffer that follow on each other have a common length; others, and no segments, have none."""
    layout = Layout.build(
        [SegmentSpec("a", (2,), "float32"), SegmentSpec("b", (3,), "float32"), SegmentSpec("c", (1,), "float64")]
    )
    for _ in range(2):  # the second time it is remembered
        assert layout.stretch(0, 2) == 5
        assert layout.stretch(1, 2) == 3
        assert layout.stretch(1, 3) is None
        assert layout.stretch(2, 2) is None
    assert layout.spans(range(3)) == layout.spans([0, 1, 2]) == [(0, 2), (2, 3)]
