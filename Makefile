# Both main targets do all their own set-up: `make demo` trains, `make test` tests.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-jax-next test-gpu lint benchmark clean

demo: $(VENV)/ready
	$(BIN)/python -m examples.demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2
	$(MAKE) test-jax-next

# The newest JAX: it alone is installed beside the first environment, whose packages serve for the rest.
JAX_NEXT := 0.12.0.1
NEXT := $(VENV)/jax-next
test-jax-next: $(VENV)/ready
	$(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --no-deps \
		jax==$(JAX_NEXT) jaxlib==$(JAX_NEXT) jax-cuda13-plugin==$(JAX_NEXT)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(NEXT)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	$(NEXT)/bin/python -c "import jax; assert jax.__version__ == '$(JAX_NEXT)'"
	$(NEXT)/bin/python -m pytest -n 2 tests/test_lowering.py tests/test_sharding.py \
		-k "any_sharding or (lowering and not every_kernel)"

# On a machine with a GPU: a test that needs one fails where there is none.
test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest --require-gpu

benchmark: $(VENV)/ready
	$(BIN)/python -m benchmarks run

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

# Without a GPU, jax-cuda13-plugin without its CUDA libraries (20 MB): lowering for CUDA needs it there too.
$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.12 or newer is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[jax,torch,examples,test,dev]"
	if command -v nvidia-smi > /dev/null; then \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt "jax[cuda13]"; \
	elif test "$$(uname)" = Linux; then \
		$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt jax-cuda13-plugin; \
	fi
	touch $@
