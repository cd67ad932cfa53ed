"""The receiver of docs/models.md, with requests that MLflow signs."""

import re
import runpy
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.webhook import WebhookEvent
from mlflow.webhooks.delivery import _generate_hmac_signature
from mlflow.webhooks.delivery import test_webhook as send

from tla_service.tracking.connection import client

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
(SCRIPT,) = re.findall(r"^```python\n(# receiver\.py\n.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
EVENT = "model_version_alias.created"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a running receiver, to which MLflow may send."""
    (tmp_path / "receiver.py").write_text(SCRIPT)
    monkeypatch.setenv("WEBHOOK_SECRET", "a secret")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), runpy.run_path(str(tmp_path / "receiver.py"), run_name="receiver")["Receiver"]
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/mlflow"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_receiver_acts_on_what_mlflow_signs(address: str, local_uri: str, capsys: Any) -> None:
    assert SCRIPT.count("\n") < 40
    made = client(local_uri)
    for secret, status in (("a secret", 204), ("another", 401), (None, 401)):
        hook = made.create_webhook("promotions", address, [EVENT], secret=secret)
        sent = send(made.get_webhook(hook.webhook_id), WebhookEvent.from_str(EVENT))
        assert (sent.response_status, sent.error_message) == (status, None)
        assert ("example_model@example_alias is now version 1" in capsys.readouterr().out) == (status == 204)


def test_an_old_or_unsigned_request_is_refused(address: str, capsys: Any) -> None:
    old = {
        "X-MLflow-Delivery-Id": "d",
        "X-MLflow-Timestamp": "1700000000",
        "X-MLflow-Signature": _generate_hmac_signature("a secret", "d", "1700000000", "{}"),
    }
    for headers in (old, {}, {"X-MLflow-Timestamp": "now"}):
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(urllib.request.Request(address, b"{}", headers))
        refused.value.close()
    assert "version" not in capsys.readouterr().out
