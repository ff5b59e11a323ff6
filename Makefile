# The two commands of the README: `make demo` and `make test`. Both work in a bare clone: the first use makes .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.py') CMakeLists.txt pyproject.toml
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test lint bench sanitize install clean

demo: $(VENV)/demo-installed
	$(BIN)/dit-fast demo $(DEMO_ARGS)

# the nets of the tests are tiny: with more threads they mostly wait for one another
test: export OMP_NUM_THREADS = 1
test: $(VENV)/dev-installed
	$(MAKE) lint
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest bench --benchmark-disable -q

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# a table at the end, all else in the file
bench: RESULTS = bench/results/$(shell date +%F)-$(shell uname -n).json
bench: $(VENV)/dev-installed
	mkdir -p bench/results
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-only -q --benchmark-quiet --benchmark-json=$(RESULTS)
	$(BIN)/python bench/table.py $(RESULTS)

# the kernels' tests under the address and undefined behaviour sanitizers, in a build of their own
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/dev-installed
	CMAKE_ARGS=-DDIT_FAST_CUDA=OFF CXXFLAGS="-O1 -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target build/sanitized -C build-dir=build/sanitizing -C cmake.build-type=Debug .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/sanitized OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not cuda" \
	  tests/test_ops_grad_dot.py tests/test_ops_lowrank_update.py tests/test_ops_update_dot.py tests/test_ops_max_pool.py tests/test_ops_dual_rows.py tests/test_ops_mlp_retrain.py \
	  tests/test_ops_mlp_sweep.py tests/test_mlp_team.py

install: $(VENV)/demo-installed

# constraints.txt pins torch to the build that runs everywhere; the package itself takes a range
$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo-installed: $(VENV)/created constraints.txt $(SOURCES)
	@echo "installing dit_fast and what it needs into $(VENV): a few minutes, once"
	$(BIN)/pip install --quiet -c constraints.txt '.[demo]'
	touch $@

$(VENV)/dev-installed: $(VENV)/created constraints.txt $(SOURCES)
	@echo "installing dit_fast and what it needs into $(VENV): a few minutes, once"
	$(BIN)/pip install --quiet -c constraints.txt '.[test,dev,integrations]'
	touch $@

clean:
	rm -rf build dist $(VENV)
