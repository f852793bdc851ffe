# make demo: from nothing to a search page in the browser.  make test: everything CI runs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
PORT   ?= 7860

.PHONY: demo train test lint bench figures clean

# Installed once; again only when the project's dependencies change. The constraints pin torch, so that a machine without
# a GPU does not download CUDA; drop them (make demo CONSTRAINTS=) to take the newest build for your own GPU.
CONSTRAINTS ?= -c constraints.txt

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[search,demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[search,demo,samples,dev]'
	# the release our EfficientNet-Lite is compared with; it asks for an old torch by name, so without its dependencies
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/interlace data get furniture food interiors
	$(BIN)/interlace train demo train.out=$(RUN)
	$(BIN)/interlace index $(RUN) furniture,food,interiors
	$(BIN)/interlace demo $(RUN) --port $(PORT) $(DEMO_FLAGS)

test: $(VENV)/.dev
	$(BIN)/ruff check interlace tests bench
	$(BIN)/mypy
	@command -v chromium >/dev/null || test -n "$$INTERLACE_CHROMIUM" || { \
	  echo "The page is tested in a real browser: installing Debian's chromium"; \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q chromium; }
	$(BIN)/python -m pytest

bench: $(VENV)/.dev
	$(BIN)/interlace data get furniture food interiors
	$(BIN)/python -m bench.input_path --out docs/bench/input_path.json
	$(BIN)/python -m bench.search --out docs/bench/search.json
	$(BIN)/python -m bench.models --out docs/bench/models.json
	$(BIN)/python -m bench.passes --out docs/bench/passes.json
	$(BIN)/python -m bench.cached --out docs/bench/cached.json

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache *.egg-info
