# `make demo` and `make test` do all of the set-up on a fresh machine; they need Python 3.11 and a network.
SHELL := /bin/bash
LAUNCHER := .venv/bin/python
TRAINER := .venv-trainer/bin/python
DEMO := runs
# Units whose packages are the same in both environments, or that only the launcher's has.
SAME_IN_BOTH := not bucket and not sync and not uploader and not checkpoints and not local and not parts and not plan \
  and not prices and not offers and not predictions and not spot and not estimate and not image and not submit \
  and not orders and not cloud and not task and not architecture and not doctor and not resume and not completion \
  and not test_watch and not test_runs_listing and not test_page and not test_accounts

.PHONY: setup demo check test test-slurm test-image lock fields bench soak clean

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

test: setup  ## every test that this machine can run; what it lacks is skipped with the reason
	$(LAUNCHER) -m pytest tests/unit tests/faults -n 2
	$(TRAINER) -m pytest tests/unit -n 2 -k "$(SAME_IN_BOTH)"
	$(TRAINER) -m pytest tests/training -n 2
	$(LAUNCHER) -m pytest tests/e2e -n 2

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
