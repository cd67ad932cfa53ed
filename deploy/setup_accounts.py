"""Create the bucket and the MLflow account that jobs use. Idempotent, except that it updates the password.

Addresses and credentials come from the usual AWS and MLflow environment variables.
"""

import argparse
import os
from pathlib import Path

import boto3
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient


def make_bucket(name: str) -> None:
    """Create a bucket unless it exists."""
    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=name)


def make_user(name: str, password: str) -> None:
    """Create an account, or update its password."""
    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    try:
        client.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)


def main() -> None:
    """Create what the flags name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", help="bucket to create")
    parser.add_argument("--user", required=True)
    parser.add_argument("--user-password-file", type=Path, required=True)
    parser.add_argument("--admin-password-file", type=Path, required=True)
    options = parser.parse_args()
    os.environ["MLFLOW_TRACKING_USERNAME"] = "admin"
    os.environ["MLFLOW_TRACKING_PASSWORD"] = options.admin_password_file.read_text().strip()
    if options.bucket:
        make_bucket(options.bucket)
    make_user(options.user, options.user_password_file.read_text().strip())
    print(f"account {options.user} and bucket {options.bucket or 'as it was'} are ready")


if __name__ == "__main__":
    main()
