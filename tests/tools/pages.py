"""Runs pages from top to bottom and stores their outputs: all in order, or those named on the command line."""
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.repo import ROOT, pages  # noqa: E402

BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([str(BIN/command[0]), *command[1:]], cwd=ROOT, env=env, capture_output=True, text=True)


def main() -> int:
    wanted = [Path(name).name.removesuffix(".ipynb") for name in sys.argv[1:]]
    chosen = [p for p in pages() if not wanted or p.name in wanted]
    unknown = set(wanted) - {p.name for p in chosen}
    if unknown:
        print(f"no page {', '.join(sorted(unknown))}; the pages are {', '.join(p.name for p in pages())}")
        return 2
    status = 0
    for page in chosen:
        start = time.monotonic()
        print(f"{page.name:<36}", end="", flush=True)
        done = run("jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.timeout=1800",
                   str(page.path.relative_to(ROOT)))
        took = time.monotonic() - start
        print(f"{'ok' if done.returncode == 0 else 'FAILED'} {took:5.0f} s{'  long: a page should run in a minute on a quiet machine' if took > 60 else ''}", flush=True)
        if done.returncode:
            print(done.stderr[-4000:])
            status = 1
            break
    for step in ("nbdev_clean", "nbdev_export"):  # also after a failure: no half-cleaned page stays behind
        done = run(step)
        if done.returncode: print(f"{step} failed:\n{done.stderr[-2000:]}"); status = 1
    return status


if __name__ == "__main__": sys.exit(main())
