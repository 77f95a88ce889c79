"""docker-compose.yml and docker/: what is open, pinned, secret and read is what they say; no engine is needed to check."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prefect.settings
import pytest
import typer.main
import yaml

from flows.cli import app
from flows.settings import load

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))

# The keys of the Compose specification that are in use here: a misspelt one is not among them.
TOP = {"name", "services", "secrets", "volumes"}
SERVICE = {
    "build", "cap_drop", "command", "depends_on", "deploy", "environment", "healthcheck", "image", "logging",
    "ports", "profiles", "restart", "secrets", "security_opt", "shm_size", "user", "volumes",
}  # fmt: skip
WITHIN = {
    "build": {"context", "dockerfile", "args"},
    "healthcheck": {"test", "interval", "timeout", "retries", "start_period"},
    "deploy": {"resources"},
    "logging": {"driver", "options"},
}
CONDITIONS = {"service_healthy", "service_started", "service_completed_successfully"}
NAMED_SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|AUTH|KEY)(_|$)")
READ = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")  # ${NAME}, ${NAME:-default}, ${NAME-default}


def each(services: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", services)


def words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else [str(word) for word in value or []]


def filled(value: Any) -> str:
    """The text with every variable at its default."""
    return READ.sub(lambda found: found[2] or "", str(value))


def dockerfile(service: dict[str, Any]) -> Path:
    return ROOT / service["build"]["context"] / service["build"]["dockerfile"]


def instructions(path: Path, word: str) -> list[str]:
    """The arguments of each `word` instruction, lines that go on joined."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{word} ")]


def images() -> Iterator[str]:
    """Every image that is pulled or tagged."""
    yield from (service["image"] for service in SERVICES.values())
    for path in DOCKERFILES:
        yield from instructions(path, "FROM")


def secrets_of(service: dict[str, Any]) -> list[str]:
    return [entry if isinstance(entry, str) else entry["source"] for entry in service.get("secrets", [])]


def commands() -> dict[str, list[str]]:
    """What each service starts: executable first."""
    return {name: [filled(word) for word in words(service.get("command"))] for name, service in SERVICES.items()}


# --- structure --------------------------------------------------------------------------------------------------------


def test_only_keys_of_the_specification_are_used():
    assert {key for key in COMPOSE if not key.startswith("x-")} == TOP
    for name, service in SERVICES.items():
        assert set(service) <= SERVICE, name
        for key, known in WITHIN.items():
            assert set(service.get(key, {})) <= known, (name, key)


@each(SERVICES)
def test_a_service_waits_for_services_that_exist_and_that_its_profile_starts(name):
    started = set(SERVICES[name].get("profiles", []))
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert how["condition"] in CONDITIONS
        needed = set(SERVICES[other].get("profiles", []))
        assert not needed or needed & started or how.get("required") is False, other


@each(SERVICES)
def test_volumes_are_declared_or_folders(name):
    for volume in SERVICES[name].get("volumes", []):
        source = filled(volume).split(":")[0]
        assert source.startswith(("./", "/")) or source in COMPOSE["volumes"]


def test_every_declared_volume_is_used():
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= used


@each(SERVICES)
def test_a_build_has_its_dockerfile_and_what_it_copies(name):
    if "build" not in SERVICES[name]:
        pytest.skip("pulled, not built")
    path, context = dockerfile(SERVICES[name]), ROOT / SERVICES[name]["build"]["context"]
    for copied in instructions(path, "COPY"):
        *sources, _ = copied.split()
        assert [source for source in sources if not (context / source).exists()] == []


@each(SERVICES)
def test_every_argument_of_a_dockerfile_without_a_default_is_given(name):
    if "build" not in SERVICES[name]:
        pytest.skip("pulled, not built")
    declared = instructions(dockerfile(SERVICES[name]), "ARG")
    given = set(SERVICES[name]["build"].get("args", {}))
    assert {line for line in declared if "=" not in line} <= given <= {line.split("=")[0] for line in declared}


def test_the_context_of_the_workers_holds_what_is_copied_and_nothing_else():
    path = DOCKER / "worker.Dockerfile"
    ignored, *kept = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()[1:]
    copied = {source for line in instructions(path, "COPY") for source in line.split()[:-1]}
    assert ignored == "*"
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied


# --- health -----------------------------------------------------------------------------------------------------------


@each(SERVICES)
def test_every_service_says_how_its_health_is_checked(name):
    health = SERVICES[name]["healthcheck"]
    assert health["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= set(health)


@each(SERVICES)
def test_a_health_check_asks_a_port_that_its_service_listens_on(name):
    listens = {port.rsplit(":", 1)[1] for port in SERVICES[name].get("ports", [])}
    for port in re.findall(r"http://[\w.]+:(\d+)", " ".join(SERVICES[name]["healthcheck"]["test"])):
        # 8080 is where `prefect worker start --with-healthcheck` listens
        assert port in listens or ("--with-healthcheck" in commands()[name] and port == "8080")


def test_prefect_listens_for_health_where_the_check_asks():
    assert prefect.settings.PREFECT_WORKER_WEBSERVER_PORT.value() == 8080


# --- what is open -----------------------------------------------------------------------------------------------------


@each(SERVICES)
def test_ports_are_open_to_this_machine_alone(name):
    assert [port for port in SERVICES[name].get("ports", []) if not str(port).startswith("127.0.0.1:")] == []


@each(SERVICES)
def test_no_service_has_rights_it_does_not_need(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@each(SERVICES)
def test_no_service_runs_as_root(name):
    service = SERVICES[name]
    user = str(service.get("user") or instructions(dockerfile(service), "USER")[-1])
    assert user.partition(":")[0] not in ("", "0", "root")


@each(SERVICES)
def test_whoever_may_report_home_is_told_not_to(name):
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "VLLM_NO_USAGE_STATS": "1"}
    quiet |= {"PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    image = SERVICES[name]["image"]
    if name == "s3":
        assert "-master.telemetry=false" in SERVICES[name]["command"]
    elif not image.startswith("postgres:"):  # which sends nothing
        assert quiet.items() <= SERVICES[name]["environment"].items()


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", sorted(set(images())))
def test_images_are_pinned_to_a_version(image):
    tag = image.partition("@")[0].rpartition(":")[2]
    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-[\w.]+)?", tag), image


def test_images_of_ours_carry_the_version_of_the_project():
    ours = [service["image"] for service in SERVICES.values() if "build" in service]
    assert ours and all(image.endswith(f":{PROJECT['version']}") for image in ours)


def test_client_and_server_are_the_same_prefect_and_the_project_allows_it():
    given = [service["build"].get("args", {}).get("PREFECT") for service in SERVICES.values() if "build" in service]
    (version,) = set(given) - {None}
    assert allows("prefect", version)


@pytest.mark.parametrize(
    "pin", re.findall(r"(?:torch|torchvision)==[\d.]+", (DOCKER / "worker.Dockerfile").read_text())
)
def test_the_torch_of_the_image_is_the_projects(pin):
    assert pin in PROJECT["dependencies"]


def test_the_server_has_the_cap_that_the_project_has():
    caps = re.findall(r'"((?:fastapi|sqlalchemy)<[^"]+)"', (DOCKER / "server.Dockerfile").read_text())
    assert len(caps) == 2 and set(caps) <= set(PROJECT["dependencies"])


def test_vllm_is_the_version_of_the_extra():
    (image,) = instructions(DOCKER / "vllm.Dockerfile", "FROM")
    assert [f"vllm=={image.rpartition(':v')[2]}"] == PROJECT["optional-dependencies"]["vllm"]


def test_the_python_of_every_image_is_one_the_project_supports():
    pythons = [image for image in images() if image.startswith("python:")]
    assert pythons and all(image.startswith("python:3.11.") for image in pythons)
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def allows(package: str, version: str) -> bool:
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    return any(line.name == package and line.specifier.contains(version) for line in wanted)


# --- secrets ----------------------------------------------------------------------------------------------------------


@each(SERVICES)
def test_no_secret_stands_in_the_environment(name):
    environment = SERVICES[name].get("environment", {})
    held = {key: value for key, value in environment.items() if NAMED_SECRET.search(key)}
    assert all(str(value).startswith("/run/secrets/") for value in held.values()), held


def test_no_address_carries_a_password():
    files = [TEXT, (ROOT / ".env.example").read_text(), *(path.read_text() for path in DOCKERFILES)]
    assert [found for text in files for found in re.findall(r"\w+://[^/\s'\"]*@[^/\s]+", text)] == []


def test_every_secret_is_a_file_that_some_service_reads():
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    assert {name for service in SERVICES.values() for name in secrets_of(service)} == set(COMPOSE["secrets"])


@each(SERVICES)
def test_secrets_that_become_variables_pass_through_the_script_that_makes_them_so(name):
    service = SERVICES[name]
    targets = [entry["target"] for entry in service.get("secrets", []) if isinstance(entry, dict)]
    if not targets:
        pytest.skip("reads its secrets from files itself")
    entry = " ".join(instructions(dockerfile(service), "ENTRYPOINT"))
    assert "with-secrets" in entry
    assert all(re.fullmatch(r"[A-Z_]+", target) for target in targets)


def test_the_server_asks_for_the_login_that_its_clients_give():
    by_target = {entry["target"]: entry["source"] for service in SERVICES.values()
                 for entry in service.get("secrets", []) if isinstance(entry, dict)}  # fmt: skip
    assert by_target["PREFECT_SERVER_API_AUTH_STRING"] == by_target["PREFECT_API_AUTH_STRING"]
    assert by_target["VLLM_API_KEY"] == by_target["OPENAI_API_KEY"]
    clients = [name for name, service in SERVICES.items() if "PREFECT_API_URL" in service.get("environment", {})]
    assert clients and all("prefect_login" in secrets_of(SERVICES[name]) for name in clients)


def test_the_script_makes_every_secret_and_keeps_what_is_there(tmp_path):
    make = ["sh", str(DOCKER / "make-secrets"), str(tmp_path / "secrets")]
    subprocess.run(make, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == {Path(filled(secret["file"])).name for secret in COMPOSE["secrets"].values()}
    assert re.fullmatch(r"\w+:\w{48}\n", made["prefect_login"])
    assert len(set(made.values())) == len(made)
    subprocess.run(make, check=True)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0


def test_files_of_secrets_become_variables_of_the_command(tmp_path):
    (tmp_path / "SHOP_KEY").write_text("a b'$c\n")
    show = [sys.executable, "-c", "import os, sys; print(os.environ['SHOP_KEY'], sys.argv[1])", "two words"]
    assert with_secrets(tmp_path, *show).stdout == "a b'$c two words\n"


def test_an_empty_secret_ends_the_container_with_the_remedy(tmp_path):
    (tmp_path / "SHOP_KEY").write_text("\n")
    ended = with_secrets(tmp_path, "echo", "started")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "SHOP_KEY is empty" in ended.stderr and "sh docker/make-secrets" in ended.stderr


def with_secrets(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SECRETS_FOLDER": str(folder)}
    script = ["sh", str(DOCKER / "with-secrets"), *command]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)


# --- variables and commands -------------------------------------------------------------------------------------------


def test_the_example_lists_every_variable_with_its_default_and_no_other():
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    example = dict(line.split("=", 1) for line in lines)
    read: dict[str, set[str]] = {}
    for variable, default in READ.findall(TEXT):
        read.setdefault(variable, set()).add(default)
    assert {variable: {value} for variable, value in example.items()} == read


@each(SERVICES)
def test_every_setting_of_prefect_exists(name):
    for key in SERVICES[name].get("environment", {}):
        if key.startswith("PREFECT_"):
            assert hasattr(prefect.settings, key), key
    for entry in SERVICES[name].get("secrets", []):
        if isinstance(entry, dict) and entry["target"].startswith("PREFECT_"):
            assert hasattr(prefect.settings, entry["target"]), entry


@each(SERVICES)
def test_every_setting_of_ours_is_valid(name):
    environment = {key: filled(value) for key, value in SERVICES[name].get("environment", {}).items()}
    settings = load([], environ=environment).settings
    ours = {key.removeprefix("MLLMSREC_").lower() for key in environment if key.startswith("MLLMSREC_")}
    assert ours <= settings.model_fields_set


def test_each_command_names_an_executable_of_its_image():
    started = {name: command[0] for name, command in commands().items() if command}
    assert started.pop("s3") == "mini" and 'with-secrets", "weed"' in (DOCKER / "s3.Dockerfile").read_text()
    assert started == {"server": "prefect", "worker": "prefect", "gpu-worker": "prefect", "vllm": "vllm"}


@pytest.mark.parametrize("words_of", [("server", "start"), ("worker", "start")], ids=" ".join)
def test_options_of_prefect_exist(words_of):
    """Asked of Prefect's own command line, without colours and as wide as it needs."""
    shown = subprocess.run(
        [sys.executable, "-m", "prefect", *words_of, "--help"],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "DO_NOT_TRACK": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    known = set(re.findall(r"--[a-z][a-z-]*", shown))
    used = [command[3:] for command in commands().values() if tuple(command[1:3]) == words_of]
    assert used and {word for command in used for word in command if word.startswith("--")} <= known


def test_commands_of_ours_in_the_comments_exist():
    known = typer.main.get_group(app).commands
    named = re.findall(r"mllmsrec ([a-z]+)\b", TEXT)
    assert named and set(named) <= set(known)
