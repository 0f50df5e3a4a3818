#!/bin/bash
# Pre-training. On each machine, from the top of the repository (source .venv/bin/activate): HEAD=first-machine data/launch/pt.sh
# Fewer machines: NODES=5 GPUS=8 HEAD=first-machine data/launch/pt.sh --gpus 40 --accumulate 5
set -euo pipefail
: "${HEAD:?name the first machine, such as HEAD=node01}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TQDM_DISABLE=1
torchrun --nnodes "${NODES:-25}" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id arm-pt --max-restarts "${RESTARTS:-3}" -m arm.app.launch pt --config data/launch/pt.yaml "$@"
