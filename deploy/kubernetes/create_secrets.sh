#!/usr/bin/env bash
# Create the passwords, once, directly in the cluster: they appear in no file and on no command line.
set -euo pipefail
namespace="${1:-tla}"
kubectl get namespace "$namespace" > /dev/null 2>&1 || kubectl create namespace "$namespace"
if kubectl --namespace "$namespace" get secret tla-secrets > /dev/null 2>&1; then
    echo "tla-secrets exists already"
    exit 0
fi
word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
kubectl --namespace "$namespace" create --filename - <<SECRET
apiVersion: v1
kind: Secret
metadata: {name: tla-secrets}
stringData:
  postgres-password: $(word)
  mlflow-admin-password: $(word)
  mlflow-session-key: $(word)
  mlflow-trainer-password: $(word)
SECRET
