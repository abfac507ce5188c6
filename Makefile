# Everything a developer needs, from a machine with Python 3.11+, a C++ compiler, make and git.
#
#   make venv     .venv with the package and its extras, installed as a user would get it
#   make test     lint, types, imports, then the whole test suite against the installed package
#   make demo     compress the small model in assets/ to 2, 3, 4 and 8 bits, and measure each
#   make native   build the C++ kernels into src/, for working on them without reinstalling
#   make lint     ruff alone
#
# PYTHON=python3.12 picks another interpreter; PYTEST="-k server" passes options on.

PYTHON ?= python3
PYTEST ?=
VENV   := .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(shell find src kernels -type f -not -name '*.pyc' -not -name '*.so' -not -path '*/__pycache__*' 2>/dev/null)

.PHONY: venv test lint types imports unit demo native clean

venv: $(VENV)/.installed

# The dependencies change seldom and take minutes; the package changes often and takes seconds.
$(VENV)/.dependencies: pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  extras = [project["optional-dependencies"][extra] for extra in ("compress", "serve", "export", "dev")]; \
	  print(*project["dependencies"], *sum(extras, []), sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet -c constraints-dev.txt -r $(VENV)/requirements.txt
	touch $@

# touch first: what changes while pip runs makes the next call install again
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES) README.md LICENSE
	touch $(VENV)/.began
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	mv $(VENV)/.began $@

test: lint types imports unit

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	MYPYPATH=src $(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports

# The pytest program, not `python -m pytest`: that one would put this folder in front of the installed package.
unit: $(VENV)/.installed
	$(BIN)/pytest $(PYTEST)

demo: $(VENV)/.installed
	$(BIN)/python -m lilliput.apps.demo assets/tales7m --out demo \
	  --text assets/tales7m/valid.txt --prompt "Once upon a time"

native: $(VENV)/.dependencies
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -c 'import glob, zipfile; z = zipfile.ZipFile(*glob.glob("build/wheel/*.whl")); \
	  [print(z.extract(n, "src")) for n in z.namelist() if n.startswith("lilliput/engine/_native")]'

clean:
	rm -rf $(VENV) build demo
