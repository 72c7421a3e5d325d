#!/usr/bin/env bash
# Everything that a machine with a GPU can say of the kernels, into one folder: tests, benchmarks, profiles.
#
#   bench/gpu_all.sh [--list] [--stage N] [--out DIR]
#
# Runs stages of at most 8 minutes each. Of a stage NN-NAME the folder gets NN-NAME.log, and when it has ended
# NN-NAME.exit with its exit code. Run again, it goes on with the stages that have not ended; --stage N runs that one
# alone, ended or not; --list only names them. summary.txt comes last. Exit code 1 where a stage failed.
#
# Without network, root or installation: the checkout is used as it lies. PYTHON names the interpreter [python3]; what
# it lacks can be put on PYTHONPATH. Without a GPU the stages run on the CPU, small, to see that they work.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
seconds=480

list='' only='' out=''
while (($#)); do
  case $1 in
    --list) list=yes ;;
    --stage) only=${2:?--stage needs a number}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) echo "gpu_all.sh: $1 is unknown; known are --list, --stage N, --out DIR" >&2; exit 2 ;;
  esac
  shift
done

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
kernels=(bench.kernels --device cuda)
profile=(bench.profile --device cuda --model resnet18 --batch-size 128)
pipelines=(bench.pipelines --device cuda --data jpeg224)
step=(bench.step --device cuda --dataset random --rounds 15)
epoch=(bench.epoch --table14 --device cuda --dataset random --steps 20)
scaling=(bench.scaling --device cuda --batch-size 128 --steps 20 --procs 1)
if [[ -z $gpu ]]; then
  echo "No GPU: the stages run on the CPU, small, and measure nothing of a GPU."
  gpu=none
  kernels=(bench.kernels --device cpu --quick)
  profile=(bench.profile --device cpu --model resnet8 --batch-size 8)
  pipelines=(bench.pipelines --device cpu --data jpeg224 --quick)
  step=(bench.step --device cpu --dataset random --model resnet8 --batch-size 4 --rounds 2)
  epoch=(bench.epoch --table14 --device cpu --dataset random --model resnet8 --batch-size 4 --steps 2)
  scaling=(bench.scaling --device cpu --model resnet8 --batch-size 4 --rounds 2 --steps 1 --procs 1)
fi
name=$(tr -cs '[:alnum:]' - <<<"${gpu,,}")
out=${out:-bench/results/gpu-${name%-}-$(date -u +%F)}

ids=() ran='' child=''
trap '[[ -n $child ]] && kill "$child"; exit 130' INT TERM # its stage has not ended and will run again

stage() { # NAME COMMAND [ARGUMENT...]
  local id code
  id=$(printf '%02d-%s' $((${#ids[@]} + 1)) "$1")
  ids+=("$id")
  shift
  if [[ -n $list ]]; then
    echo "$id: $*"
  elif [[ -n $only && $only != "${#ids[@]}" ]]; then
    return
  elif [[ -z $only && -e $out/$id.exit ]]; then
    echo "$id: ended before, exit code $(<"$out/$id.exit")"
  else
    mkdir -p "$out"
    rm -f "$out/$id.exit"
    echo "$id: $*"
    ran=yes SECONDS=0
    timeout --kill-after=10 "$seconds" "$@" >"$out/$id.log" 2>&1 &
    child=$!
    wait "$child"
    code=$?
    child=''
    echo "$code" >"$out/$id.exit"
    echo "$id: exit code $code after $SECONDS s"
  fi
}

stage environment "$python" -m bench.environment
stage native make native
stage tests-cpu "$python" -m pytest -q -m 'not slow and not gpu' tests/kernels
for file in tests/gpu/test_*.py tests/bench/test_cuda_clock.py; do
  stage "$(basename "$file" .py)" "$python" -m pytest -q -m gpu "$file"
done
for op in distill_loss pgd_update crop_flip; do
  stage "kernels-$op" "$python" -m "${kernels[@]}" --op "$op" --out "$out/$op"
done
stage pipelines "$python" -m "${pipelines[@]}" --out "$out/pipelines"
stage step-iad1 "$python" -m "${step[@]}" --method iad1 --out "$out/iad1"
stage step-iad2 "$python" -m "${step[@]}" --method iad2 --out "$out/iad2"
stage epoch "$python" -m "${epoch[@]}" --out "$out/epoch"
stage scaling "$python" -m "${scaling[@]}" --out "$out/scaling"
stage profile-iad2 "$python" -m "${profile[@]}" --method iad2 --out "$out"
stage profile-iad2-amp "$python" -m "${profile[@]}" --method iad2 --amp --out "$out"
stage profile-iad1 "$python" -m "${profile[@]}" --method iad1 --out "$out"
stage profile-reference env ENGINE_KERNELS=reference "$python" -m "${profile[@]}" --method iad2 --out "$out/reference"

if [[ -n $list ]]; then
  exit 0
elif [[ -n $only && -z $ran ]]; then
  echo "gpu_all.sh: there is no stage $only; known are 1 to ${#ids[@]}" >&2
  exit 2
fi

failed=0
for id in "${ids[@]}"; do
  code='not run'
  [[ -e $out/$id.exit ]] && code=$(<"$out/$id.exit")
  [[ $code == 0 || $code == 'not run' ]] || failed=1
  echo "$id: $code: $(tail -n 1 "$out/$id.log" 2>/dev/null)"
done >"$out/summary.txt"
cat "$out/summary.txt"
exit "$failed"
