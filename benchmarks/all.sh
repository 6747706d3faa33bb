#!/usr/bin/env bash
# Every table of RESULTS.md that a CPU gives, in one go: about an hour on two cores that do nothing else.
#
#     uv run benchmarks/all.sh
#
# The exit status is 1 if a goal is missed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missed=0
for script in overhead startup precision scale; do
    printf '\n## %s.py\n\n' "$script"
    python "benchmarks/$script.py" || missed=1
done
exit $missed
