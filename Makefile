# Every target installs what it needs into .venv first. Python 3.11 to 3.13, make and git must be there.
PYTHON ?= python3
OUT ?= out
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
UNIT = $(BIN)/python -m pytest tests/unit -q -n 2 --dist worksteal
TUNING_TESTS = $(BIN)/python -m pytest tests/tuning -q -n 2 --dist loadfile
STACK_TESTS = $(BIN)/python -m pytest tests/stack -q -n 2 --dist loadfile
CONTRACT_TESTS = $(BIN)/python -m pytest tests/contract -n 2 --dist loadscope --no-loadscope-reorder
DOCKERFILES = $(wildcard */Dockerfile */*.Dockerfile)
.DEFAULT_GOAL := help
.PHONY: help rehearse test unit tuning stack contract engine tools local local-down live lint format setup registry azurite lock bench-tuning bench-serving fuzz images preview up destroy render dashboards clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

rehearse: setup  ## the whole chain on this machine (ADAPTERS="a.yaml b.yaml" for your own, KEEP=1 leaves it up)
	@$(BIN)/python -m rehearsal --out $(OUT) $(addprefix --adapter ,$(ADAPTERS)) $(if $(KEEP),--keep)

test: setup registry azurite lint  ## everything that must hold: lint, types, unit, tuning, stack and contract tests
	$(UNIT)
	$(TUNING_TESTS)
	$(STACK_TESTS)
	$(CONTRACT_TESTS)
	@if [ "$(ENGINE)" = no ]; then :; elif $(BIN)/python -m localcloud.tools --check >/dev/null 2>&1; then $(MAKE) engine; \
	  else echo "left out: the tests on the real Pulumi engine, whose tools take some 20 minutes to build once: make engine"; fi

unit: setup  ## the fast tests alone, for daily work
	$(UNIT)

tuning: setup  ## the tests of the trainer: torch, transformers and peft on a tiny base
	$(TUNING_TESTS)

stack: setup  ## the tests of the Pulumi program and its parts, under mocks
	$(STACK_TESTS)

contract: setup registry azurite  ## the tests with real parts alone: vLLM, router, registry
	$(CONTRACT_TESTS)

engine: setup azurite tools live  ## the stack on the real Pulumi engine and Kubernetes, Azure simulated; as root, pods that run
	DRYDOCK_ENGINE=required $(BIN)/python -m pytest tests/engine tests/local -n 2 --dist loadfile

# What pods need that really run: Debian's packages, and root for namespaces and mounts (localcloud/live/machine.py);
# busybox-static is the image of their tests.
LOCAL_PACKAGES := buildah busybox-static debootstrap docker-registry dumb-init iproute2 nftables
live:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  dpkg -s $(LOCAL_PACKAGES) >/dev/null 2>&1 || { echo "installing $(LOCAL_PACKAGES)"; apt-get update -q && \
	  apt-get install -y -q --no-install-recommends $(LOCAL_PACKAGES); } >/dev/null 2>&1; fi; true

able:  # told before anything is built, which takes long
	@test "$$(id -u)" = 0 || { echo "root is needed, for namespaces, mounts and nftables: sudo make local"; exit 1; }

local: able setup azurite tools live  ## the whole stack on this machine, its pods really running, and its drills (needs root)
	@$(BIN)/python -m localcloud.live up --out $(OUT) $(if $(DRILLS),--drills $(DRILLS))

local-down: setup  ## end that cluster and remove what it wrote
	@$(BIN)/python -m localcloud.live down --out $(OUT)

tools: setup  ## build what that needs from Go modules into .engine (some 20 minutes, once)
	@$(BIN)/python -m localcloud.tools

lint: setup  ## ruff, mypy, and hadolint on the Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint $(DOCKERFILES)

format: setup  ## let ruff put the code in order
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

setup: $(READY)  ## install the locked versions into .venv (about 6 GB)

$(READY): requirements/machine.lock requirements/uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "Linux on x86_64 is needed (vLLM's CPU build); this is $$(uname -sm)"; exit 1; }
	@echo "installing into $(VENV): about 3 GB to fetch, 6 GB on disk, half a minute to some minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.lock
	$(BIN)/uv pip sync -q --compile-bytecode --require-hashes --python $(BIN)/python requirements/machine.lock requirements/uv.lock
	@touch $@

# What the contract tests need beyond .venv: Debian's packages, where this machine lets us install them. docker-registry
# is a real OCI registry, from which KAITO fetches with skopeo; haproxy and dumb-init stand before the router; prometheus
# has promtool, which tries the alerts.
registry:
	@missing=; for tool in docker-registry haproxy dumb-init prometheus skopeo; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get install -y -q $$missing || { apt-get update -q && apt-get install -y -q $$missing; }; } >/dev/null 2>&1; fi; \
	  for tool in $$missing; do command -v $$tool >/dev/null || \
	    echo "no $$tool here and no right to install it: its tests are skipped"; done; fi

azurite: setup  ## the Blob emulator of the contract tests (needs npm); 3.35.0 is the last that runs on Node 20
	@test -x $(VENV)/azurite/node_modules/.bin/azurite-blob || ! command -v npm >/dev/null || \
	  npm install --prefix $(VENV)/azurite --no-save --no-audit --no-fund --ignore-scripts --loglevel error azurite@3.35.0

STACK ?= dev
# A misspelt CLOUD=local must not ask Azure.
PULUMI = @test -z "$(CLOUD)" || { echo "CLOUD=$(CLOUD): only local is known; without CLOUD, Azure is meant"; exit 2; }; \
	command -v pulumi >/dev/null || { echo "the Pulumi CLI is needed: https://www.pulumi.com/docs/install/"; exit 1; }; pulumi

# CLOUD=local: on this machine, with the real engine and API server and no account at Azure (localcloud/).
LOCALLY = $(BIN)/python -m localcloud $@ --stack $(STACK) --folder $(OUT)/localcloud
ifeq ($(CLOUD),local)
preview up destroy: setup azurite tools
	@$(LOCALLY)
else
preview:  ## what `pulumi up` would change in an environment (STACK=dev), held against policy/; CLOUD=local: without Azure
	$(PULUMI) preview --stack $(STACK) --policy-pack policy

up:  ## bring an environment up (STACK=dev)
	$(PULUMI) up --stack $(STACK) --policy-pack policy

destroy:  ## remove an environment (STACK=dev); what is protected stays, and says so
	$(PULUMI) destroy --stack $(STACK)
endif

# By what `pulumi up` has, where that is installed: a deployer's machine need not be one on which vLLM runs.
STACK_VENV := $(if $(wildcard .venv-pulumi/bin/python),.venv-pulumi,$(VENV))
render: $(if $(filter $(VENV),$(STACK_VENV)),setup)  ## write all Kubernetes objects of an environment as YAML to OUT/render (STACK=dev); no cloud needed
	$(STACK_VENV)/bin/python -m workloads.render --stack $(STACK) --out $(OUT)/render

dashboards: $(if $(filter $(VENV),$(STACK_VENV)),setup)  ## write the Grafana dashboards as JSON to OUT/dashboards, for a Grafana that is not declared here
	$(STACK_VENV)/bin/python -m workloads.dashboards --out $(OUT)/dashboards

# Python 3.11 is the oldest supported: without saying so, the result would depend on the one that runs here.
LOCK := $(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --custom-compile-command "make lock"

lock: setup  ## resolve pyproject.toml anew into requirements/*.lock and requirements.txt (UPGRADE=--upgrade: newest)
	for group in machine uv; do $(LOCK) --group $$group -o requirements/$$group.lock $(UPGRADE) || exit 1; done
# uv keeps the versions that it finds in the file it writes. Each of these starts as machine.lock: an image installs
# what the tests ran. Its own last version comes after, for what only this image has.
	for group in training serving-gpu serving-cpu router stress; do lock=requirements/$$group.lock; \
	  cat requirements/machine.lock $(if $(UPGRADE),,$$(ls $$lock 2>/dev/null)) > $$lock.new && mv $$lock.new $$lock && \
	  $(LOCK) --group $$group -o $$lock || exit 1; done
	cat requirements/machine.lock $(if $(UPGRADE),,benches/requirements.lock) > benches/requirements.lock.new && \
	  mv benches/requirements.lock.new benches/requirements.lock && $(LOCK) --group bench -o benches/requirements.lock
# The deployer's machine may be a Mac or run Windows: --no-config leaves out the Linux-only environments.
	cp requirements/machine.lock requirements.txt
	$(LOCK) --no-config --group stack --no-header -o requirements.txt
	sed -i '1i # What `pulumi up` needs on the machine that runs it, and no more; written by: make lock' requirements.txt

# TRL and its own dependencies stay out of .venv: no product needs them.
BENCH := .venv-bench
$(BENCH)/.installed: benches/requirements.lock $(READY)
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BIN)/uv pip sync -q --require-hashes --python $(BENCH)/bin/python benches/requirements.lock
	@touch $@

bench-tuning: $(BENCH)/.installed  ## tokens/s of our trainer and of TRL on this machine, alone on it for some 15 minutes
	$(BENCH)/bin/python -m benches.tuning --out $(OUT)

bench-serving: setup  ## our replica against vLLM alone on this machine, alone on it for some 25 minutes (COMPILE=1: torch.compile)
	@$(BIN)/python -m benches.serving --out $(OUT) $(if $(COMPILE),--compile)

MINUTES ?= 60
fuzz: setup  ## generated requests against a real replica (MINUTES=60, SEED=1 for the same again); findings in OUT/fuzz
	@$(BIN)/python -m benches.fuzz --out $(OUT) --minutes $(MINUTES) $(addprefix --seed ,$(SEED))

BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(if $(shell command -v $(tool)),$(tool))))
IMAGES ?= training serving router stress

images:  ## build the images as drydock/NAME by docker, podman or buildah (IMAGES=stress, BUILD_ARGS="--build-arg ...")
	@test -n "$(BUILDER)" || { echo "docker, podman or buildah is needed; the stack itself needs none: ACR builds its images"; exit 1; }
	for image in $(IMAGES); do $(BUILDER) build $(BUILD_ARGS) -f $$(ls $$image/Dockerfile */$$image.Dockerfile 2>/dev/null) -t drydock/$$image . || exit 1; done

clean:  ## remove what was installed and written
	rm -rf $(VENV) $(BENCH) .venv-pulumi .engine .images out .pytest_cache .mypy_cache .ruff_cache
