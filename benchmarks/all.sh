#!/usr/bin/env bash
# All CPU tables of RESULTS.md: about 45 minutes on two otherwise idle cores.
#
#     uv run benchmarks/all.sh
#
# precision.py runs on a GPU, in gpu.sh: on two cores it takes hours. The exit status is 1 if a goal is missed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missed=0
for script in overhead scripts scale; do
    printf '\n## %s.py\n\n' "$script"
    python "benchmarks/$script.py" || missed=1
done
exit $missed
