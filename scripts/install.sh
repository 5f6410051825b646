#!/usr/bin/env bash
# Install the project into an environment, editable: install.sh VENV [EXTRA ...]
# A torch >= 2.11 that the environment already has is kept as it is.
set -euo pipefail
venv=$1
shift
extras=$(IFS=,; echo "$*")
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "install: $("$python" --version) is too old; Shoestring needs Python 3.11 or newer (set PYTHON=...)" >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
fi
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
present=$("$venv/bin/python" - <<'PY'
from importlib import metadata
try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    version = ""
numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
print(version if numbers >= [2, 11] else "")
PY
)
if [ -n "$present" ]; then
  grep -v '^torch==' constraints.txt > "$constraints"
  echo "torch==$present" >> "$constraints"
else
  cp constraints.txt "$constraints"
  echo "Installing PyTorch and its companions into $venv (once; about 300 MB, or several GB where your package index serves CUDA builds of PyTorch) ..."
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" \
  -e ".${extras:+[$extras]}" 2> >(grep -v 'is ignored: it is' >&2)
