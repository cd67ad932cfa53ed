#!/usr/bin/env bash
# Create passwords and keys, once, as files in secrets/, which git ignores.
# Only the folder restricts access: containers read the files under other user ids.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p secrets data
chmod 700 secrets

word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
once() { if [ -e "secrets/$1" ]; then cat > /dev/null; else cat > "secrets/$1" && echo "created secrets/$1"; fi; }

word | once ray_auth_token
word | once postgres_password
word | once mlflow_admin_password
word | once mlflow_session_key
word | once mlflow_trainer_password
word | once s3_secret_key
word | once grafana_password
printf '[default]\naws_access_key_id = tla\naws_secret_access_key = %s\n' "$(cat secrets/s3_secret_key)" | once aws_credentials
printf '[mlflow]\nmlflow_tracking_username = trainer\nmlflow_tracking_password = %s\n' \
    "$(cat secrets/mlflow_trainer_password)" | once mlflow_credentials
