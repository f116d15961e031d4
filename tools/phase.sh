#!/usr/bin/env bash
# tools/phase.sh WHAT COMMAND...   runs a command as one phase of a longer set-up.
#
# Prints a line when it begins and its time when it ends. What the command prints goes to a file and is shown only if it
# fails.
set -u
what=$1
shift
mkdir -p build/logs
log=build/logs/$(tr -cs '[:alnum:]' '-' <<<"$what")
log=${log%-}.log
echo "· $what ..."
began=$SECONDS
if "$@" >"$log" 2>&1; then
  echo "✓ $what: $((SECONDS - began)) s"
else
  status=$?
  tail -n 60 "$log"
  echo "✗ $what failed after $((SECONDS - began)) s; all that it printed is in $log" >&2
  exit $status
fi
