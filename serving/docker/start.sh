#!/bin/bash
# Starts the server of the image as gr serve starts the embedded one: the same options, but for the addresses, which the
# container's network hides, and the folders, which the image knows.
set -eu
restricted=model-repository,shared-memory,trace,logging
key=$(cat "${GR_ADMIN_KEY_FILE:-/run/secrets/admin_key}")
if [ -z "$key" ]; then
    echo "gr-model-server: the admin key is empty; set GR_SERVER_ADMIN_KEY, for instance to \$(openssl rand -hex 24)" >&2
    exit 1
fi
if [ ! -d "$GR_HOME/model_repository" ]; then
    echo "gr-model-server: no models are deployed in the state folder yet; run gr materialize first" >&2
    exit 1
fi
set --
for config in "$GR_HOME"/model_repository/*/config.pbtxt; do
    if [ -f "$config" ]; then
        set -- "$@" "--load-model=$(basename "$(dirname "$config")")"
    fi
done
# As the embedded server has it (STACK_KB in serving/server.py), where the container allows it.
ulimit -S -s 262144 || true
exec tritonserver \
    --model-repository="$GR_HOME/model_repository" \
    --model-control-mode=explicit \
    --strict-readiness=false \
    --disable-auto-complete-config \
    --exit-timeout-secs=10 \
    --grpc-infer-allocation-pool-size=0 \
    --backend-config=python,shm-region-prefix-name=gr \
    --grpc-address=0.0.0.0 --grpc-port=8001 \
    --http-address=0.0.0.0 --http-port=8000 \
    --metrics-address=0.0.0.0 --metrics-port=8002 \
    --http-max-input-size=16777216 \
    --grpc-restricted-protocol="$restricted:admin-key=$key" \
    --http-restricted-api="$restricted:admin-key=$key" \
    "$@"
