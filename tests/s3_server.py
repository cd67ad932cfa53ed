"""moto's S3 server in a process of its own, with one account and a bucket; it checks the signature of every request.

    python tests/s3_server.py ENVIRONMENT_FILE [--host 127.0.0.1] [--port 0] [--bucket images]

Serves until it is killed. ENVIRONMENT_FILE appears once the server is ready, and holds what clients need, as NAME=VALUE
lines. The objects live in memory.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import boto3

POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


def create_account(endpoint: str) -> dict[str, str]:
    """Create the account, in three requests, and return the environment of its clients."""
    credentials = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    iam = boto3.client("iam", endpoint_url=endpoint, region_name="us-east-1", **credentials)
    iam.create_user(UserName="tests")
    iam.put_user_policy(UserName="tests", PolicyName="everything", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName="tests")["AccessKey"]
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment_file", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--bucket", default="images")
    options = parser.parse_args()
    # moto reads it on import: the requests that create the account need no key, all later ones do.
    os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "3"
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(options.host, options.port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = create_account(f"http://{host}:{port}")
    os.environ |= environment
    boto3.client("s3").create_bucket(Bucket=options.bucket)
    partial = options.environment_file.with_suffix(".partial")
    partial.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    partial.replace(options.environment_file)
    signal.pause()


if __name__ == "__main__":
    main()
