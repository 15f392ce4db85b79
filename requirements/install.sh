#!/usr/bin/env bash
# Makes one of the environments: install.sh FOLDER launcher|trainer|bench
#
# uv makes them in seconds; it is installed into .tools when the machine has none. uv does not read
# pip's configuration, so a folder of wheels that pip knows (a mirror, an offline machine) is handed on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 which=$2
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

uv=$(command -v uv || command -v ~/.local/bin/uv || true) # the latter: where SkyPilot puts it on every node
if [ -z "$uv" ]; then
  [ -x .tools/bin/uv ] || { "$python" -m venv .tools && .tools/bin/python -m pip install --quiet uv; }
  uv=.tools/bin/uv
fi
if [ -z "${UV_FIND_LINKS:-}" ]; then
  wheels=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
  [ -z "$wheels" ] || export UV_FIND_LINKS=$wheels
fi
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1} DS_BUILD_OPS=0  # DeepSpeed compiles its kernels when they are first used

packages=(-r "requirements/$which.txt")
if [ "$which" = trainer ]; then
  packages+=(-r requirements/torch.txt)
  # Without a GPU torch's CUDA libraries are several GB for nothing.
  if ! command -v nvidia-smi >/dev/null && ! compgen -G "${UV_FIND_LINKS:-/nowhere}/torch-*.whl" >/dev/null; then
    packages+=(--torch-backend cpu)
  fi
fi
echo "$folder: installing $which's packages"
"$uv" venv --quiet --allow-existing --python 3.11 "$folder"
"$uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" "${packages[@]}"
"$uv" pip install --quiet --python "$folder/bin/python" --no-deps --editable .
touch "$folder/.ready"
