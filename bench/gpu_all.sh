#!/usr/bin/env bash
# Everything that a machine with a GPU can say, in as many calls as it takes: tests, speeds, epochs, a training.
#
#   bench/gpu_all.sh [--list] [--part N|all] [--stage NAME] [--budget SECONDS] [--out DIR]
#
# Parts: 1 peaks; 2 tests; 3 kernels and steps; 4 epochs; 5 a training. --list tells the stages of each, their
# estimated seconds, and the minutes of the parts. The stages run in the order of the list, the most valuable first.
# With --budget only those begin that should still fit, and what runs is cut off where the budget ends; without it
# each stage has 8 minutes. Of a stage NN-NAME the folder gets NN-NAME.log, and when it has ended NN-NAME.exit with
# its exit code. Called again, the script goes on with the stages that have not ended; --stage runs one alone, ended
# or not. summary.txt says what became of each. Exit code 1 where a stage failed or was cut off.
#
# Without network, root, git or installation: the checkout is used as it lies. PYTHON names the interpreter [python3].
# .gpu/wheels/*.whl are put on its path, and .gpu/data/cifar10-jpeg.tar.xz is unpacked for it, both once. All is
# written below build/gpu. If OUT names a folder, it gets the results after every stage, packed by bench/pack.py.
# Without a GPU the stages run on the CPU, small, to see that they work.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
work=$root/build/gpu
limit=480  # seconds of a stage
packing=15 # seconds of a budget that are kept for packing

refuse() {
  echo "gpu_all.sh: $1" >&2
  exit 2
}

list='' part=all only='' budget='' out=''
while (($#)); do
  case $1 in
    --list) list=yes; shift; continue ;;
    --part | --stage | --budget | --out) [[ -n ${2:-} ]] || refuse "$1 needs a value" ;;
    *) refuse "$1 is unknown; known are --list, --part N|all, --stage NAME, --budget SECONDS, --out DIR" ;;
  esac
  case $1 in
    --part) part=$2; [[ $part =~ ^([1-5]|all)$ ]] || refuse "--part $part: known are 1 to 5 and all" ;;
    --stage) only=$2 ;;
    --budget) budget=$2; [[ $budget =~ ^[1-9][0-9]*$ ]] || refuse "--budget $budget is no number of seconds" ;;
    --out) out=$2 ;;
  esac
  shift 2
done

version=$("$python" -c 'import platform; print(platform.python_version())') || refuse "PYTHON=$python does not run"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' \
  2>/dev/null) || refuse "PYTHON=$python has no torch"
name=$(tr -cs '[:alnum:]' - <<<"${gpu:-cpu}")
name=${name,,}
out=${out:-$work/${name%-}-$(date -u +%F)}
site=$work/site-$version
archive=.gpu/data/cifar10-jpeg.tar.xz

PATH=$PATH:$(dirname "$(type -P "$python")"):/usr/local/cuda/bin # programs that were installed beside them
export PYTHONPATH=$site:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export ENGINE_CACHE=${ENGINE_CACHE:-$work/cache/engine} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/cache/inductor}
images=''
if [[ -z ${ENGINE_DATA:-} && -e $archive ]]; then
  images="CIFAR-10 as JPEG of quality 75, not the original pixels"
  export ENGINE_DATA=$work/cifar10-jpeg
fi

if [[ -n $gpu ]]; then
  device=cuda quick=() few=() rounds=15 steps=20 seconds=60
  outer=(--variant expert --variant expert-graph --variant all) # beside the textbook
  sizes=(--model resnet18 --batch-size 128)
  real=(--dataset cifar10)
  lease=()
  evaluation=(--attacks 'natural,pgd20,aa:tf32,aa' --limit-aa 250)
else
  device=cpu quick=(--quick) few=(--no-memory --variant amp) outer=() rounds=2 steps=2 seconds=20
  sizes=(--model resnet8 --batch-size 4)
  real=(--dataset digits --model resnet8 --limit-train 64)
  lease=(--quick)
  evaluation=(--attacks 'natural,pgd20,aa' --limit 10 --limit-aa 10)
fi
on=(--device "$device")

# The stages. $1 is called with each: PART NAME SECONDS-ON-A-GPU SECONDS-ON-A-CPU AFTER COMMAND...
# "-" seconds: not there. AFTER: the stage that must have ended well before.
stages() {
  local each=$1 method op
  local run=("$python" -m) test=("$python" -m pytest -q -m "not slow" -k)
  local step=("${run[@]}" bench.step "${on[@]}" --dataset random "${sizes[@]}" --rounds "$rounds" "${few[@]}")
  local teacher=(--teacher "$out/train-at/best.pt")
  local check=(compute-sanitizer --error-exitcode 9 --target-processes all env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
  local counters=(ncu --clock-control none --set detailed --launch-count 30
    --kernel-name 'regex:^_(linf|l2|loss|scale|crop_flip|random_start)$|^(pgd_update|crop_flip)')
  $each 1 environment 15 5 '' "${run[@]}" bench.environment
  $each 1 native 60 30 '' make native
  $each 2 tests-cuda 300 - '' "${run[@]}" bench.gate --device cuda
  $each 2 tests-cpu 60 120 '' "${run[@]}" bench.gate --device cpu
  $each 1 peaks 90 30 '' "${run[@]}" bench.peaks "${on[@]}" --seconds "$seconds" "${quick[@]}" --out "$out/peaks"
  $each 4 epochs 240 90 '' "${run[@]}" bench.epoch --real "${on[@]}" "${real[@]}" --out "$out/epochs"
  $each 3 step-iad1 300 20 '' "${step[@]}" --method iad1 --out "$out/step-iad1"
  $each 5 accuracy 470 60 '' \
    "${run[@]}" bench.accuracy lease "${lease[@]}" "${on[@]}" --out "$out/accuracy" --work "$out/accuracy-work"
  $each 5 evaluate 120 50 accuracy \
    "${run[@]}" engine eval "$(student iad1)" "${evaluation[@]}" "${on[@]}"
  for method in ard iad2 akd2; do
    $each 3 "step-$method" 150 20 '' "${step[@]}" "${outer[@]}" --method "$method" --out "$out/step-$method"
  done
  $each 3 ablation 240 60 '' "${run[@]}" bench.ablation "${on[@]}" "${sizes[@]}" --rounds "$rounds" \
    --out "$out/ablation"
  for op in distill_loss pgd_update crop_flip; do
    $each 3 "kernels-$op" 60 15 '' \
      "${run[@]}" bench.kernels "${on[@]}" --op "$op" "${quick[@]}" --out "$out/kernels-$op"
  done
  $each 4 epochs-table14 200 150 '' \
    "${run[@]}" bench.epoch --table14 "${on[@]}" --dataset random "${sizes[@]}" --steps "$steps" \
    --out "$out/epochs-table14"
  $each 2 sanitizer-pgd_update 150 - '' \
    "${check[@]}" "${test[@]}" "test_table and not twice" tests/gpu/test_pgd_update.py
  $each 2 sanitizer-random_start 60 - '' "${check[@]}" "${test[@]}" numbers tests/gpu/test_random_start.py
  $each 2 counters 90 - '' \
    "${counters[@]}" "${run[@]}" bench.step "${on[@]}" --dataset random --method iad2 --variant amp --model resnet8 \
    --batch-size 128 --rounds 2 --no-memory --out "$out/counters"
  for method in iad1 iad2; do
    $each 3 "profile-$method" 30 15 '' \
      "${run[@]}" bench.profile "${on[@]}" --method "$method" --amp "${sizes[@]}" --out "$out/profile"
  done
  $each 3 profile-reference 30 15 '' env ENGINE_KERNELS=reference \
    "${run[@]}" bench.profile "${on[@]}" --method iad2 --amp "${sizes[@]}" --out "$out/profile-reference"
  $each 3 pipelines 90 30 '' \
    "${run[@]}" bench.pipelines "${on[@]}" --data jpeg224 "${quick[@]}" --out "$out/pipelines"
}

student() { # METHOD: its first one of the accuracy benchmark
  compgen -G "$out/accuracy-work/lease*/$1-seed0-*/best.pt" || echo "$out/accuracy-work/$1-seed0.pt"
}

ids=() failed=() child=''
declare -A state=() last=()                 # of a stage: its exit code, or what became of it; its log's last line
on_gpu=() on_cpu=()                         # seconds of a part

note() { # PART NAME ...: which stages there are, and which of them have ended
  printf -v id '%02d-%s' $((${#ids[@]} + 1)) "$2"
  ids+=("$id")
  state[$id]='not run' last[$id]=''
  if [[ -e $out/$id.exit ]]; then
    state[$id]=$(<"$out/$id.exit")
    read_last_line
  fi
}

read_last_line() { # of the log of stage $id
  last[$id]=$(tail -n 1 "$out/$id.log" 2>/dev/null | cut -c 1-300)
}

chosen() { # PART NAME ...: whether the stage is asked for; sets id
  local each
  for each in "${ids[@]}"; do
    [[ $each != [0-9][0-9]-"$2" ]] || id=$each
  done
  if [[ -n $only ]]; then [[ $only == "$2" ]]; else [[ $part == all || $part == "$1" ]]; fi
}

show() { # PART NAME SECONDS-ON-A-GPU SECONDS-ON-A-CPU AFTER COMMAND...
  chosen "$@" || return
  echo "$id: part $1, $3 s on a GPU, $4 s on a CPU: ${*:6}"
  on_gpu[$1]=$((${on_gpu[$1]:-0} + $3))
  on_cpu[$1]=$((${on_cpu[$1]:-0} + ${4/-/0}))
}

seconds_left() {
  local left=$limit
  [[ -z $budget ]] || left=$((budget - packing - SECONDS))
  echo $((left < limit ? left : limit))
}

reason_against() { # SECONDS AFTER PROGRAM: why the stage cannot run; nothing where it can
  if [[ $1 == - ]]; then
    echo "it needs a GPU"
  elif ! type -P "$3" >/dev/null; then
    echo "$3 is not installed"
  elif [[ -n $2 && $(cat "$out"/[0-9][0-9]-"$2".exit 2>/dev/null) != 0 ]]; then
    echo "$2 has not ended well"
  elif [[ -n $budget ]] && (($(seconds_left) < $1)); then
    echo "it takes $1 s by estimate, and $(seconds_left) s are left"
  fi
}

attempt() { # PART NAME SECONDS-ON-A-GPU SECONDS-ON-A-CPU AFTER COMMAND...
  chosen "$@" || return
  if [[ -z $only && -e $out/$id.exit ]]; then
    echo "$id: ended before, exit code ${state[$id]}"
  else
    local here=$4 reason
    [[ -z $gpu ]] || here=$3
    reason=$(reason_against "$here" "$5" "$6")
    if [[ -n $reason ]]; then
      state[$id]="left out, $reason"
      echo "$id: ${state[$id]}"
    else
      perform "${@:6}"
      summarise
    fi
  fi
  [[ ${state[$id]} =~ ^(0$|left out) ]] || failed+=("$2")
}

perform() { # COMMAND...: the stage of $id
  local began=$SECONDS code
  rm -f "$out/$id.exit"
  state[$id]=interrupted
  echo "$id: $*"
  timeout --kill-after=10 "$(seconds_left)" "$@" >"$out/$id.log" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  child=''
  if ((code == 124 || code == 137)); then # it has not ended, and will run again
    state[$id]="cut off after $((SECONDS - began)) s"
  else
    state[$id]=$code
    echo "$code" >"$out/$id.exit"
  fi
  read_last_line
  ((code == 0)) || tail -n 20 "$out/$id.log"
  echo "$id: exit code $code after $((SECONDS - began)) s"
}

summarise() {
  local each
  {
    echo "${gpu:-no GPU: small, on the CPU}, $(date -u +%FT%TZ)"
    [[ -z $images ]] || echo "$images"
    for each in "${ids[@]}"; do
      echo "$each: ${state[$each]}${last[$each]:+: ${last[$each]}}"
    done
  } >"$out/summary.part" && mv "$out/summary.part" "$out/summary.txt"
  # Networks are taken home as far as there is room.
  [[ -z ${OUT:-} ]] || "$python" -m bench.pack "$out" "$OUT" "$(student iad1)" "$(student ard)" "$(student at)" | tail -n 1
}

interrupted() {
  trap '' INT TERM
  if [[ -n $child ]]; then
    kill "$child"
    wait "$child"
    read_last_line
    summarise
  fi
  exit 130
}
trap interrupted INT TERM

make_ready() {
  mkdir -p "$out" "$work"
  echo "${gpu:-No GPU: the stages run on the CPU, small, and measure nothing of a GPU.}"
  if [[ ! -e $site ]] && compgen -G '.gpu/wheels/*.whl' >/dev/null; then
    rm -rf "$site.part"
    if "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site.part" .gpu/wheels/*.whl; then
      mv "$site.part" "$site"
    else
      echo "The packages in .gpu/wheels cannot be installed for Python $version."
    fi
  fi
  [[ -n $images ]] || return
  echo "$images"
  if [[ ! -e $ENGINE_DATA ]]; then
    rm -rf "$ENGINE_DATA.part"
    if "$python" -W ignore -m tarfile -e "$archive" "$ENGINE_DATA.part"; then
      mv "$ENGINE_DATA.part" "$ENGINE_DATA"
    else
      echo "$archive cannot be unpacked."
    fi
  fi
}

stages note
[[ -z $only || " ${ids[*]} " == *-"$only "* ]] || refuse "--stage $only: known are ${ids[*]#*-}"
if [[ -n $list ]]; then
  stages show
  for each in "${!on_gpu[@]}"; do
    echo "part $each: $(((on_gpu[each] + 59) / 60)) minutes on a GPU, $(((on_cpu[each] + 59) / 60)) on a CPU"
  done
  exit
fi
make_ready
stages attempt
summarise || failed+=(packing)
cat "$out/summary.txt"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
