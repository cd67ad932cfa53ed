"""Drain this node when AWS announces a spot interruption, so that training restarts elsewhere from a checkpoint.

Runs beside `ray start` on each worker, polls the instance metadata every five seconds, and exits after the notice.
"""

import os
import subprocess
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("EC2_METADATA", "http://169.254.169.254")
SECONDS_BETWEEN = float(os.environ.get("SPOT_WATCH_SECONDS", "5"))
# AWS gives two minutes' notice, part of which has passed.
DEADLINE_SECONDS = 110


def ask(path: str, method: str = "GET", **headers: str) -> str | None:
    """The response of the metadata service; None if it has none or is unavailable."""
    request = urllib.request.Request(
        f"{METADATA}/latest/{path}",
        method=method,
        headers={name.replace("_", "-"): text for name, text in headers.items()},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def is_noticed() -> bool:
    """Whether AWS has announced an interruption."""
    token = ask("api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    return token is not None and ask("meta-data/spot/instance-action", X_aws_ec2_metadata_token=token) is not None


def drain() -> None:
    """Let Ray drain this node as preempted."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot interruption"]
    deadline = ["--deadline-remaining-seconds", str(DEADLINE_SECONDS)]
    subprocess.run([*command, *deadline], check=True)


def main() -> None:
    """Watch, then drain."""
    while not is_noticed():
        time.sleep(SECONDS_BETWEEN)
    print("AWS interrupts this spot instance; draining", flush=True)
    drain()


if __name__ == "__main__":
    main()
