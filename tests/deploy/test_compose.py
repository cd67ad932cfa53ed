"""The compose file: its published schema, files that exist, ports that stay at home, and no secret in it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
# compose-spec's own schema (github.com/compose-spec/compose-go, Apache-2.0), as dclint 3.1.0 carries it.
FITS = jsonschema.Draft7Validator(json.loads((Path(__file__).parent / "compose-spec.schema.json").read_text()))
FILES = {name: yaml.safe_load((FOLDER / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml")}
SERVICES: dict[str, Any] = FILES["compose.yaml"]["services"]


@pytest.mark.parametrize("name", FILES)
def test_it_fits_the_schema(name: str) -> None:
    FITS.validate(FILES[name])


@pytest.mark.parametrize(
    ("right", "wrong"), [("healthcheck", "healthchek"), ("shm_size", "shmsize"), ("ports", "port")]
)
def test_a_misspelt_key_does_not_fit(right: str, wrong: str) -> None:
    text = re.sub(rf"^    {right}:", f"    {wrong}:", (FOLDER / "compose.yaml").read_text(), flags=re.MULTILINE)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        FITS.validate(yaml.safe_load(text))


def test_every_file_it_names_is_there() -> None:
    for config in FILES["compose.yaml"]["configs"].values():
        assert (FOLDER / config["file"]).is_file(), config


def test_every_name_it_uses_is_declared() -> None:
    whole = FILES["compose.yaml"]
    for name, service in SERVICES.items():
        for secret in service.get("secrets", []):
            assert (secret if isinstance(secret, str) else secret["source"]) in whole["secrets"], name
        for config in service.get("configs", []):
            assert config["source"] in whole["configs"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in whole["volumes"] or source.startswith("${"), name
        assert set(service.get("depends_on", {})) <= set(SERVICES), name


def test_make_secrets_makes_the_secrets_and_git_ignores_them(tmp_path: Path) -> None:
    (tmp_path / "make_secrets.sh").write_text((FOLDER / "make_secrets.sh").read_text())
    for _ in range(2):  # the second time, nothing changes
        subprocess.run(["bash", str(tmp_path / "make_secrets.sh")], check=True, capture_output=True)
        made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(FILES["compose.yaml"]["secrets"])
    assert len(set(made.values())) == len(made)
    assert made["s3_secret_key"] in made["aws_credentials"]
    assert made["mlflow_trainer_password"] in made["mlflow_credentials"]
    assert "/deploy/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_ports_are_this_machines_alone() -> None:
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_every_service_is_watched_pinned_and_humble() -> None:
    for name, service in SERVICES.items():
        assert "healthcheck" in service or name == "ray-head", name  # Ray's is the image's own
        assert re.search(r":[v\d][\w.-]*\d|\$\{TLA_IMAGE\}", service["image"]), name
        assert name == "postgres" or service["cap_drop"] == ["ALL"], name  # it changes to its own user by itself


def test_only_tmp_and_volumes_can_be_written() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        mounted = [volume.split(":")[1] for volume in service.get("volumes", [])]
        assert "/tmp" in [*service["tmpfs"], *mounted], name


def test_mlflow_knows_the_names_it_is_called_by() -> None:
    command = SERVICES["mlflow"]["command"][0]
    hosts = re.search(r"--allowed-hosts (\S+)", command)
    assert hosts
    assert {"mlflow", "mlflow:5000", "localhost:5000"} <= set(hosts[1].split(","))
    assert SERVICES["ray-head"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_ray_asks_for_a_token() -> None:
    environment = SERVICES["ray-head"]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token"


def test_the_database_is_spoken_to_with_the_driver_that_is_installed() -> None:
    # Without a driver's name SQLAlchemy takes psycopg 3, which is not in the lock.
    files = [*FOLDER.glob("*.*"), *(ROOT / "deploy" / "kubernetes").rglob("*.yaml"), ROOT / "deploy" / "smoke.sh"]
    text = "".join(path.read_text() for path in files)
    assert set(re.findall(r"postgresql[+\w]*://", text)) == {"postgresql+psycopg2://"}
