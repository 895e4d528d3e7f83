# The whole interface: make help. Nothing here needs a GPU.

PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
DATA ?= data/digits
# Evaluated once: every step of one make has to see the same folder.
ifndef RUN
RUN := runs/digits-$(shell date -u +%Y%m%d-%H%M%S)
endif
# What compiles device code. Not in constraints.txt: torch's builds for CUDA 12 pin versions of their own.
X86 := ; sys_platform == 'linux' and platform_machine == 'x86_64'
NVRTC := "nvidia-cuda-nvrtc-cu12==12.9.86$(X86)" "nvidia-cuda-runtime-cu12==12.9.79$(X86)"
OLDEST := 2.7.1
# The challenge's label files, CC BY-NC 4.0, are not part of this repository.
EPIC_ANNOTATIONS ?= $(or $(M3EM_EPIC_ANNOTATIONS),$(wildcard ../shared/data/epic100))
export M3EM_EPIC_ANNOTATIONS := $(abspath $(EPIC_ANNOTATIONS))
EPIC_CLIPS ?= 600
ifndef EPIC_RUN
EPIC_RUN := runs/epic-dry-run-$(shell date -u +%Y%m%d-%H%M%S)
endif
EPIC := $(BIN)/python -m m3em_fast.epic
# The label files that are cut down to the drawn clips.
EPIC_OWN := --annotations $(EPIC_RUN)/features/annotations --no-published
# Models A to D with fewer channels and epochs, and torch's first weights, which learn in a few steps.
EPIC_SMALL := --epochs 15 --lr-steps 10 13 --lr 0.02 --init torch --batch-source 32 --batch-target 32 --latent 16 \
	--fc-dim 64 --relation-dim 32 --object-dim 32 --reduction 4 --threads 1
METHODS := source_only ta3n m3em
TESTS ?=
BENCH ?=

.NOTPARALLEL:
.PHONY: help train epic-dry-run test test-oldest bench gpu cuda-report cuda-work triton-report lint format build wheel clean

help:
	@echo "make train    train M3EM and its baselines on the digits benchmark, and M3EM once more without the kernels, for its"
	@echo "              time (DATA=$(DATA), RUN=a new folder under runs/)"
	@echo "make epic-dry-run  the EPIC-KITCHENS-100 challenge from its label files to a checked submission, on generated features"
	@echo "              (EPIC_ANNOTATIONS=folder of EPIC_100_*.csv, EPIC_RUN=a new folder under runs/, EPIC_CLIPS=$(EPIC_CLIPS) a split)"
	@echo "make test     lint, then every test (TESTS=tests/test_x.py for some of them)"
	@echo "make test-oldest  the tests of ops, modules and training steps under torch $(OLDEST); downloads and keeps several GB"
	@echo "make bench    time the ops against eager PyTorch and torch.compile, for an hour (BENCH=--quick: arguments of python -m bench)"
	@echo "make gpu      on a machine with an NVIDIA card, in $(PY) as it is: tests, compute-sanitizer and the benchmark of"
	@echo "              every op and M3EM on the card; at most 8 minutes, no network (OUT=folder of the records, else bench/results)"
	@echo "make cuda-report  docs/cuda-resources.md: registers, shared memory, spills and occupancy of every CUDA kernel"
	@echo "make cuda-work    docs/cuda-work.md: instructions, bank conflicts, sectors and waits of every CUDA kernel, without a card"
	@echo "make triton-report  docs/triton-resources.md: the same of the Triton kernels, compiled without a card"
	@echo "make lint     ruff, mypy and clang-format, changing nothing"
	@echo "make format   let ruff and clang-format rewrite what they can"
	@echo "make build    compile csrc/, as far as it has changed (M3EM_CUDA_ARCHS=none: no CUDA)"
	@echo "make wheel    dist/: a manylinux wheel for this Python and the source archive"
	@echo "make clean    remove what was built, and the virtual environment; data/ and runs/ stay"
	@echo "PY=python3.12 chooses the Python of the virtual environment, CXX=clang++ the compiler."

train: $(VENV)/.train build
	$(BIN)/python -m m3em_fast.data.digits --out "$(DATA)"
	set -e; for method in $(METHODS); do $(BIN)/python train.py --method $$method --data "$(DATA)" --run $(RUN)/$$method; done
	M3EM_BACKEND=reference $(BIN)/python train.py --method m3em --data "$(DATA)" --run $(RUN)/m3em-reference
	$(BIN)/python -m m3em_fast.uda.report $(addprefix $(RUN)/,$(METHODS)) --reference $(RUN)/m3em-reference --markdown $(RUN)/comparison.md

# Real labels, generated features. The submission is of the drawn clips of target_test: the server would refuse it.
epic-dry-run: $(VENV)/.train build
	@test -n "$(EPIC_ANNOTATIONS)" || { echo "make epic-dry-run needs EPIC_ANNOTATIONS=folder of the label files EPIC_100_*.csv."; exit 2; }
	$(EPIC).generate --annotations $(EPIC_ANNOTATIONS) --out $(EPIC_RUN)/features --clips $(EPIC_CLIPS) --protocols val test
	set -e; for protocol in val test; do for model in A B C D; do \
		$(BIN)/python train.py --preset epic --model $$model --protocol $$protocol --data $(EPIC_RUN)/features \
			--run $(EPIC_RUN)/$$protocol-$$model $(EPIC_SMALL); done; done
	set -e; name=A; given=$(EPIC_RUN)/val-A/scores/target_val; for model in B C D; do \
		name=$$name+$$model; given="$$given $(EPIC_RUN)/val-$$model/scores/target_val"; \
		$(EPIC).ensemble $$given --out $(EPIC_RUN)/val-$$name; done
	$(EPIC).scoring $(EPIC_RUN)/val-A/scores/target_val $(addprefix $(EPIC_RUN)/val-,A+B A+B+C A+B+C+D) $(EPIC_OWN)
	$(EPIC).ensemble $(foreach m,A B C D,$(EPIC_RUN)/test-$(m)/scores/target_test) --out $(EPIC_RUN)/test-A+B+C+D \
		--search $(foreach m,A B C D,$(EPIC_RUN)/test-$(m)/scores/source_val) $(EPIC_OWN)
	$(EPIC).submission $(EPIC_RUN)/test-A+B+C+D --out $(EPIC_RUN)/submission.zip $(EPIC_OWN)
	$(EPIC).submission --check $(EPIC_RUN)/submission.zip $(EPIC_OWN)

# loadfile: the tests of a file share what its fixtures made.
test: lint build
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# The oldest torch that is supported, with the Triton that it pins, in an environment of its own. Without constraints.txt,
# whose versions go with a newer torch; with a NumPy that the interpreter of that Triton knows. What is deselected, and why, is in docs/decisions.md.
test-oldest: $(VENV)-oldest/.made-$(OLDEST)
	$(VENV)-oldest/bin/python setup.py --quiet build_ext --inplace
	$(VENV)-oldest/bin/python -m pytest tests/test_ops*.py tests/test_backends.py tests/test_nn*.py tests/test_train_steps.py \
		tests/test_triton_backend.py tests/test_triton_kernels.py tests/test_triton_consensus_map.py \
		tests/test_triton_faster.py tests/test_triton_large.py \
		--deselect tests/test_ops_compile.py::test_compiled_without_the_extension \
		--deselect tests/test_ops_compile.py::test_a_backend_chosen_by_name_says_in_the_trace_why_it_cannot_serve \
		--deselect tests/test_triton_backend.py::test_under_torch_compile_a_reason_is_a_sentence

$(VENV)-oldest/.made-$(OLDEST): pyproject.toml
	$(PY) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install torch==$(OLDEST) 'numpy<2.4' 'setuptools>=77' pybind11 ninja
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --no-build-isolation --editable ".[train,dev,epic]" torch==$(OLDEST) 'numpy<2.4'
	@touch $@

# The table is what figures come from. With arguments for it, the second front end is left out: it takes none of them.
bench: $(VENV)/.dev build
	$(BIN)/python -m bench $(BENCH)
	$(if $(BENCH),,$(BIN)/python -m pytest bench --benchmark-only)

# In the Python that is there, with its torch: the virtual environment would need a network. OUT may also come from the
# environment.
gpu:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make gpu needs Python 3.10 or newer; name one with: make gpu PY=python3.12."; exit 2; }
	$(PY) -m bench.gpu $(if $(OUT),--results "$(OUT)")

cuda-report: $(VENV)/.dev build
	$(BIN)/python -m bench.cuda_report

cuda-work: $(VENV)/.dev build
	$(BIN)/python -m bench.cuda_work --write

triton-report: $(VENV)/.dev build
	$(BIN)/python -m bench.triton_report

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

build: $(VENV)/.made
	@test -e $(VENV)/.train -o -e $(VENV)/.dev || $(MAKE) $(VENV)/.train
	$(BIN)/python setup.py --quiet build_ext --inplace

# From the archive and in isolation, as whoever installs the archive builds it. No cache: pip takes an archive of the same
# name and place for the one that it has built before.
wheel: $(VENV)/.dev
	rm -rf build/wheel
	$(BIN)/python setup.py -q sdist -d build/wheel
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check \
		wheel -v --no-cache-dir --no-deps -w build/wheel build/wheel/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	@ls dist

clean:
	rm -rf build dist $(VENV) $(VENV)-oldest *.egg-info .mypy_cache .pytest_cache .ruff_cache m3em_fast/_C.* \
		m3em_fast/_C_missing.txt m3em_fast/_cuda.zip
	find . -name __pycache__ -not -path './data/*' -prune -exec rm -rf {} +

# What each of them installs. --no-build-isolation, so that constraints.txt decides on the build tools as well.
$(VENV)/.train: EXTRAS := train,epic
$(VENV)/.dev: EXTRAS := train,dev,epic
$(VENV)/.train $(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(VENV)/.made
	$(PIP) setuptools pybind11 ninja $(NVRTC)
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.made:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "m3em_fast needs Python 3.10 or newer; name one with: make PY=python3.12 (on Debian: apt install python3)."; exit 1; }
	@$(PY) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PY) cannot make virtual environments; on Debian: apt install python3-venv."; exit 1; }
	$(PY) -m venv $(VENV)
	@touch $@
