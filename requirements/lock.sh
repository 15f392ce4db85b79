#!/usr/bin/env bash
# Compiles pyproject.toml's ranges into exact pins; `make lock` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .tools/bin/uv)
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} DS_BUILD_OPS=0
options=(--quiet --no-header --python-version 3.11)
"$uv" pip compile "${options[@]}" --universal --extra sky --extra dev pyproject.toml -o requirements/launcher.txt
# torch has a file of its own: see requirements/torch.txt.
"$uv" pip compile "${options[@]}" --no-emit-package torch --extra train --extra dev pyproject.toml -o requirements/trainer.txt
# The image has some of the trainer's packages, at the trainer's versions.
"$uv" pip compile "${options[@]}" --no-emit-package torch -c requirements/trainer.txt -c requirements/torch.txt requirements/image.in -o requirements/image.txt
# The peers of the benchmarks, with everything of ours at the launcher's versions.
"$uv" pip compile "${options[@]}" -c requirements/launcher.txt pyproject.toml requirements/bench.in -o requirements/bench.txt
