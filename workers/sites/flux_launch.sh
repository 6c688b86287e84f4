#!/bin/bash
# Starts the processes of a job over all that its Flux instance was given; the rest is as in PSI/J's other launchers.

source $(dirname "$0")/launcher_lib.sh

shape=($1)
shift

pre_launch

set +e
"${HEADRACE_FLUX:-flux}" run "${shape[@]}" "$@" 1>$_PSI_J_STDOUT 2>$_PSI_J_STDERR <$_PSI_J_STDIN
_PSI_J_EC=$?
set -e

log "Command done: $_PSI_J_EC"

post_launch

echo "_PSI_J_LAUNCHER_DONE"
exit $_PSI_J_EC
