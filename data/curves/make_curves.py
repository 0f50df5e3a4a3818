"""Make the short reference runs again, or keep the curves of a run of your own: see README.md beside this file."""
import argparse
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")


def quick(out: Path, seed: int) -> None:
    "`arm train all --quick --steps 120 --batch 8 --scenes 200 --seed SEED`."
    from arm.train.run import train_all
    train_all(str(out), True, 120, batch=8, scenes=200, every=120, seed=seed)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/curves"), help="folder for the short runs (default runs/curves)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the short runs (default 0 1 2)")
    p.add_argument("--keep", type=Path, metavar="RUN", help="a finished run: keep the curves of its stages instead of making short runs")
    p.add_argument("--name", default="quick120", help="name of the reference (default quick120)")
    p.add_argument("--stages", nargs="+", default=["teacher", "tokenizer", "decoder", "arm"], help="which stages to keep")
    p.add_argument("--run", default="seed 0", help="what to call the run that is kept (default: seed 0)")
    args = p.parse_args()
    from arm.train.curves import keep_curves
    if args.keep:
        for stage in args.stages: print(keep_curves(args.keep/stage, stage, args.name, args.run))
        return
    for seed in args.seeds:
        folder = args.out/f"{args.name}-{seed}"
        if not (folder/"arm"/"done.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            quick(folder, seed)
        for stage in args.stages: print(keep_curves(folder/stage, stage, args.name, f"seed {seed}"))


if __name__ == "__main__": sys.exit(main())
