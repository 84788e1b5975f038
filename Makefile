# make demo   everything once: install, export the bundled model with its parity report, build an FP16
#             engine, classify images/*.jpg
# make test   what CI runs: ruff, mypy --strict, pytest on every core
# make coverage   the tests again with the lines that none of them runs; Python 3.11 is twice as slow while it counts
# make test-gpu   on a machine with an NVIDIA GPU: doctor, the tests that need one, engines and timings, in
#             build/gpu-report; GPU_EXTRA=gpu-cu12, tensorrt, rtx or rtx-cu13 takes another backend (docs/gpu-testing.md)
# make test-triton   in an environment of its own: a real Triton Inference Server serves what smlp export writes
# make docs   the documentation as a site in site/, built offline; a broken link or reference is an error
# make fuzz   mutated images, model files and metadata for twenty minutes; any traceback, crash or hang is a finding

PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled once, when they are first imported; most of those installed here never are.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable

comma := ,
GPU_EXTRA ?= gpu
GPU_ENV := .venv/with-$(GPU_EXTRA)
# onnxruntime and onnxruntime-gpu exclude each other, and only the extras `gpu` bring the latter.
GPU_DECODE := decode-gpu$(if $(filter gpu-cu12 rtx,$(GPU_EXTRA)),-cu12)
GPU_EXTRAS := $(GPU_EXTRA),$(GPU_DECODE),export$(if $(filter gpu gpu-%,$(GPU_EXTRA)),,$(comma)cpu)

TRITON_ENV := .venv/with-triton

.PHONY: demo test types tests test-gpu test-triton coverage docs fuzz clean

demo: .venv/demo
	$(BIN)/smlp export --format onnx
	$(BIN)/smlp build-engine --fp16
	$(BIN)/smlp predict images/*.jpg

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs 2 types tests

types:
	$(BIN)/mypy

# Beside mypy: tests that wait leave it a fifth of two cores.
tests:
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_OPTIONS)

coverage: .venv/test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --cov --cov-report=term-missing:skip-covered

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[cpu,export,rtx]"
	touch $@

.venv/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[cpu,export,rtx,test]"
	touch .venv/demo $@

test-gpu: $(GPU_ENV)/installed
	$(GPU_ENV)/bin/python -m scripts.gpu_report

# Without constraints.txt, whose versions are those of machines without a GPU.
$(GPU_ENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_ENV)
	$(GPU_ENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[$(GPU_EXTRAS)]" pytest
	touch $@

# conftest.py needs PyTorch, which is not there.
test-triton: $(TRITON_ENV)/installed
	$(TRITON_ENV)/bin/python -m pytest --noconftest tests/test_triton_server.py $(PYTEST_OPTIONS)

# nvidia-pytriton has the server, and takes NumPy 1; tritonclient takes protobuf 6, where constraints.txt has 7. So neither
# fits the other environments, and here smlp-deploy comes without its requirements, of which all but NumPy 2 are listed.
$(TRITON_ENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(TRITON_ENV)
	$(TRITON_ENV)/bin/pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 "tritonclient[grpc,http]" \
		onnx onnx-ir onnxruntime pytest \
		filelock msgspec pillow platformdirs rich safetensors "typer>=0.27,<0.29"
	$(TRITON_ENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Copied as they lie, so that links between them are the same in the repository and on the site.
PAGES := README.md CHANGELOG.md docs benchmarks/README.md benchmarks/lowering.md smlp_deploy/data/README.md

docs: .venv/docs
	rm -rf build/docs && mkdir -p build/docs
	tar cf - $(PAGES) | tar xf - -C build/docs
	$(BIN)/zensical build --strict --clean

.venv/docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[docs]"
	touch $@

fuzz: .venv/test
	$(BIN)/python -m scripts.fuzz --minutes 20

clean:
	rm -rf .venv artifacts model_repository build dist site .cache *.egg-info
