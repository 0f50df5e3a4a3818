#!/bin/bash
# Reinforcement learning. On each machine, from the top of the repository (source .venv/bin/activate): HEAD=first-machine data/launch/rl.sh
# Fewer machines: NODES=5 GPUS=8 HEAD=first-machine data/launch/rl.sh --gpus 40 --accumulate 8
set -euo pipefail
: "${HEAD:?name the first machine, such as HEAD=node01}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TQDM_DISABLE=1
base=runs/sft/model
for phase in t2i edit joint; do
  torchrun --nnodes "${NODES:-10}" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id arm-rl-$phase --max-restarts "${RESTARTS:-3}" -m arm.app.launch rl --config data/launch/rl.yaml --phase "$phase" --base "$base" --out "runs/rl/$phase" "$@"
  base="runs/rl/$phase/model"
done
