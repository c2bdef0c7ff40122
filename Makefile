# One list of verbs. A fresh machine needs python3 (3.11 or newer) with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test hunts others check format lint types coverage wheel docs bench bench-full bench-workers holds queues middle house crash sweeps forks waiting leaks rot planted workers clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/ready ## the main job on real input, killed four times on the way
	$(BIN)/python examples/index_sources.py

# Half of the time of all tests goes into these: the model, and what can go wrong at every place. Two processes of pytest,
# these and the others, use two processors.
HUNTS := tests/engines/test_crash_points.py tests/storage/test_recovery.py \
  $(addprefix tests/test_,$(addsuffix .py,kill model planted simulation sweeps)) \
  tests/broker tests/test_aio.py tests/test_aio_contract.py  # no hunts, but the halves run side by side
RUN := $(BIN)/python

test: $(VENV)/ready ## all tests
	$(MAKE) --no-print-directory -j2 hunts others

hunts: $(VENV)/ready
	$(RUN) -m pytest $(HUNTS)

others: $(VENV)/ready
	$(RUN) -m pytest $(addprefix --ignore=,$(HUNTS))

check: format lint types coverage wheel docs demo ## what CI runs: all of this, and a fair share of the longer hunts
	$(MAKE) crash CYCLES=300 STATES=20000
	$(MAKE) workers CYCLES=5
	$(BIN)/python tests/sweeps.py crash errors exceptions asyncio closing sequences --trials 400 --stride 11
	$(BIN)/python tests/sweeps.py recovery --trials 40
	$(MAKE) forks FORKS=600
	$(MAKE) waiting HISTORIES=1000
	$(MAKE) planted

format: $(VENV)/ready
	$(BIN)/ruff format --check .

lint: $(VENV)/ready
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

coverage: $(VENV)/ready ## all tests, with the bars of branch coverage
	rm -f .coverage .coverage.*
	RIVETQ_EXAMPLES=200 $(MAKE) --no-print-directory test RUN='$(BIN)/coverage run'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --fail-under=95
	$(BIN)/coverage report --include='src/rivetq/storage/log.py,src/rivetq/storage/layout.py,src/rivetq/storage/space.py,src/rivetq/storage/recovery.py,src/rivetq/machine/machine.py,src/rivetq/machine/apply.py,src/rivetq/machine/apply_enqueued.py,src/rivetq/machine/sessions.py,src/rivetq/machine/advance.py,src/rivetq/machine/look.py,src/rivetq/machine/saving.py,src/rivetq/machine/check.py,src/rivetq/machine/cache.py' --fail-under=100

wheel: $(VENV)/ready ## the wheel builds and holds py.typed
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python -m zipfile --list dist/*.whl | grep -q 'rivetq/py.typed'

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs: $(VENV)/docs-ready ## the documentation as a site, in site/; a warning fails
	$(BIN)/mkdocs build --strict --quiet

$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

bench: $(VENV)/bench-ready ## speed beside the disk's own limit and the peers that are installed, in some 3 minutes
	$(BIN)/python benchmarks/bench.py

bench-full: $(VENV)/bench-ready ## the same with long rounds, 1 KiB payloads, up to 10 million waiting jobs; plots
	$(BIN)/python benchmarks/bench.py --full --json bench-full.json --plots docs/plots

bench-workers: $(VENV)/bench-ready ## workers on jobs that do nothing, beside huey, dramatiq, RQ, Celery and taskiq
	$(BIN)/python benchmarks/workers.py

holds: $(VENV)/ready ## how long each verb holds the engine's lock, at a million jobs and at 3,000 queues
	$(BIN)/python benchmarks/holds.py

queues: $(VENV)/ready ## what a new segment and a checkpoint cost with 5 queues and with 5,000
	$(BIN)/python benchmarks/queues.py

middle: $(VENV)/ready ## what cancel, redrive by id and a purge of few cost in the middle of a backlog, beside an enqueue
	$(BIN)/python benchmarks/middle.py

house: $(VENV)/ready ## the plan of the source: circles, imports upwards, the longest files and functions
	$(BIN)/python tests/house.py

CYCLES ?= 100
STATES ?= 20000
SEED ?= 0
crash: $(VENV)/ready ## kill -9 a writing process CYCLES times, then look at STATES states after simulated power cuts
	$(BIN)/python -m pytest tests/test_kill.py --cycles $(CYCLES) -s
	$(BIN)/python tests/simulation.py --states $(STATES) --seed $(SEED)

rot: $(VENV)/ready ## three mutations of every byte of log and index, and every cut of every file
	$(BIN)/python -m pytest tests/storage/test_recovery.py -k "damage or cut" --every-byte -s

SWEEPS ?=
sweeps: $(VENV)/ready ## what can go wrong at every place: SWEEPS="errors exceptions ..." for some of them, SEED
	$(BIN)/python tests/sweeps.py $(SWEEPS) --seed $(SEED)

FORKS ?= 6000
forks: $(VENV)/ready ## fork at every line of each call while others hold the locks, FORKS=6000 times
	$(BIN)/python tests/forks.py --forks $(FORKS) --seed $(SEED)

HISTORIES ?= 2000
waiting: $(VENV)/ready ## HISTORIES of lessees that wait: a job that can be leased goes to one of them
	$(BIN)/python tests/waiting.py --histories $(HISTORIES) --seed $(SEED)

JOBS ?= 1000000
leaks: $(VENV)/ready ## send JOBS through workers, polls, cancels, delays, listings and awaited leases: what the process holds stays flat
	$(BIN)/python tests/leaks.py --jobs $(JOBS)

PLANTED ?=
planted: $(VENV)/ready ## plant bugs, one at a time: the test that is named beside each must turn red (PLANTED="--third")
	$(BIN)/python tests/planted.py $(PLANTED)

workers: $(VENV)/ready ## tell a worker process under load to end, and kill one, CYCLES times each
	$(BIN)/python -m pytest tests/worker/test_worker_processes.py --cycles $(CYCLES) -s

clean:
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
