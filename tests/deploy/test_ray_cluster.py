"""`ray up` for AWS: Ray's own checks of the file, and the watch for spot machines against a metadata service."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

FOLDER = Path(__file__).parents[2] / "deploy" / "ray-cluster"
CONFIG: dict[str, Any] = yaml.safe_load((FOLDER / "aws.yaml").read_text())
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_ray_accepts_the_file() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(CONFIG)
    validate_config(fillout_defaults(CONFIG))


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.Draft7Validator(SCHEMA).validate(CONFIG | {"max_worker": 3})


def test_keys_come_from_a_role_and_the_token_from_this_machine() -> None:
    for name, kind in CONFIG["available_node_types"].items():
        assert kind["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::"), name
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert CONFIG["file_mounts"]["/home/tla/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert "AWS_SECRET" not in (FOLDER / "aws.yaml").read_text()


def test_only_workers_are_spot_machines() -> None:
    spot = {
        name
        for name, kind in CONFIG["available_node_types"].items()
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    }
    assert spot == {"gpu_spot"}
    assert CONFIG["head_node_type"] == "head"
    assert any("spot_watch.py" in command for command in CONFIG["worker_start_ray_commands"])


class Metadata(BaseHTTPRequestHandler):
    """The part of EC2's metadata service that is asked for: a token first; a notice from the third time on."""

    asked = 0

    def do_PUT(self) -> None:
        self._answer(200 if self.path == "/latest/api/token" else 404, "t0")

    def do_GET(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token"] == "t0"
        Metadata.asked += 1
        self._answer(200 if Metadata.asked > 2 else 404, '{"action": "terminate"}')

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def metadata() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_watch_drains_after_the_notice_and_not_before(metadata: str) -> None:
    code = "import spot_watch; spot_watch.drain = lambda: print('drained'); spot_watch.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FOLDER,
        env=os.environ | {"EC2_METADATA": metadata, "SPOT_WATCH_SECONDS": "0.05"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "drained"
    assert Metadata.asked == 3
