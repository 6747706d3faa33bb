#!/usr/bin/env bash
# All that needs a GPU, in under ten minutes. Prints a block for RESULTS.md. FLUX.1 needs 30 GB of GPU memory.
#
#     uv run benchmarks/gpu.sh
#     uv run benchmarks/gpu.sh tests overhead-flux              # only these parts
#     uv run benchmarks/gpu.sh --device cpu --size demo         # small, to try the script
#
# A part that fails prints the end of its error, and the others still run. The exit status is 1 if a part fails or a goal
# of overhead.py is missed. The first four parts measure no time and run in parallel.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda size=full only=()
while (($#)); do
    case $1 in
        --device) device=$2 && shift ;;
        --size) size=$2 && shift ;;
        tests | precision | sdxl | flux | overhead-sdxl | overhead-flux) only+=("$1") ;;
        *) echo "usage: gpu.sh [--device DEVICE] [--size full|demo] [PART ...], but got $1" >&2 && exit 2 ;;
    esac
    shift
done

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # of each part
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    [[ ${#only[@]} -gt 0 && " ${only[*]} " != *" $name "* ]] && return
    timeout -k 5 "$limit" "$@" >"$work/$name.out" 2>"$work/$name.err"
    echo $? >"$work/$name.status"
}

show() { # NAME
    [[ -e $work/$1.status ]] || return
    local status
    status=$(<"$work/$1.status")
    printf '\n## %s\n\n' "$1"
    cat "$work/$1.out"
    ((status == 0)) && return
    failed=1
    printf '\nEnded with exit status %s (124: its time was up).\n\n```\n' "$status"
    tail -n 12 "$work/$1.err" | cut -c1-400
    printf '```\n'
}

if [[ $size == full ]]; then
    images=(--images 64 --batch 64)
    # dpm_adaptive takes a hundred evaluations of a random network; FLUX's take 0.2 s
    sdxl=(euler euler_ancestral heun dpm_2 dpm_2_ancestral lms dpm_fast)
    sdxl+=(dpmpp_2s_ancestral dpmpp_sde dpmpp_2m dpmpp_2m_sde dpmpp_3m_sde)
    flux=(euler heun dpmpp_2m dpmpp_2m_sde)
    rounds=(--steps 5 --rounds 3)
else
    images=(--images 2 --batch 2 --steps 2 --samplers euler)
    sdxl=(euler) flux=(euler)
    rounds=(--steps 2 --rounds 1)
fi
on=(--device "$device" --size "$size")
files=(tests/test_{sampling,callbacks,modes,both_pipelines,cuda}.py)

date -u +%F
[[ $device == cpu ]] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

run tests 200 python -m pytest -n 0 -p no:cacheprovider -k "gpu or cuda" "${files[@]}" &
run precision 200 python benchmarks/precision.py --device "$device" "${images[@]}" &
run sdxl 200 python benchmarks/gpu.py "${on[@]}" --models sdxl &
run flux 240 python benchmarks/gpu.py "${on[@]}" --models flux &
wait
for name in tests precision sdxl flux; do show "$name"; done
overhead=(python benchmarks/overhead.py "${on[@]}")
run overhead-sdxl 150 "${overhead[@]}" "${rounds[@]}" --models sdxl --samplers "${sdxl[@]}" && show overhead-sdxl
run overhead-flux 140 "${overhead[@]}" "${rounds[@]}" --models flux --samplers "${flux[@]}" && show overhead-flux
exit $failed
