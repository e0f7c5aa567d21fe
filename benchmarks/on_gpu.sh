#!/usr/bin/env bash
# What waits for a GPU, in parts that each end within ten minutes; on a CPU each runs at reduced size.
#
#   bash benchmarks/on_gpu.sh check       # correctness, then the pieces of a step, the data path's share, memory
#   bash benchmarks/on_gpu.sh speed       # whole steps: the targets' models compiled, then everything eager
#   bash benchmarks/on_gpu.sh accuracy PATH_OF/cifar-100-python    # start it again to go on
#   bash benchmarks/on_gpu.sh points PATH_OF/modelnet10            # start it again to go on
#
# Nothing is installed: torch, timm, pytest, hypothesis and what ewavit[train,compare] names must be there.
# Writes records/.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
python=.venv/bin/python
[ -x $python ] || python=python3
gpu=$($python -c "import torch; print(int(torch.cuda.is_available()))")

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
    [ "$gpu" = 1 ] || more=(--limit 256 --epochs 2 --val-interval 1 --seeds 2 --no-amp --arms dense,ewa)
    $python -m ewavit.cli compare --config recipes/search/cifar100.yaml --data "$cifar" "${more[@]}"
    $python benchmarks/records.py runs/cifar100
    ;;
  points)
    clouds=modelnet10:${2:?give a folder or file of ModelNet10}
    more=(--jobs 8)
    [ "$gpu" = 1 ] || more=(--limit 64 --epochs 1 --seeds 2 --arms dense,ewa)
    $python benchmarks/point_ops.py
    $python -m ewavit.cli compare --config recipes/compare-modelnet10.yaml --data "$clouds" "${more[@]}"
    $python benchmarks/records.py runs/modelnet10
    ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
