# `make help` lists what there is. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PAGE := _build/html/index.html
NOTEBOOK ?=
PORT ?= 8000
# A thread that waits for another sleeps: on a busy machine spinning makes small networks ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests run on as many processes as there are cores, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
# For `make gpu`: another interpreter that has torch with CUDA, one part alone, and where its archive goes.
PYTHON_GPU ?=
PART ?=
OUT ?= _build/gpu
FROM ?= $(OUT)

.DEFAULT_GOAL := help
.PHONY: help interpreter book check slow test notebooks serve bench gpu records clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

# A .venv of another Python than the one that was asked for would be used without a word.
interpreter:
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1; \
	  if test -x $(BIN)/python; then \
	    there=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    test "$$asked" = "$$there" || { echo "$(VENV) has Python $$there, PYTHON=$(PYTHON) is $$asked: rm -rf $(VENV) makes room for it"; exit 1; }; \
	  fi
endif

$(READY): requirements.txt pyproject.toml | interpreter
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed, and %s is %d.%d: make PYTHON=python3.12 book" % (sys.executable, *v))'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half of one would be taken for whole
	@echo "Installing requirements.txt into $(VENV); the first time takes minutes (torch is large)."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

# A build that failed forgets what it read: otherwise the next one would skip the pages with the warnings.
book: $(READY)  ## build the book and print the page to open
	@$(BIN)/jupyter-book build . -n -W --keep-going --quiet || { rm -rf _build/.doctrees; exit 1; }
	@echo "Open $(CURDIR)/$(PAGE)"

check: $(READY)  ## what one wants after each edit: style, structure, records, mathematics
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	$(PYTEST) -m "not slow and not pages"

test: book  ## check the mathematics, the code and the pages, then run every notebook (short)
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	$(PYTEST)
	GAE_SIZE=short $(PYTEST) --dist loadfile --nbval-lax -W ignore notebooks/*.ipynb

slow: $(READY)  ## find the tests that take more than half a second, which `make check` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations 0 --durations-min 0.5 | \
	  sed -nE 's/.*s (call|setup) +tests\/([^[]*).*/\2/p' | sort -u > tests/slow.txt

notebooks: $(READY)  ## run notebooks/*.py and write them with their outputs; NOTEBOOK=eae for one
	$(BIN)/python book/_ext/make_notebooks.py $(NOTEBOOK)

serve: book  ## show the book at http://localhost:8000; PORT=8080 for another port
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

bench: $(READY)  ## measure the speed of training and of chains (against others: pip install -e .[benchmarks])
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/mala.py

gpu: $(if $(PYTHON_GPU),,$(READY))  ## on a machine with CUDA: tests, runs, benchmark; PART=2 for one, OUT=folder
	$(or $(PYTHON_GPU),$(BIN)/python) benchmarks/gpu.py --out $(OUT) $(if $(PART),--part $(PART))

records: $(READY)  ## take the archives that `make gpu` left into the book: FROM=folder
	$(BIN)/python benchmarks/gpu.py --take $(FROM)

clean:  ## remove the built book and the caches (not .venv)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
