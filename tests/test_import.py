"""Each module stands on its own: it imports in a fresh process, changes nothing by that, and says what its parts are for."""
import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest
from fastcore.docments import docments
from tools.repo import ROOT, modules

# One process loads the libraries; each module is then imported in a fork of it, where nothing of `arm` is loaded yet.
FORKS = """
import importlib, json, os, random, sys, traceback, warnings
for name in ("torch", "lightning", "transformers", "matplotlib.figure", "scipy.stats", "numpy", "accelerate"):
    try: importlib.import_module(name)
    except ImportError: pass
import matplotlib, numpy, torch
torch.set_num_threads(1)

def state():
    s = numpy.random.get_state()
    return [str(random.getstate()), torch.random.get_rng_state().tolist(), [str(s[0]), s[1].tolist(), s[2]], str(dict(matplotlib.rcParams)),
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_threads(), os.getcwd(), dict(os.environ),
            str(warnings.filters), torch.are_deterministic_algorithms_enabled(), str(torch.get_default_device())]
NAMES = ["random", "torch random", "numpy random", "rcParams", "dtype", "grad", "threads", "cwd", "environ", "warnings", "determinism", "device"]

verdicts = {}
for module in sys.argv[1:]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            before = state(); importlib.import_module(module); after = state()
            verdict = "; ".join(f"changes {n}" for n, a, b in zip(NAMES, before, after) if a != b)
        except BaseException: verdict = traceback.format_exc()[-1500:]
        os.write(write, verdict.encode()[:60000]); os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f: verdicts[module] = f.read().decode()
    os.waitpid(pid, 0)
print("VERDICTS" + json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def verdicts():
    done = subprocess.run([sys.executable, "-c", FORKS, *modules()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "VERDICTS" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.split("VERDICTS", 1)[1])


@pytest.mark.parametrize("module", modules())
def test_imports_in_a_fresh_process_and_changes_no_global_state(module, verdicts):
    assert verdicts[module] == "", f"{module}: {verdicts[module]}"


def test_import_arm_is_instant():
    code = "import sys, time; t = time.perf_counter(); import arm; dt = time.perf_counter() - t; print(arm.__version__, dt, *sorted(sys.modules))"
    version, seconds, *loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert float(seconds) < .1
    assert not {"torch", "numpy", "PIL", "lightning", "matplotlib", "transformers"} & set(loaded)
    assert f"version = {version}" in (ROOT/"settings.ini").read_text()


def documented(name, thing) -> list[str]:
    "What a public function or class does not say about itself."
    missing = []
    if not (inspect.isclass(thing) or inspect.isfunction(thing)): return missing
    if not inspect.getdoc(thing) or inspect.isclass(thing) and not thing.__dict__.get("__doc__"): missing.append(f"{name}: no docstring")
    elif len(thing.__doc__.strip().splitlines()) > 1: missing.append(f"{name}: its docstring has more than one line; the rest belongs to the page")
    if inspect.isclass(thing) and "__init__" not in thing.__dict__ and not hasattr(thing, "__dataclass_fields__"): return missing
    try: notes = docments(thing, full=True, returns=False)
    except Exception as e: return missing + [f"{name}: docments cannot be read ({type(e).__name__}: {e})"]
    above = [b for b in thing.__mro__[1:] if hasattr(b, "__dataclass_fields__")] if inspect.isclass(thing) else []  # whose fields are said there
    told = {p for b in above for p, note in docments(b, full=True, returns=False).items() if note.get("docment")}
    for parameter, note in notes.items():
        if parameter in ("self", "return", "args", "kwargs") or parameter in told: continue
        if not note.get("docment"): missing.append(f"{name}: parameter {parameter} has no comment")
    return missing


@pytest.mark.parametrize("module", modules())
def test_public_names_are_documented(module):
    loaded = import_module(module)
    assert hasattr(loaded, "__all__") and loaded.__all__, f"{module} exports nothing"
    missing = [line for name in loaded.__all__ for line in documented(name, getattr(loaded, name))]
    assert not missing, "\n".join(missing)
