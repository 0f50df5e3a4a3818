#!/bin/bash
# Continued training. On each machine, from the top of the repository (source .venv/bin/activate): HEAD=first-machine data/launch/ct.sh
# Fewer machines: NODES=5 GPUS=8 HEAD=first-machine data/launch/ct.sh --gpus 40 --accumulate 4
set -euo pipefail
: "${HEAD:?name the first machine, such as HEAD=node01}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TQDM_DISABLE=1
torchrun --nnodes "${NODES:-20}" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id arm-ct --max-restarts "${RESTARTS:-3}" -m arm.app.launch ct --config data/launch/ct.yaml "$@"
