"""Imports flow one way, heavy libraries stay where they belong, and nothing draws from global random state. Read with `ast`."""
import ast
import re

import pytest
from tools.repo import LIB, modules, page_of

LAYERS = ["core", "data", "tokenizer", "model", "train", "eval", "rl", "app"]
ONLY_IN = {  # library: the modules that may import it, as patterns
    "lightning": r"arm\.train\..*|arm\.rl\.loop",
    "pytorch_lightning": r"-",
    "matplotlib": r"arm\.show",
    "transformers": r"arm\.tokenizer\.siglip|arm\.tokenizer\.towers|arm\.data\.text|arm\.app\.speed",
    "diffusers": r"arm\.tokenizer\.flux",
    "gradio": r"arm\.app\.app",
    "IPython": r"-",
    "fastcore": r"-",
    "nbdev": r"-",
}


def imports(name: str) -> list[tuple[str, str]]:
    "(module, name) for every import of a module, relative ones resolved; (module, '') for `import module`."
    found, package = [], name.split(".")[:-1]
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found += [(a.name, "") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            found += [(".".join(base + ([node.module] if node.module else [])), a.name) for a in node.names]
    return found


def own(name: str) -> set[str]:
    "The modules of this package that a module imports."
    found = {m if m in modules() else f"{m}.{n}".rstrip(".") for m, n in imports(name) if m.split(".")[0] == "arm"}
    return found - {"arm", "arm.__version__"}  # the bare package: its place on disk, its version


def layer(name: str) -> str: return name.split(".")[1]


def number(name: str) -> tuple[int, str]:
    "The number of a module's page: (11, 'a') for 11a."
    m = re.match(r"(\d+)([a-z]?)_", page_of(modules()[name]).name)
    return int(m[1]), m[2]


@pytest.mark.parametrize("name", modules())
def test_imports_flow_one_way(name):
    for other in sorted(own(name)):
        assert other in modules(), f"{name} imports {other}, which no page exports"
        assert number(other) < number(name), f"{name} imports {other}, whose page comes later"
        if layer(name) in LAYERS and layer(other) in LAYERS:
            assert LAYERS.index(layer(other)) <= LAYERS.index(layer(name)), f"{name} imports upwards: {other}"
        if layer(other) in ("show", "ablate"):
            assert layer(name) in ("app", "ablate"), f"{name} imports {other}, which is for pages and the app"


@pytest.mark.parametrize("name", modules())
def test_every_layer_is_known(name):
    assert layer(name) in LAYERS + ["show", "ablate"], f"{name} lies in no layer of {LAYERS}"


@pytest.mark.parametrize("name", modules())
def test_libraries_stay_where_they_belong(name):
    for module, _ in imports(name):
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or re.fullmatch(allowed, name), f"{name} imports {module}; only {allowed} may"


@pytest.mark.parametrize("name", modules())
def test_no_star_imports(name):
    assert not [m for m, n in imports(name) if n == "*"]


def test_only_the_version_stands_in_the_package_itself():
    assert re.fullmatch(r'__version__ = "[\d.]+"\s*', (LIB/"__init__.py").read_text())
    assert not [p for p in LIB.rglob("__init__.py") if p.parent != LIB and p.read_text().strip()]


# ---- random state -------------------------------------------------------------------------------------------------------------

DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "normal", "bernoulli", "poisson"}
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_", "cauchy_"}
LIKE = {"rand_like", "randn_like", "randint_like"}  # these take no generator before torch 2.9 and hide where they draw from
GLOBAL = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_default_dtype",
          "torch.set_default_device", "random.seed"}
CALM = {"random.Random", "random.SystemRandom"}


def dotted(node: ast.AST) -> str:
    "`a.b.c` of an attribute chain, or ''."
    if isinstance(node, ast.Name): return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return ""


def global_draws(source: str) -> list[str]:
    "Calls that read or set a global random state."
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        call, attr = dotted(node.func), getattr(node.func, "attr", "")
        given = {k.arg for k in node.keywords}
        bad = (call in GLOBAL or call.endswith("seed_everything") or call.startswith("random.") and call not in CALM
               or call.startswith(("np.random.", "numpy.random.")) and not call.endswith(("default_rng", "Generator", "SeedSequence", "PCG64"))
               or call.startswith("torch.") and attr in DRAWS | LIKE and "generator" not in given
               or attr in IN_PLACE and "generator" not in given and not call.startswith(("nn.init", "torch.nn.init", "init.")))
        if bad: found.append(f"line {node.lineno}: {call or attr}(...)")
    return found


def test_the_reader_of_random_state_sees_what_it_should():
    bad = ["torch.randn(3)", "random.random()", "np.random.rand(2)", "torch.manual_seed(0)", "x.normal_()", "torch.rand_like(x)", "pl.seed_everything(1)"]
    good = ["torch.randn(3, generator=g)", "random.Random(0)", "np.random.default_rng(0)", "rng.random()", "x.normal_(generator=g)", "nn.init.normal_(w)"]
    assert all(map(global_draws, bad)) and not any(map(global_draws, good))


@pytest.mark.parametrize("name", modules())
def test_nothing_draws_from_global_random_state(name):
    found = global_draws(modules()[name].read_text(encoding="utf-8"))
    if layer(name) in ("train", "rl"): found = [f for f in found if "seed_everything" not in f]  # a training run owns its process: dropout draws globally
    assert not found, f"{name}: " + "; ".join(found) + " (pass a generator; build layers inside arm.core.seeded)"
