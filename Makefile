# `make help` lists the targets. Each sets up .venv itself when it has to.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip
# With a compiler at hand its errors are worth seeing; without one the tests of the rest still run.
export GFL_KERNELS_BUILD ?= $(if $(shell command -v $${CXX:-c++}),cpu,auto)
# Workers of pytest; the tests are short, so two share even a small machine well.
JOBS ?= 2
PYTEST_ARGS ?=
# TORCH=2.10.0: that version instead of the pinned one, with the torchvision and the Triton that go with it.
TORCH ?=
REQUIREMENTS = $(if $(TORCH),sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^torchvision==.*/torchvision/' \
  -e '/^triton==/d' requirements-dev.txt,cat requirements-dev.txt)
BUILD_TAG = $(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')
NATIVE_SOURCES := setup.py pyproject.toml CMakeLists.txt gfl_kernels/_version.py \
  $(wildcard cmake/*) $(wildcard python/*) $(shell find csrc -type f)
CXX_FILES := $(shell find csrc python tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help venv demo demo-mmdet demo-ultralytics gallery test test-triton test-asan asan-objects check-isa check-oldest test-gpu sanitize-gpu \
  bench bench-quick bench-gpu compare-gpu roofline report docs api lint format wheel test-wheel sdist ci clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.package ## Create .venv with everything development needs

demo: $(VENV)/.package ## Train a detector on scanned digits with plain and with fused losses
	$(PY) -m bench.train_digits $(DEMO_ARGS)

demo-mmdet: $(VENV)/.package ## The same with mmdetection's own head, as it is and accelerated
	$(PY) -m bench.train_hosts mmdet $(DEMO_ARGS)

demo-ultralytics: $(VENV)/.package ## The same with Ultralytics' YOLOv8n
	$(PY) -m bench.train_hosts ultralytics $(DEMO_ARGS)

gallery: $(VENV)/.package ## Draw distributions of box sides, their mean, peak, spread and the decoded boxes
	$(PY) -m bench.gallery $(GALLERY_ARGS)

# The second run is the suite on interpreted Triton kernels. 5: PYTEST_ARGS leave none of it.
test: $(VENV)/.package ## All tests (PYTEST_ARGS, JOBS)
	$(PY) -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS) || [ $$? -eq 5 ]

# Other versions of Triton stand before the one of .venv on the path. A part of each file that stands for it.
TRITON_VERSIONS := 3.6.0 3.9.0
TRITON_COMPILED := (test_quality_sparse and nearest-True and not dtype2) or (quality_layouts and nchw) or \
  (test_distribution and nearest-17-dtype0) or (integral and nearest-dtype0) or launches or one_compilation or one_level
TRITON_INTERPRETED := triton and ((test_layouts and dtype1 and (contiguous or negative)) or sparse_and_dense or \
  fine_grid and 1.5-dtype0 or fine_grid and 2.0-dtype1 or triton-9 or triton-31 or triton-100)
test-triton: $(VENV)/.package ## Some Triton tests under other versions of it, and triton-viz's sanitizer
	for version in $(TRITON_VERSIONS); do \
	  site=$(CURDIR)/build/triton-$$version; \
	  [ -d $$site/triton ] || $(PIP) install -q --no-deps --target $$site triton==$$version; \
	  export PYTHONPATH=$$site TRITON_CACHE_DIR=$$site-cache; \
	  $(PY) -c "import triton; assert triton.__version__ == '$$version', triton.__version__"; \
	  $(PY) -m pytest -q -p no:cacheprovider -n $(JOBS) tests/test_triton.py -k '$(TRITON_COMPILED)'; \
	  TRITON_INTERPRET=1 $(PY) -m pytest -q -p no:cacheprovider -n $(JOBS) \
	    tests/test_quality.py tests/test_distribution.py -k '$(TRITON_INTERPRETED)'; \
	done
	[ -d build/triton-viz/flask ] || \
	  $(PIP) install -q --target build/triton-viz $$(grep -v -e '^#' -e ^triton tests/requirements-sanitizer.txt)
	[ -d build/triton-viz/triton_viz ] || \
	  $(PIP) install -q --no-deps --target build/triton-viz $$(grep ^triton tests/requirements-sanitizer.txt)
	PYTHONPATH=$(CURDIR)/build/triton-3.6.0:$(CURDIR)/build/triton-viz GFL_TEST_EXPECT_SANITIZER=1 \
	  $(PY) -m pytest -q -rs -p no:cacheprovider tests/test_sanitizer.py

# On a machine with a GPU, GFL_KERNELS_BUILD=cuda and GFL_KERNELS_CUDA_ARCHITECTURES=native build what these
# four need. Workers share the GPU: Triton's compiler is most of the time (on an H100 with 16 cores 344 tests
# took two and a half minutes). Odd shapes run twice: as they are, and under compute-sanitizer, for which torch's
# allocator must not hand out parts of larger blocks; there three of the tests took two minutes.
GPU_TESTS := $(addprefix tests/test_,gpu.py odd_shapes.py quality.py distribution.py)
test-gpu: $(VENV)/.package ## What a GPU alone can show, gradcheck and the odd shapes, on Triton and CUDA C++
	@$(PY) tests/require_gpu.py $@
	GFL_TEST_EXPECT_GPU=1 $(PY) -m pytest -n auto --maxprocesses 16 --dist worksteal $(GPU_TESTS) \
	  -k '(triton or cuda) and (test_gpu or test_odd_shapes or gradcheck)' $(PYTEST_ARGS)

sanitize-gpu: $(VENV)/.package ## The odd shapes under compute-sanitizer's memcheck and racecheck
	@$(PY) tests/require_gpu.py $@ compute-sanitizer
	for tool in memcheck racecheck; do \
	  GFL_TEST_EXPECT_GPU=1 GFL_TEST_COMBINATIONS=some GFL_TEST_THINNED=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest -p no:cacheprovider \
	    tests/test_odd_shapes.py -k 'triton or cuda' $(PYTEST_ARGS); \
	done

bench-gpu: $(VENV)/.package ## Benchmarks of the ops on a GPU, one folder of bench/out/gpu per backend
	@$(PY) tests/require_gpu.py $@
	$(PY) -m bench.run --device cuda --backend triton --out bench/out/gpu/triton $(BENCH_ARGS)
	$(PY) -m bench.run --device cuda --backend cuda --no-compile --out bench/out/gpu/cuda $(BENCH_ARGS)
	$(PY) -m bench.kernels --out bench/out/gpu

compare-gpu: $(VENV)/.package ## Fails if bench-gpu is slower than what BASELINE, a folder of an earlier one, says
	$(PY) -m bench.compare $(or $(BASELINE),$(error name the folder: make $@ BASELINE=...)) bench/out/gpu

bench: $(VENV)/.package ## Benchmarks of the ops; tables and charts go to bench/out
	$(PY) -m bench.run $(BENCH_ARGS)

bench-quick: $(VENV)/.package ## The same in under two minutes
	$(PY) -m bench.run --quick $(BENCH_ARGS)

report: $(VENV)/.package ## One HTML page of the figures in bench/out; what is missing is measured first
	[ -e bench/out/bench.json ] || $(PY) -m bench.run --quick $(BENCH_ARGS)
	[ -e bench/out/roofline.json ] || $(PY) -m bench.roofline --quick $(ROOFLINE_ARGS)
	[ -e bench/out/train_digits.json ] || $(PY) -m bench.train_digits $(DEMO_ARGS)
	$(PY) -m bench.page

roofline: $(VENV)/.package ## Counts from the compiled GPU kernels, without a GPU; also to bench/out
	$(PY) -m bench.roofline $(ROOFLINE_ARGS)

# The installed copy is found before the one in the source tree through PYTHONPATH; pytest runs from the
# build folder because `python -m` puts the current folder first. Only with capture=sys does the sanitizer's
# report, which goes to file descriptor 2 before the process ends, reach the terminal.
test-asan: build/asan/.built ## The CPU kernels on odd shapes under AddressSanitizer and UBSan
	cd build/asan && \
	grep -q __asan_init site/gfl_kernels/lib/libgfl_native.so && \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	GFL_KERNELS_BACKEND=cpu PYTHONPATH=$(CURDIR)/build/asan/site \
	$(CURDIR)/$(BIN)/pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider \
	  -n $(JOBS) --capture=sys -k 'not reference and not processes and not compile and not export' \
	  $(CURDIR)/tests/test_odd_shapes.py $(CURDIR)/tests/test_head.py $(PYTEST_ARGS)

# For one instruction set, the best that this machine has: they take minutes each.
ASAN_BUILD := CXX=g++ CXXFLAGS=-march=native GFL_KERNELS_BUILD=cpu GFL_KERNELS_BUILD_DIR=build/asan/native \
  GFL_KERNELS_CMAKE_ARGS="-DGFL_SANITIZE=address,undefined -DGFL_DISPATCH=OFF"
asan-objects: $(VENV)/.package
	$(ASAN_BUILD) $(PY) setup.py -q build_ext --build-lib build/asan/lib

build/asan/.built: $(VENV)/.package $(wildcard gfl_kernels/*.py)
	rm -rf build/asan/site
	$(ASAN_BUILD) $(PIP) install -q --no-deps --no-build-isolation --target build/asan/site .
	touch $@

check-isa: $(VENV)/.package ## No code of one instruction set may be shared with the others
	$(BIN)/cmake --build build/native-$(BUILD_TAG) --target check_isa_symbols

check-oldest: $(VENV)/.package ## What sees torch has to compile against the oldest torch that serves
	$(PY) tests/oldest.py

# The variable: Material for MkDocs advertises its successor on every build.
docs: $(VENV)/.package ## The documentation, strictly, in build/site
	$(PY) docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

api: $(VENV)/.package ## Write the public API's snapshot anew, after it has changed on purpose
	$(PY) tests/test_api.py > build/api.txt && mv build/api.txt tests/api.txt

lint: $(VENV)/.package ## ruff, clang-format, mypy and actionlint, as the commit hooks run them
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.requirements ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# With an nvcc at hand the wheel has the CUDA part, for the GPUs of GFL_KERNELS_CUDA_ARCHITECTURES or for all.
# torch stays outside the wheel, and of its library only the stable ABI of 2.10 may be used. The tag says which
# glibc the build machine has asked for: for an older one build on an older system. _C, which only one version of
# Python can load and which says nothing that ctypes cannot ask the library, stays out of it.
WHEEL_BUILD = $(if $(shell command -v nvcc),cuda,cpu)
wheel: $(VENV)/.package ## A wheel with the native library in dist/, for every Python and every torch from 2.10 on
	rm -rf build/wheel dist/gfl_kernels-*.whl
	GFL_KERNELS_BUILD=$(WHEEL_BUILD) GFL_KERNELS_CMAKE_ARGS="$${GFL_KERNELS_CMAKE_ARGS:-} -DGFL_PYTHON_MODULE=OFF" \
	  $(PY) -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch*' -w dist build/wheel/*.whl
	$(PY) -m zipfile -e dist/gfl_kernels-*.whl build/wheel/unpacked
	$(BIN)/torch-abi-audit --check torch build/wheel/unpacked/gfl_kernels/lib/libgfl_native.so | tee build/wheel/abi.txt
	grep -q 'Min torch: *2.10.0$$' build/wheel/abi.txt

test-wheel: $(VENV)/.requirements ## The wheel of dist/ in a fresh environment without a compiler (TORCH, PYTHON)
	$(PY) tests/wheel.py --torch $(or $(TORCH),$(shell sed -n 's/^torch==//p' requirements-dev.txt)) \
	  --python $(or $(PYTHON),$(PY)) dist/gfl_kernels-*.whl

sdist: $(VENV)/.package ## A source distribution in dist/
	$(PY) -m build --sdist --no-isolation

ci: ## Everything that the project's CI runs
	.ci/run

clean: ## Remove what was built, but not .venv
	rm -rf build dist bench/out gfl_kernels.egg-info gfl_kernels/lib gfl_kernels/include
	rm -f gfl_kernels/_C.* gfl_kernels/_autograd.* gfl_kernels/_build_report.json $(VENV)/.package
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The first interpreter of at least 3.10 that can make virtual environments.
$(PY):
	@for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo 'no Python >= 3.10 with venv and ensurepip was found (Debian: apt-get install python3-venv);' \
	  'name one with: make PYTHON=/path/to/python3' >&2; exit 1

$(VENV)/.requirements: requirements-dev.txt | $(PY)
	$(REQUIREMENTS) | sed '/^# without dependencies/,$$d' | $(PIP) install --disable-pip-version-check --no-compile -q -r /dev/stdin
	$(REQUIREMENTS) | sed -n '/^# without dependencies/,$$p' | \
	  $(PIP) install --disable-pip-version-check --no-compile -q --no-deps -r /dev/stdin
	touch $@

$(VENV)/.package: $(VENV)/.requirements $(NATIVE_SOURCES)
	$(PIP) install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@$(PY) -m gfl_kernels
	touch $@
