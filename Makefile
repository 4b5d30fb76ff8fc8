# Two commands on a fresh machine: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
SBOM := build
IMAGES := spin-diffusion/runtime-python:0.1.0 spin-diffusion/mlflow:0.1.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo ui demo-clean experiment test faults test-docker lint compile images sbom manifests clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pipelines,dev]'
	touch $@

install: $(READY) ## Set up .venv with everything, for the commands that are no target here
	@echo "ready: . $(BIN)/activate"

demo: $(READY) ## Self-play on emoji, two iterations, a few minutes on two CPU cores; run again to resume
	@$(BIN)/python pipelines/demo.py

ui: $(READY) ## Reopen the MLflow UI on the demo's data
	@$(BIN)/python pipelines/demo.py --ui

demo-clean: ## Remove the demo's data
	rm -rf build/demo

experiment: $(READY) ## Self-play against SFT on the test prompts, three seeds (two hours)
	$(BIN)/python -m examples.emoji.experiment

test: $(READY) ## Every test that needs no docker
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not docker' --numprocesses 2 --dist loadgroup --no-loadscope-reorder

faults: $(READY) ## Kill whole pipelines 50 times, at other moments each time, and load 100,000 pairs (hours on two cores; SEED=1 repeats)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/faults \
	  --kills 50 --runs 10 --pairs 100000 --seed $(or $(SEED),$(shell date +%s))

test-docker: $(READY) ## The images, and the pipeline in containers; skipped without a docker daemon, unless CI=true
	@$(BIN)/python -m pytest -m docker -rs tests/containers

images: ## Build the CUDA runtime image and the MLflow server image
	docker buildx bake -f images/docker-bake.json

build/sbom/.ready: Makefile
	$(PYTHON) -m venv build/sbom && build/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0 && touch $@

sbom: build/sbom/.ready ## Write a CycloneDX list of each image's Python packages to build/
	@for image in $(IMAGES); do name=$${image##*/}; list=$(SBOM)/$${name%%:*}; \
	  docker run --rm $$image cat /opt/venv/packages.txt > $$list.txt \
	  && build/sbom/bin/cyclonedx-py requirements $$list.txt --output-file $$list.cdx.json || exit; \
	done

manifests: $(READY) ## Render every overlay to tests/golden, where the tests expect it
	@for overlay in $$(ls manifests/overlays); do \
	  $(BIN)/kubectl kustomize manifests/overlays/$$overlay > tests/golden/manifests-$$overlay.yaml || exit; \
	done

lint: $(READY) ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compile: $(READY) ## Compile the pipeline to build/spin-diffusion.yaml
	$(BIN)/python pipelines/spin.py

clean: demo-clean ## Remove everything that was built
	rm -rf build $(VENV)
