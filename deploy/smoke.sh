#!/usr/bin/env bash
# End-to-end test of the service on this machine in under ten minutes: two Ray nodes in networks of their own, an MLflow
# server with accounts on PostgreSQL, an S3 store, and a client that has a token but no credentials for the store.
#
#   deploy/smoke.sh
#   SMOKE_BUCKET=name AWS_ENDPOINT_URL_S3=http://... AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... deploy/smoke.sh
#
# The first starts moto's S3 server, the second uses an existing store. Requires this project's environment (PYTHON,
# default .venv/bin/python) and PostgreSQL's programs. As root, each node gets a network namespace; otherwise both share
# this machine's network, on separate ports. SMOKE_KEEP=1 keeps the folder with all logs. SMOKE_STEPS selects steps.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
BIN="$(dirname "$PYTHON")"
STEPS="${SMOKE_STEPS:-token doctor train sweep pull metrics secrets}"
WORK="$(mktemp -d /tmp/tla-smoke-XXXXXX)"
SPACE="tla$$"
PORT=$((20000 + $$ % 200 * 50)) # a block of ports for this run, above those of Ray's workers
BUCKET="${SMOKE_BUCKET:-tla-smoke}"
STARTED="$(date +%s)"
word() { od -An -N18 -tx1 /dev/urandom | tr -d ' \n'; }
say() { printf '%4d s  %s\n' "$(($(date +%s) - STARTED))" "$*"; }
fail() { say "FAILED: $*"; exit 1; }
mkdir -p "$WORK"/{home,client,logs,secrets,runs,pids}
chmod 755 "$WORK" && chmod 700 "$WORK/secrets"

# ------------------------------------------------------------------------------------------- networks and processes
if [ "$(id -u)" = 0 ] && ip netns add "$SPACE-probe" 2> /dev/null; then
    ip netns delete "$SPACE-probe"
    SPACES=(head worker client)
    NET="10.$((100 + $$ % 100)).$(($$ / 100 % 200))"
    ip link add "$SPACE" type bridge && ip address add "$NET.254/24" dev "$SPACE" && ip link set "$SPACE" up
    for index in 0 1 2; do
        name="$SPACE-${SPACES[$index]}"
        ip netns add "$name"
        ip link add "v$index-$$" type veth peer name eth0 netns "$name"
        ip link set "v$index-$$" master "$SPACE" up
        ip -n "$name" link set lo up
        ip -n "$name" address add "$NET.$((index + 1))/24" dev eth0
        ip -n "$name" link set eth0 up
        ip -n "$name" route add default via "$NET.254"
    done
    # All share this machine's host name, from which gloo would derive an address.
    SOCKETS=(GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0)
    HEAD="$NET.1" WORKER="$NET.2" HOST="$NET.254"
    AT_HEAD=(ip netns exec "$SPACE-head") AT_WORKER=(ip netns exec "$SPACE-worker") AT_CLIENT=(ip netns exec "$SPACE-client")
    say "networks: head $HEAD, worker $WORKER, client $NET.3, services $HOST"
else
    SPACES=() SOCKETS=()
    HEAD=127.0.0.1 WORKER=127.0.0.1 HOST=127.0.0.1
    AT_HEAD=() AT_WORKER=() AT_CLIENT=()
    say "networks: shared (namespaces require root)"
fi

# Start in the background, in its own session, so that it can be killed with all its children.
launch() {
    local name="$1"; shift
    setsid "$@" > "$WORK/logs/$name.log" 2>&1 < /dev/null &
    echo $! > "$WORK/pids/$name"
}

finish() {
    local code=$?
    set +e
    # PostgreSQL waits for its clients on TERM, and frees its shared memory on INT.
    [ -e "$WORK/pids/postgres" ] && kill -INT -- "-$(cat "$WORK/pids/postgres")" 2> /dev/null && sleep 1
    for file in "$WORK"/pids/*; do
        [ -e "$file" ] && kill -TERM -- "-$(cat "$file")" 2> /dev/null
    done
    sleep 2
    for file in "$WORK"/pids/*; do
        [ -e "$file" ] && kill -KILL -- "-$(cat "$file")" 2> /dev/null
    done
    # Ray's processes leave the session; their command lines contain this run's folder.
    ps -eo pid=,args= | awk -v folder="$WORK/" -v self=$$ 'index($0, folder) && $1 != self { print $1 }' \
        | xargs --no-run-if-empty kill -KILL 2> /dev/null
    for name in "${SPACES[@]}"; do ip netns delete "$SPACE-$name"; done
    [ ${#SPACES[@]} = 0 ] || ip link delete "$SPACE"
    if [ "$code" != 0 ]; then
        for log in "$WORK"/logs/*.log; do echo "--- $log"; tail -n 15 "$log"; done
    fi
    if [ "${SMOKE_KEEP:-}" = 1 ]; then echo "logs are in $WORK"; else rm -rf "$WORK"; fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Wait until a command succeeds.
await() {
    local what="$1" seconds="$2"; shift 2
    for _ in $(seq "$seconds"); do
        if "$@" > /dev/null 2>&1; then return 0; fi
        sleep 1
    done
    fail "$what was not ready within $seconds s"
}
# A command rather than a function, as it runs in other network namespaces too.
ANSWERS=("$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)')

# ---------------------------------------------------------------------------------------------------------- services
start_store() {
    if [ -z "${SMOKE_BUCKET:-}" ]; then
        launch store "$PYTHON" "$ROOT/tests/s3_server.py" "$WORK/secrets/store" --host "$HOST" --port $((PORT + 10)) \
            --bucket "$BUCKET"
        await "the store" 60 test -e "$WORK/secrets/store"
        # shellcheck disable=SC1091
        . "$WORK/secrets/store"
    fi
    STORE=("AWS_ENDPOINT_URL_S3=$AWS_ENDPOINT_URL_S3" "AWS_ACCESS_KEY_ID=$AWS_ACCESS_KEY_ID"
        "AWS_SECRET_ACCESS_KEY=$AWS_SECRET_ACCESS_KEY" "AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-us-east-1}")
    say "store at $AWS_ENDPOINT_URL_S3"
}

start_database() {
    local programs data="$WORK/postgres" run=()
    DATABASE="postgresql+psycopg2://mlflow@127.0.0.1:$((PORT + 20))/postgres"
    programs="$(dirname "$(command -v initdb || find /usr/lib/postgresql -name initdb | sort | tail -n 1)")"
    mkdir "$data"
    if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses root
        chown nobody "$data"
        run=(runuser -u nobody --)
    fi
    word > "$WORK/secrets/database"
    cp "$WORK/secrets/database" "$data.password" && chmod 600 "$data.password"
    [ "$(id -u)" != 0 ] || chown nobody "$data.password"
    (cd / && "${run[@]}" "$programs/initdb" --pgdata="$data" --username=mlflow --auth=scram-sha-256 --no-sync \
        --pwfile="$data.password") > "$WORK/logs/initdb.log" 2>&1
    rm "$data.password"
    (cd / && launch postgres "${run[@]}" "$programs/postgres" -D "$data" -p $((PORT + 20)) -h 127.0.0.1 \
        -c unix_socket_directories="$data")
    await PostgreSQL 30 env PGPASSWORD="$(cat "$WORK/secrets/database")" "$PYTHON" -c \
        'import sys, psycopg2; psycopg2.connect(sys.argv[1]).close()' "${DATABASE/+psycopg2/}"
    say "PostgreSQL on port $((PORT + 20))"
}

start_tracking() {
    TRACKING="http://$HOST:$((PORT + 21))"
    word > "$WORK/secrets/admin"; word > "$WORK/secrets/trainer"; word > "$WORK/secrets/session"
    sed "s|^database_uri = .*|database_uri = $DATABASE|" "$ROOT/deploy/compose/mlflow_auth.ini" > "$WORK/auth.ini"
    launch mlflow env "${STORE[@]}" MLFLOW_AUTH_CONFIG_PATH="$WORK/auth.ini" MLFLOW_DISABLE_TELEMETRY=true \
        MLFLOW_AUTH_ADMIN_PASSWORD="$(cat "$WORK/secrets/admin")" MLFLOW_BACKEND_STORE_URI="$DATABASE" \
        PGPASSWORD="$(cat "$WORK/secrets/database")" \
        MLFLOW_FLASK_SERVER_SECRET_KEY="$(cat "$WORK/secrets/session")" HOME="$WORK/home" \
        "$BIN/mlflow" server --app-name basic-auth --host "$HOST" --port $((PORT + 21)) --workers 1 --serve-artifacts \
        --artifacts-destination "s3://$BUCKET/mlflow" --allowed-hosts "$HOST,$HOST:$((PORT + 21))"
    await "MLflow" 180 "${ANSWERS[@]}" "$TRACKING/health"
    env "${STORE[@]}" HOME="$WORK/home" MLFLOW_TRACKING_URI="$TRACKING" "$PYTHON" "$ROOT/deploy/setup_accounts.py" \
        --bucket "$BUCKET" --user trainer --user-password-file "$WORK/secrets/trainer" \
        --admin-password-file "$WORK/secrets/admin" > "$WORK/logs/setup.log" 2>&1
    ACCOUNT=("MLFLOW_TRACKING_URI=$TRACKING" MLFLOW_TRACKING_USERNAME=trainer
        "MLFLOW_TRACKING_PASSWORD=$(cat "$WORK/secrets/trainer")")
    say "MLflow at $TRACKING, with an account for jobs"
}

start_cluster() {
    word > "$WORK/secrets/token"
    ADDRESS="http://$HEAD:$((PORT + 2))"
    local node=(env "${STORE[@]}" "${ACCOUNT[@]}" "TLA_SCALING__STORAGE=s3://$BUCKET/runs" HOME="$WORK/home"
        PATH="$BIN:$PATH" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$WORK/secrets/token" OMP_NUM_THREADS=1
        MLFLOW_DISABLE_TELEMETRY=true "${SOCKETS[@]}" "$BIN/ray" start --block --num-cpus 1 --disable-usage-stats)
    launch head "${AT_HEAD[@]}" "${node[@]}" --head --node-ip-address "$HEAD" --port $((PORT + 1)) --temp-dir "$WORK/ray" \
        --dashboard-host "$HEAD" --dashboard-port $((PORT + 2)) --ray-client-server-port $((PORT + 3)) \
        --dashboard-agent-listen-port $((PORT + 4)) --metrics-export-port $((PORT + 5))
    await "Ray's head" 90 "${AT_CLIENT[@]}" "$PYTHON" -c \
        "import socket; socket.create_connection(('$HEAD', $((PORT + 2))), 1)"
    launch worker "${AT_WORKER[@]}" "${node[@]}" --address "$HEAD:$((PORT + 1))" --node-ip-address "$WORKER" \
        --dashboard-agent-listen-port $((PORT + 6)) --metrics-export-port $((PORT + 7))
    await "the head's agent" 60 "${AT_HEAD[@]}" "${ANSWERS[@]}" "http://$HEAD:$((PORT + 4))/api/local_raylet_healthz"
    await "the worker's agent" 60 "${AT_WORKER[@]}" "${ANSWERS[@]}" "http://$WORKER:$((PORT + 6))/api/local_raylet_healthz"
    say "Ray's head at $ADDRESS, a worker at $WORKER"
}

# The client has a token and an MLflow account, but no credentials for the store; MLflow would load models straight from it.
client() {
    "${AT_CLIENT[@]}" env -i HOME="$WORK/client" PATH="$BIN:/usr/bin:/bin" RAY_AUTH_MODE=token "${ACCOUNT[@]}" \
        RAY_AUTH_TOKEN_PATH="$WORK/secrets/token" MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1 \
        MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=false "$@"
}
submit() {
    local name="$1"; shift
    (cd "$ROOT" && client "$BIN/ray" job submit --address "$ADDRESS" --working-dir . --submission-id "$name" -- \
        python "$@") > "$WORK/logs/job-$name.log" 2>&1 || fail "job $name"
}
QUICK=(--preset digits --data.train_limit 200 --data.test_limit 40 --training.epochs 4 --training.global_batch_size 50)

# ------------------------------------------------------------------------------------------------------------- steps
step_token() {
    if "${AT_CLIENT[@]}" env -i HOME="$WORK/client" PATH="$BIN:/usr/bin:/bin" RAY_AUTH_MODE=disabled \
        "$BIN/ray" job list --address "$ADDRESS" > "$WORK/logs/no-token.log" 2>&1; then
        fail "the head responds without a token"
    fi
    grep -qi 'authentication required' "$WORK/logs/no-token.log" || fail "the response does not name the missing token"
    say "without a token, the head responds: $(grep -i 'authentication required' "$WORK/logs/no-token.log" | tail -n 1)"
}
step_doctor() {
    submit doctor jobs/doctor.py --workers 2
    say "doctor: $(grep -c ' ok ' "$WORK/logs/job-doctor.log") checks passed"
}
step_train() {
    submit train jobs/train_tla.py "${QUICK[@]}" --scaling.num_workers 2 --log_format json --output "$WORK/runs/train"
    grep -q '"event": "epoch"' "$WORK/logs/job-train.log" || fail "the job's log shows no epoch"
    grep -q "MLflow: $TRACKING/#/experiments/" "$WORK/logs/job-train.log" || fail "the job's log has no link to MLflow"
    say "trained on 2 nodes: $(grep -o 'models:/[^" ]*' "$WORK/logs/job-train.log" | head -n 1)"
}
step_sweep() {
    if [ ! -e "$ROOT/jobs/tune_tla.py" ]; then say "sweeps are not available"; return; fi
    submit sweep jobs/tune_tla.py "${QUICK[@]}" --scaling.num_workers 1 --sweep.num_samples 2 --output "$WORK/runs/sweep"
    say "swept: $(grep -o '[0-9]* trials: .*' "$WORK/logs/job-sweep.log" | tail -n 1)"
}
step_pull() {
    (cd "$WORK/client" && client "$PYTHON" - "$WORK/runs/train/summary.json" > "$WORK/logs/pull.log" 2>&1 <<'PULL'
import json, sys
import mlflow, numpy
from sklearn.datasets import load_digits
digits = load_digits()
images = (digits.images[:200, None] / 16).astype("float32")
uri = json.load(open(sys.argv[1]))["model_uri"]
answer = mlflow.pyfunc.load_model(uri).predict(images)
right = float((numpy.asarray(answer["label"]) == digits.target[:200]).mean())
print(f"{uri} labels {right:.0%} of 200 digits correctly")
assert right > 0.15, right
PULL
    ) || fail "pulling the model"
    say "a client without credentials for the store: $(tail -n 1 "$WORK/logs/pull.log")"
}
step_metrics() {
    "$PYTHON" -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())' \
        "http://$HEAD:$((PORT + 5))/metrics" > "$WORK/logs/metrics.log"
    grep -q 'ray_tla_runs_ended_total{.*outcome="finished"' "$WORK/logs/metrics.log" || fail "no metrics of this project"
    say "Prometheus metrics: $(grep -c '^ray_tla_' "$WORK/logs/metrics.log") series of this project, $(grep -c '^ray_' \
        "$WORK/logs/metrics.log") of Ray"
}
step_secrets() {
    client "$BIN/ray" job list --address "$ADDRESS" > "$WORK/logs/jobs.log" 2>&1
    for file in "$WORK"/secrets/{token,admin,trainer,session,database}; do
        if grep -rlF --exclude-dir=secrets --exclude-dir=postgres -- "$(cat "$file")" "$WORK" \
            > "$WORK/found" 2> /dev/null; then
            fail "the secret $(basename "$file") is in $(tr '\n' ' ' < "$WORK/found")"
        fi
    done
    say "no secret in any log, job description or run file"
}

cd "$WORK"
start_store
start_database
start_tracking
start_cluster
for step in $STEPS; do "step_$step"; done
say "all steps passed"
