"""Tell Ray when AWS is about to take this spot machine, so that training restarts elsewhere from its last checkpoint.

Runs beside `ray start` on each worker, asks the machine's metadata every five seconds, and ends after the notice.
"""

import os
import subprocess
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("EC2_METADATA", "http://169.254.169.254")
SECONDS_BETWEEN = float(os.environ.get("SPOT_WATCH_SECONDS", "5"))
# AWS gives two minutes; some of them are gone by now.
DEADLINE_SECONDS = 110


def ask(path: str, method: str = "GET", **headers: str) -> str | None:
    """The metadata service's answer; None where it has none, or is not there."""
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
    """Whether AWS has announced that it takes the machine."""
    token = ask("api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    return token is not None and ask("meta-data/spot/instance-action", X_aws_ec2_metadata_token=token) is not None


def drain() -> None:
    """Let Ray drain this node, as one that is preempted."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine"]
    deadline = ["--deadline-remaining-seconds", str(DEADLINE_SECONDS)]
    subprocess.run([*command, *deadline], check=True)


def main() -> None:
    """Watch, then drain."""
    while not is_noticed():
        time.sleep(SECONDS_BETWEEN)
    print("AWS takes this machine; draining", flush=True)
    drain()


if __name__ == "__main__":
    main()
