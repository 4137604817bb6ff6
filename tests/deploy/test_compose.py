"""The compose file, read and rendered but not brought up: who starts, after whom, with which rights."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

Services = dict[str, dict[str, Any]]

WORKERS = ("worker-0", "worker-1")


def render(root: Path, *profiles: str) -> Services:
    """Return the services as `docker compose config` renders them, or skip where there is no `docker compose`."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no `docker compose` on this machine")
    asked = [argument for profile in profiles for argument in ("--profile", profile)]
    done = subprocess.run(
        [docker, "compose", "--env-file", os.devnull, "--file", "deploy/compose.yaml", *asked, "config"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    services: Services = yaml.safe_load(done.stdout)["services"]
    return services


def test_plain_up_starts_a_server_and_two_workers(services: Services):
    """Without a profile there are one server and two workers, and nothing else."""
    assert {name for name, service in services.items() if "profiles" not in service} == {"server", *WORKERS}


def test_no_service_is_called_farstep(services: Services):
    """No service has the name that makes Kubernetes set FARSTEP_PORT beside it, and nobody sets that variable here."""
    assert "farstep" not in services
    assert all("FARSTEP_PORT" not in service["environment"] for service in services.values())


@pytest.mark.parametrize("name", ["server", *WORKERS, "server-gpu"])
def test_a_container_has_no_rights_it_does_not_need(services: Services, name: str):
    """Every container runs as a numbered user, on a read-only file system, without capabilities or a way to get any."""
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) >= 10_000
    assert not {"privileged", "cap_add", "ulimits", "network_mode", "pid", "ipc"} & set(service)
    assert not [volume for volume in service.get("volumes", []) if volume.startswith((".", "/"))]


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_a_server_is_published_on_this_machine_only(services: Services, name: str):
    """Every published port is bound to 127.0.0.1."""
    assert [port.startswith("127.0.0.1:") for port in services[name]["ports"]] == [True]


@pytest.mark.parametrize("name", WORKERS)
def test_nothing_of_a_worker_is_published(services: Services, name: str):
    """A worker speaks and does not listen."""
    assert "ports" not in services[name]


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_a_server_is_checked_and_restarted(services: Services, name: str):
    """A server is checked by its own command line, has time to start and to stop, and comes back when it dies."""
    service = services[name]
    assert service["healthcheck"]["test"] == ["CMD", "farstep", "healthcheck"]
    assert service["healthcheck"]["start_period"]
    assert service["stop_grace_period"]
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_waits_for_a_healthy_server_and_ends_when_it_is_done(services: Services, name: str):
    """A worker starts after a healthy server, again only if it failed, and has no check that cannot pass."""
    service = services[name]
    assert service["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert service["restart"] == "on-failure"
    assert service["healthcheck"] == {"disable": True}


def test_the_workers_differ_in_their_name_alone(services: Services):
    """Both workers join one session of one server, each under its own name."""
    first, second = (services[name] for name in WORKERS)
    environment = first["environment"]
    renamed = environment | {"FARSTEP_WORKER": second["environment"]["FARSTEP_WORKER"]}
    assert environment != renamed
    assert first | {"environment": renamed} == second
    assert environment["FARSTEP_SERVER"] == "http://server:7171"
    assert environment["DEMO_WORKERS"] == str(len(WORKERS))


def test_server_and_workers_have_the_same_token(services: Services):
    """The token is the environment's or the `.env` file's, and the fallback says that it is none."""
    tokens = {service["environment"]["FARSTEP_TOKEN"] for service in services.values()}
    assert tokens == {"${FARSTEP_TOKEN:-development-only-token-change-me}"}


def test_the_kernels_outlive_the_container(compose: dict[str, Any], services: Services, dockerfile: str):
    """Kernels that a server had to build lie in a volume at the place that the image keeps them."""
    for name in ("server", "server-gpu"):
        volume, place = services[name]["volumes"][0].split(":")
        assert volume in compose["volumes"]
        assert f"FARSTEP_KERNEL_CACHE={place}" in dockerfile


def test_the_sessions_outlive_the_container(compose: dict[str, Any], services: Services, dockerfile: str):
    """A server's data directory is a volume with a name, of its own, at the place where the image keeps sessions."""
    volumes = [each.split(":") for name in ("server", "server-gpu") for each in services[name]["volumes"]]
    names = [name for name, place in volumes if place == "/var/lib/farstep"]
    assert "FARSTEP_SERVE_DATA_DIR=/var/lib/farstep" in dockerfile
    assert set(names) <= set(compose["volumes"])
    assert len(set(names)) == 2


def test_compose_renders_the_plain_file(root: Path):
    """`docker compose config` accepts the file and shows the three services."""
    assert set(render(root)) == {"server", *WORKERS}


def test_compose_renders_the_gpu_profile(root: Path):
    """The profile `gpu` adds a server that is built with CUDA and reserves one GPU."""
    server = render(root, "gpu")["server-gpu"]
    assert server["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    ]
    assert server["build"]["args"]["TORCH"] == "cuda"
    assert server["command"][-2:] == ["--device", "cuda"]
