# `make demo` and `make test` do all of the set-up on a fresh machine; they need Python 3.11 and a network.
SHELL := /bin/bash
LAUNCHER := .venv/bin/python
TRAINER := .venv-trainer/bin/python
DEMO := runs
# Unit tests that also run in the trainer's environment: they parse options with click or meet the training packages.
# Of what the other unit tests import, both environments pin the same versions (tests/unit/test_install.py).
NODE_UNITS := $(addprefix tests/unit/test_, $(addsuffix .py, engine files fit_engines job limits method overrides \
  parent_death price recipe recipes run_command staging synthetic team workers))
SAMPLE := -m "not thorough"
LABS := .labs.log

.PHONY: setup demo check test tests test-all test-quick test-slurm test-image lock fields bench soak clean

setup: .venv/.ready .venv-trainer/.ready  ## two environments: launcher with SkyPilot, trainer with torch

.venv/.ready: requirements/launcher.txt pyproject.toml requirements/install.sh
	requirements/install.sh .venv launcher

.venv-trainer/.ready: requirements/trainer.txt requirements/torch.txt pyproject.toml requirements/install.sh
	requirements/install.sh .venv-trainer trainer

demo: setup  ## SFT, then DPO, of a tiny model here; each is killed once on the way and goes on exactly
	rm -rf $(DEMO)/demo-sft $(DEMO)/demo-dpo
	$(LAUNCHER) -m launcher submit zephyr-tiny/sft --name demo-sft --infra local --checkpoints $(DEMO) --preempt 1
	$(LAUNCHER) -m launcher submit zephyr-tiny/dpo --name demo-dpo --infra local --checkpoints $(DEMO) --preempt 1 \
	  model_name_or_path=$(DEMO)/demo-sft/final

check: setup  ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: setup  ## every kind of test that this machine can run; what it lacks is skipped with the reason
	@$(MAKE) --no-print-directory tests SAMPLE='$(SAMPLE)'

test-all: setup  ## the same with every combination of engines, methods and tasks
	@$(MAKE) --no-print-directory tests SAMPLE=

tests:  # The labs of tests/e2e mostly wait, so they begin first and run beside the others.
	@echo "tests/e2e runs in the background; its output follows the other tests'"
	@$(LAUNCHER) -m pytest tests/e2e -n 2 --no-loadscope-reorder $(SAMPLE) > $(LABS) 2>&1 & labs=$$!; failed=0; \
	$(TRAINER) -m tests.training.compile > /dev/null 2>&1 & compiled=$$!; \
	$(LAUNCHER) -m pytest tests/unit tests/faults -n 2 $(SAMPLE) || failed=1; \
	$(TRAINER) -m pytest $(NODE_UNITS) -n 2 $(SAMPLE) || failed=1; \
	wait $$compiled; $(TRAINER) -m pytest tests/training -n 2 $(SAMPLE) || failed=1; \
	wait $$labs || failed=1; cat $(LABS); exit $$failed

test-quick: setup  ## unit tests, and one run from end to end that loses its machine; under 3 minutes
	$(LAUNCHER) -m pytest tests/unit tests/e2e/test_demo.py::test_sft_survives_a_lost_machine -n 2 $(SAMPLE)

test-slurm: setup  ## of these, those with a real SkyPilot over a real Slurm, whose jobs lose their machines
	$(LAUNCHER) -m pytest tests/e2e/test_doctor.py tests/e2e/test_slurm.py tests/e2e/test_plans.py tests/e2e/test_tasks.py

test-image: setup  ## of these, those that build the image with podman, push it to a registry here and train in it
	$(LAUNCHER) -m pytest tests/e2e/test_image.py

lock: setup  ## compile the exact pins again
	requirements/lock.sh

fields: setup  ## the field list of the pinned TRL
	$(TRAINER) -m trainer.recipe.generate_fields

soak: setup  ## 1,000 kills at random moments, some 25 minutes; KILLS=, SEED=, SOAK='--store s3' or --real
	$(LAUNCHER) -m tests.soak --kills $(or $(KILLS),1000) --seed $(or $(SEED),0) $(SOAK)

bench: setup .venv-bench/.ready  ## beside the peers: start-up, transfers, stall; some GiB of /dev/shm
	$(LAUNCHER) bench/startup.py
	.venv-bench/bin/python bench/checkpoint.py
	$(TRAINER) bench/stall.py --rclone .venv-bench/bin/rclone

.venv-bench/.ready: requirements/bench.txt requirements/install.sh
	requirements/install.sh .venv-bench bench

clean:
	rm -rf .venv .venv-trainer .venv-bench .tools runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
