# Everything a newcomer types: setup, serve, test, bench, check. Nothing else needs to be installed but Python 3.11 and make.

PYTHON ?= python3.11
PORT ?= 8000
CONFIG ?= deployments/configs/demo.yaml
VENV := .venv
BIN := $(VENV)/bin

# The one place where threads are set for commands; tests/conftest.py reads the same file for bare pytest runs.
include threads.env
export $(shell sed -n 's/^\([A-Z_]*\)=.*/\1/p' threads.env)

# No hub, no telemetry, whatever the machine's own settings say.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup programs serve test test-steady test-head soak bench bench-smoke check audit format metrics chart boards

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt infra/make-venv.sh
	@PYTHON=$(PYTHON) sh infra/make-venv.sh $(VENV)
	@touch $@

serve: setup
	@exec $(BIN)/python -m deployments.launch $(CONFIG) --port $(PORT)

test: setup programs
	$(BIN)/python -m pytest

# What tests drive besides the project's own environment; without it they skip.
programs:
	@sh infra/install-debian.sh chromium prometheus kubernetes-client:kubectl
	@PYTHON=$(PYTHON) sh infra/make-terraform-tools.sh .expertscale/terraform-tools

# The table of all metrics, from cluster/metrics.py; a test says when it is out of date.
metrics: setup
	$(BIN)/python -m cluster.metrics >infra/prometheus/METRICS.md

# The Grafana boards, from infra/grafana/panels.py; a test says when they are out of date.
boards: setup
	$(BIN)/python -m infra.grafana

# The chart's schema, table of values and copies of files, after a change of what they are made of.
chart: setup
	$(BIN)/python helm/generate.py

# Three minutes at each level of steady load instead of one; nothing else may use the machine meanwhile.
test-steady: setup
	EXPERTSCALE_STEADY_S=180 $(BIN)/python -m pytest tests/e2e/test_elastic.py -s

# The head node is killed and started anew: what clients see of it.
test-head: setup
	EXPERTSCALE_HEAD=1 $(BIN)/python -m pytest tests/chaos/test_head_loss.py -s

# Twenty minutes of mixed load while something is killed, stopped or scaled every ten seconds; SECONDS=60 for less.
soak: setup
	@$(BIN)/python -m tests.chaos.soak $(if $(SECONDS),--seconds $(SECONDS))

# Under 12 minutes; progress on the terminal, then a table, then one line of JSON. SIDES=fabric,growth runs a part.
bench: setup
	@$(BIN)/python -m infra.bench $(if $(SIDES),--only $(SIDES))

bench-smoke: setup
	@$(BIN)/python -m infra.bench --smoke

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known holes in the pinned versions, in an environment of its own. Needs PyPI's own JSON interface, which mirrors may
# lack: what could not be looked up counts as a failure.
audit:
	@test -x .expertscale/audit/bin/pip-audit || { $(PYTHON) -m venv .expertscale/audit && \
		.expertscale/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	.expertscale/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
