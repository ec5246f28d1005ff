#!/usr/bin/env bash
# Submit an ordinary offtower command to a running cluster as a job, and follow its output.
#
#   cluster/submit.sh train config.yaml --workers 4
#   cluster/submit.sh evaluate /data/runs/production --workers 8 --exit-zero
#   RAY_API_SERVER_ADDRESS=http://head:8265 cluster/submit.sh export /data/runs/production --workers 8
#
# The working folder (configurations, schemas) goes along, without logs and runs; paths of data must be
# those of storage that every node sees. --ray auto is added where no --ray is given. Ctrl-C leaves the job
# running; `ray job stop ID` ends it. With token authentication, RAY_AUTH_MODE and RAY_AUTH_TOKEN (or
# ~/.ray/auth_token) must be the cluster's.
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
# Verbs that take no --ray run in one process, on the head.
case $1 in
  ingest | validate | simulate | train | evaluate | export) ;;
  *) ray_option=() ;;
esac

: "${RAY_API_SERVER_ADDRESS:=http://127.0.0.1:8265}"
export RAY_API_SERVER_ADDRESS
exec ray job submit \
  --working-dir . \
  --runtime-env-json '{"excludes": ["/logs", "/runs", "/data", ".git", ".venv", "*.so"]}' \
  -- offtower "$@" ${ray_option[@]+"${ray_option[@]}"}
