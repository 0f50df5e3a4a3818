"""`make test`: the gates in order, cheapest first, each with its own line; stops at the first that is not passed."""
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.repo import ROOT, git  # noqa: E402

BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TQDM_DISABLE": "1"}


def snapshot() -> dict[str, str]:
    "Every file that git sees, tracked or new, and the hash of its content."
    names = set(git("ls-files", "--cached", "--others", "--exclude-standard"))
    return {n: hashlib.sha1((ROOT/n).read_bytes()).hexdigest() for n in names if (ROOT/n).is_file()}


def run(*command: str, **env: str) -> int:
    return subprocess.run([str(BIN/command[0]), *command[1:]], cwd=ROOT, env=ENV | env).returncode


def no_op(command: str) -> int:
    "Run a command that must change, add and remove nothing."
    before = snapshot()
    status = run(command)
    after = snapshot()
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    for name in changed: print(f"    {'new' if name not in before else 'gone' if name not in after else 'changed'}: {name}")
    return status or bool(changed)


ONE_THREAD = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") # for each of two workers


def names() -> int:
    "Code in whole files is free of unused names, too; pages import what a reader may want to try, so there only undefined names and second imports count."
    return run("ruff", "check", "-q", "--select", "F", "arm", "tests", "data", "setup.py") or run("ruff", "check", "-q", "--select", "F811,F821", "nbs")


def nbdev_test() -> int: return run("nbdev_test", "--n_workers", "2", **ONE_THREAD)


def pytest() -> int: return run("pytest", "-q", "-n", "2", "--dist", "loadfile", "tests", **ONE_THREAD)


STEPS = [  # name, what to run, what to do when it fails
    ("ruff: no undefined or unused names", names,
     "correct the names in the pages, then run nbdev_export"),
    ("nbdev_clean changes nothing", lambda: no_op("nbdev_clean"), "the pages above are clean now: commit them"),
    ("nbdev_export changes nothing", lambda: no_op("nbdev_export"), "the modules above are exported now: commit them with their pages"),
    ("README is the rendered index", lambda: run("python", "tests/tools/readme.py", "--check"), "run `make readme`, then commit README.md"),
    ("nbdev_test: every page runs", nbdev_test, "run the page that is named above from top to bottom"),
    ("pytest", pytest, "see the failures above"),
]


def main() -> int:
    for k, (name, step, advice) in enumerate(STEPS, 1):
        print(f"[{k}/{len(STEPS)}] {name} ...", flush=True)
        start = time.monotonic()
        status = step()
        if status:
            print(f"[{k}/{len(STEPS)}] {name}: FAILED after {time.monotonic() - start:.0f} s; {advice}", flush=True)
            return 1
        if k < len(STEPS): print(f"[{k}/{len(STEPS)}] {name}: ok, {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
