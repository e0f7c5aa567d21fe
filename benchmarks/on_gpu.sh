#!/usr/bin/env bash
# What waits for a GPU, in parts that each end within ten minutes; on a CPU each runs at reduced size.
#
#   bash benchmarks/on_gpu.sh check       # correctness, then the pieces of a step, the data path's share, memory
#   bash benchmarks/on_gpu.sh speed       # whole steps: the targets' models compiled, then everything eager
#   bash benchmarks/on_gpu.sh accuracy PATH_OF/cifar-100-python    # choose dense settings, then five arms
#   bash benchmarks/on_gpu.sh points PATH_OF/modelnet10            # naive MoE with and without Early EWA
#
# accuracy and points pack eight runs onto the card, stop after 9 minutes (MINUTES) with checkpoints, and exit with
# status 143: start them again to go on. Their runs are in runs/ (OUTPUT). check and speed write records/; so do
# accuracy and points once all runs are done, but not on a CPU.
#
# Nothing is installed: torch, timm, pytest, hypothesis and what ewavit[train,compare] names must be there.
# WHEELS=FOLDER unpacks the wheels in FOLDER into build/wheels first, for a machine without network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
python=.venv/bin/python
[ -x $python ] || python=python3
if [ -n "${WHEELS:-}" ]; then
  for wheel in "$WHEELS"/*.whl; do $python -m zipfile -e "$wheel" build/wheels; done
  export PYTHONPATH=$PYTHONPATH:$PWD/build/wheels
fi
gpu=$($python -c "import torch; print(int(torch.cuda.is_available()))")

output=${OUTPUT:-runs}
ends=$((SECONDS + ${MINUTES:-9} * 60))
small=(--limit 128 --epochs 2 --warmup-epochs 1 --val-interval 2 --seeds 2 --no-amp --workers 0 --jobs 2)
[ "$gpu" = 1 ] || output=$output/small

compare() { # until the time is over; a stopped comparison ends this script with its exit status
  timeout --signal=TERM --kill-after=60 "$((ends > SECONDS ? ends - SECONDS : 1))" \
    $python -m ewavit.cli compare --output "$output" "$@" || {
    status=$?
    [ $status != 124 ] || status=143
    exit $status
  }
}

keep() { # the records of finished comparisons; runs at reduced size are no records
  [ "$gpu" = 0 ] || for name in "$@"; do $python benchmarks/records.py "$output/$name"; done
}

case ${1:-} in
  check)
    device=cpu
    [ "$gpu" = 0 ] || device=cuda
    $python -m pytest -q -p no:cacheprovider tests/test_invariants.py tests/test_averaging.py --device $device
    $python benchmarks/parts.py
    $python benchmarks/data_rate.py --share
    if [ "$gpu" = 1 ]; then
      $python benchmarks/memory.py --model vit_base_patch16_224 --img-size 224 --patch-size 16 --batch-size 128 --repeats 1
    else
      $python benchmarks/memory.py --batch-size 8 --repeats 1
    fi
    ;;
  speed)
    if [ "$gpu" = 1 ]; then
      few=dense,ewa-4,ewa-4-all,top1-grouped_mm
      $python benchmarks/step_time.py --models s,b --modes compiled --arms $few --rounds 30
      $python benchmarks/step_time.py --modes eager,checkpointed --rounds 10
    else
      $python benchmarks/step_time.py --models ti64 --modes eager --arms dense,ewa-4 --rounds 5
    fi
    ;;
  accuracy)
    cifar=${2:?give the folder of CIFAR-100 in its python format}
    more=(--jobs 8)
    [ "$gpu" = 1 ] || more=("${small[@]}" --batch-size 64 --model-kwargs patch_size=8,embed_dim=48,depth=2,num_heads=3)
    compare --config recipes/search/cifar100-tuning.yaml --data "$cifar" "${more[@]}"
    # Settings of the best mean on held-out images, as flags; timm and torch are not needed for this.
    chosen=$($python - "$output/cifar100-tuning/results.json" <<'END'
import json, statistics, sys
arms = json.load(open(sys.argv[1]))["arms"]
best = max(arms, key=lambda arm: statistics.mean(run["top1"] for run in arm["runs"]))["overrides"]
print(f"--lr {best['lr']} --drop-path {best['drop_path']}")
END
    )
    echo "chosen on held-out images: $chosen"
    compare --config recipes/search/cifar100.yaml --data "$cifar" $chosen "${more[@]}"
    keep cifar100-tuning cifar100
    ;;
  points)
    clouds=modelnet10:${2:?give a folder or file of ModelNet10}
    more=(--jobs 8)
    [ "$gpu" = 1 ] || more=("${small[@]}" --num-points 128)
    compare --config recipes/modelnet10-whole.yaml --data "$clouds" "${more[@]}"
    keep modelnet10-whole
    ;;
  *)
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
