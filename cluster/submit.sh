#!/usr/bin/env bash
# Submit an offtower command to a running cluster as a job, and follow its output.
#
#   cluster/submit.sh train config.yaml --workers 4
#   cluster/submit.sh evaluate /data/runs/production --workers 8 --exit-zero
#   RAY_API_SERVER_ADDRESS=http://head:8265 cluster/submit.sh export /data/runs/production --workers 8
#
# The exit code is 0 only if the job succeeded; a job that failed or was stopped gives 1.
#
# The working folder (configurations, schemas) is uploaded without logs and runs; paths of data must be on
# storage that every node sees. --ray auto is added where no --ray is given. Ctrl-C leaves the job running;
# `ray job stop ID` ends it. With token authentication, RAY_AUTH_MODE and RAY_AUTH_TOKEN (or
# ~/.ray/auth_token) must be those of the cluster.
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi

ray_option=(--ray auto)
for argument in "$@"; do
  case $argument in
    --ray | --ray=*) ray_option=() ;;
  esac
done
# Other verbs take no --ray and run in one process, on the head.
case $1 in
  ingest | validate | simulate | train | tune | evaluate | export) ;;
  *) ray_option=() ;;
esac

: "${RAY_API_SERVER_ADDRESS:=http://127.0.0.1:8265}"
export RAY_API_SERVER_ADDRESS
id="offtower-$1-$(date +%Y%m%dT%H%M%S)-$RANDOM"
ray job submit \
  --submission-id "$id" \
  --working-dir . \
  --runtime-env-json '{"excludes": ["/logs", "/runs", "/data", ".git", ".venv", "*.so"]}' \
  -- offtower "$@" ${ray_option[@]+"${ray_option[@]}"}
# `ray job submit` exits with 0 after a job that was stopped.
status=$(ray job status "$id" 2>&1)
case $status in
  *"Job '$id' succeeded"*) ;;
  *)
    printf '%s\n' "error: job $id did not succeed" "$status" >&2
    exit 1
    ;;
esac
