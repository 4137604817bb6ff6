"""The Dockerfile, read but not built: what it promises about users, checks, labels and layers."""

import re
from pathlib import Path
from typing import Any

import pytest


def last(dockerfile: str, instruction: str) -> str:
    """Return the argument of the last `instruction`, which is the one that counts."""
    return re.findall(rf"^{instruction} (.+)$", dockerfile.replace("\\\n", ""), re.MULTILINE)[-1]


def test_no_syntax_line_asks_a_registry(dockerfile: str):
    """The Dockerfile builds with the syntax that the engine brings along, so no registry is needed for it."""
    assert not re.search(r"^#\s*syntax\s*=", dockerfile, re.MULTILINE | re.IGNORECASE)


def test_every_stage_starts_from_the_base_argument_or_another_stage(dockerfile: str):
    """The base image is named once, as an argument that a release can pin to a digest."""
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.MULTILINE)
    names = {name for _, name in stages}
    assert {source for source, _ in stages} <= {"${BASE}"} | names
    assert re.search(r"^ARG BASE=python:3\.11-slim-bookworm$", dockerfile, re.MULTILINE)


def test_the_last_user_is_a_number_that_is_not_root(dockerfile: str):
    """The image runs as a numbered user, so that `runAsNonRoot` can be checked without reading its passwd file."""
    user, _, group = last(dockerfile, "USER").partition(":")
    assert int(user) >= 10_000
    assert int(group) >= 10_000


def test_the_health_check_is_the_command_line_itself(dockerfile: str):
    """The image checks its health with `farstep healthcheck`, which needs neither a shell nor curl."""
    assert last(dockerfile, "HEALTHCHECK").endswith('CMD ["farstep", "healthcheck"]')


def test_the_entry_point_and_the_command_take_signals_themselves(dockerfile: str):
    """Both are lists, so no shell stands between a stop signal and the server."""
    assert last(dockerfile, "ENTRYPOINT") == '["farstep"]'
    assert last(dockerfile, "CMD") == '["serve", "--host", "0.0.0.0"]'


def test_the_data_directory_is_the_users_and_a_volume(dockerfile: str):
    """Sessions are kept in a volume even if none is mounted, and only the server's user may read them."""
    place = last(dockerfile, "VOLUME")
    assert f"FARSTEP_SERVE_DATA_DIR={place}" in dockerfile
    assert re.search(rf"install --directory --owner=farstep --group=farstep --mode=0700 .*{place}$", dockerfile, re.M)


@pytest.mark.parametrize(
    "label", ["title", "description", "licenses", "version", "revision", "created", "source", "documentation"]
)
def test_the_image_has_the_oci_labels(dockerfile: str, label: str):
    """The image says what it is under the names of the OCI image specification."""
    assert re.search(rf"\borg\.opencontainers\.image\.{label}=", dockerfile)


def test_the_version_label_is_that_of_the_project(dockerfile: str, project: dict[str, Any]):
    """The version of the label is the version of the wheel."""
    assert re.findall(r"^ARG VERSION=(.+)$", dockerfile, re.MULTILINE) == [project["version"]]


def test_package_lists_do_not_stay_in_a_layer(dockerfile: str):
    """What apt downloads is removed in the same layer, and nothing merely recommended comes along."""
    instructions = re.findall(r"^RUN apt-get(?:.*\\\n)*.*", dockerfile, re.MULTILINE)
    assert instructions
    for instruction in instructions:
        assert "--no-install-recommends" in instruction
        assert "rm -rf /var/lib/apt/lists/*" in instruction


def test_only_what_the_image_is_made_of_is_sent_to_the_builder(root: Path):
    """The ignore file refuses everything but single things, so that a `.env` never reaches a layer."""
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert let_through == {
        "pyproject.toml", "README.md", "LICENSE", "client", "service", "deploy", "deploy/constraints.txt"
    }  # fmt: skip
    assert "deploy/*" in lines


def test_the_image_holds_the_server_and_the_demo(dockerfile: str, project: dict[str, Any]):
    """The extras that are installed are those of a server and of the workers that train the digits."""
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", dockerfile, re.MULTILINE)
    assert extras.split(",") == ["service", "demo"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
