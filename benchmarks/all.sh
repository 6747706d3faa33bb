#!/usr/bin/env bash
# Every table of RESULTS.md that a CPU gives, in one go: about 45 minutes on two cores that do nothing else.
#
#     uv run benchmarks/all.sh
#
# precision.py's table is of a GPU, see gpu.sh: on two cores it takes hours. The exit status is 1 if a goal is missed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missed=0
for script in overhead scripts scale; do
    printf '\n## %s.py\n\n' "$script"
    python "benchmarks/$script.py" || missed=1
done
exit $missed
