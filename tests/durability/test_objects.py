"""Stores elsewhere: one list of promises for each kind, the object store as a process, and which URLs name one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from farstep.errors import InvalidOption
from farstep_service.durability.objects import PIECE_BYTES, FolderObjects, Objects, open_objects
from tests.support.durability.object_store import ObjectStore, running_store

LARGE = PIECE_BYTES + 1000


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """Run an object store."""
    with running_store() as running:
        yield running


@pytest.fixture(params=["folder", pytest.param("object store", marks=pytest.mark.process)])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """Return an empty store of each kind."""
    if request.param == "folder":
        return open_objects(f"file://{tmp_path}/elsewhere")
    store: ObjectStore = request.getfixturevalue("store")
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return open_objects(f"{store.url}/{tmp_path.name.replace('_', '-').strip('-')}")


@pytest.mark.parametrize("nbytes", [0, 10, LARGE, 2 * LARGE])
def test_an_object_is_what_was_put(objects: Objects, nbytes: int) -> None:
    """Pieces of any size come back as one run of bytes, also those of large objects."""
    whole = bytes(range(251)) * (nbytes // 251 + 1)
    whole = whole[:nbytes]
    objects.put("a/1.x", (memoryview(whole)[at : at + PIECE_BYTES] for at in range(0, nbytes, PIECE_BYTES)))
    assert b"".join(objects.get("a/1.x")) == whole
    objects.put("a/1.x", [b"another"])
    assert objects.read("a/1.x") == b"another"


def test_names_are_those_of_one_folder(objects: Objects) -> None:
    """Folders and the names in one are sorted, and a folder that is not there has none."""
    assert objects.folders() == []
    for name in ("b/2.x", "b/1.x", "a/1.x", "bb/1.x"):
        objects.put(name, [b"x"])
    assert objects.folders() == ["a", "b", "bb"]
    assert [objects.names(each) for each in ("a", "b", "none")] == [["1.x"], ["1.x", "2.x"], []]


def test_what_is_removed_is_not_there(objects: Objects) -> None:
    """Removing is no error where nothing is; reading is one."""
    objects.put("a/1.x", [b"x"])
    objects.remove("a/1.x")
    objects.remove("a/1.x")
    assert objects.names("a") == []
    with pytest.raises(FileNotFoundError):
        objects.read("a/1.x")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_object_that_is_not_finished_is_not_there(objects: Objects, count: int) -> None:
    """An error among the pieces goes through, leaves no object, and leaves the one of that name as it was."""

    def pieces() -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(PIECE_BYTES)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        objects.put("a/1.x", pieces())
    assert objects.names("a") == []
    objects.put("a/2.x", [b"as it was"])
    with pytest.raises(ZeroDivisionError):
        objects.put("a/2.x", pieces())
    assert (objects.names("a"), objects.read("a/2.x")) == (["2.x"], b"as it was")


@pytest.mark.process
def test_nothing_half_sent_stays_in_an_object_store(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload in parts that ends early is taken back: a bucket is not filled with parts that nothing lists."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)

    def pieces() -> Iterator[bytes]:
        yield from (bytes(PIECE_BYTES), bytes(PIECE_BYTES))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_objects(f"{store.url}/parts").put("a/1.x", pieces())
    assert "<Upload>" not in store.unfinished()


@pytest.mark.parametrize("name", ["", "../a", "a/../b", "/a", "a//b", "a/.hidden", "a b", "a\nb", "a/..b/"])
def test_a_name_leads_nowhere_else(objects: Objects, name: str) -> None:
    """A name that is a path out of the store, or is no plain name, is refused by every call."""
    with pytest.raises(OSError, match="no name of an object"):
        objects.put(name, [b"x"])
    with pytest.raises(OSError, match="no name of an object"):
        objects.read(name)
    with pytest.raises(OSError, match="no name of an object"):
        objects.remove(name)


@pytest.mark.process
def test_a_store_that_is_gone_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call to a store that refuses connections ends soon, as an `OSError` of one line."""
    with running_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        gone = open_objects(store.url)
        store.kill()
        for call in (
            lambda: gone.put("a/1.x", [b"x"]),
            lambda: gone.read("a/1.x"),
            lambda: gone.names("a"),
            gone.folders,
            lambda: gone.remove("a/1.x"),
        ):
            with pytest.raises(OSError, match="S3") as raised:
                call()
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://a/b", "s3://"),
        ("backups", "file://"),
        ("", "file://"),
        ("file://host/folder", "three slashes"),
        ("file:///", "three slashes"),
        ("s3://", "s3://BUCKET"),
        ("s3://key:secret@bucket/x", "variables"),
        ("s3://bucket/x?key=secret", "variables"),
        ("s3://bucket/x#part", "variables"),
        ("s3://[bucket/x", "s3://BUCKET"),
    ],
)
def test_what_is_no_url_of_a_store_is_refused(url: str, said: str) -> None:
    """A URL that names no store is refused with what to write, and one with a secret in it without showing that."""
    with pytest.raises(InvalidOption) as refused:
        open_objects(url)
    assert refused.value.field == "archive"
    assert said in refused.value.remedy
    assert "secret" not in refused.value.detail.replace("may hold a secret", "")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_scheme_whose_package_is_missing_names_the_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without obstore an object store is refused, and the remedy names `farstep[archive]`; a folder needs nothing."""
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(InvalidOption) as refused:
        open_objects(f"{scheme}://bucket/x")
    assert "farstep[archive]" in refused.value.remedy
    assert urlsplit(f"{scheme}://bucket/x").scheme in refused.value.detail
    assert isinstance(open_objects("file:///backups"), FolderObjects)


def test_a_store_that_lacks_a_setting_says_which() -> None:
    """A URL of a vendor that needs more than the URL is refused at once, with what the vendor's client says."""
    with pytest.raises(InvalidOption, match=r"[Aa]ccount"):
        open_objects("az://container/x")
