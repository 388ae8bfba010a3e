#!/usr/bin/env bash
# Install the package into a base image that brings its own torch, and leave what the base brings as it is. The Dockerfile runs this.
#
#   launch/container_install.sh [folder or wheel of the package] [extras]
#
# Every package that is installed already is pinned to its version; for the others constraints.txt holds, where the two can agree. Afterwards the
# versions of torch, Transformer Engine and all other packages of the base are compared: one that changed fails the build.
set -euo pipefail
package=${1:-.}
extras=${2:-}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

versions() {
  "$python" - <<'PY'
import importlib.metadata
import re

# In the order of sys.path: of a package that is there twice the first is imported (Debian's lies behind /usr/local's).
found: dict[str, str] = {}
for one in importlib.metadata.distributions():
    if name := one.metadata and one.metadata["Name"]:  # a folder that a removal left behind has none
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one.version)
print("\n".join(f"{name}=={version}" for name, version in sorted(found.items()) if name not in ("pip", "setuptools", "wheel", "megatron-lite")))
PY
}

versions >"$work/before"
grep -q '^torch==' "$work/before" || {
  echo "error: the base has no torch; this script is for images that bring one (elsewhere: pip install -c constraints.txt)" >&2
  exit 1
}
grep -E '^(torch|transformer-engine)' "$work/before"
# Ours, less what the base brings and what belongs to a torch of ours.
"$python" - "$work/before" "$(dirname "${BASH_SOURCE[0]}")/../constraints.txt" >"$work/ours" <<'PY'
import re
import sys

norm = lambda line: re.sub(r"[-_.]+", "-", re.split(r"[=<>!~ ;\[]", line.strip(), maxsplit=1)[0]).lower()
base = {norm(line) for line in open(sys.argv[1])}
foreign = re.compile(r"^(torch|triton|nvidia-|cuda-)")
for line in open(sys.argv[2]):
    name = norm(line)
    if line.strip() and not line.startswith("#") and name not in base and not foreign.match(name):
        print(line.strip())
PY
cat "$work/before" "$work/ours" >"$work/constraints"
# Ubuntu's Python refuses pip outside of an environment (EXTERNALLY-MANAGED); an image is nobody else's.
export PIP_BREAK_SYSTEM_PACKAGES=1
# The base's own constraint file (NGC: PIP_CONSTRAINT) says the same about its packages, and more: both hold.
PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$work/constraints" \
  "$python" -m pip install --no-cache-dir --disable-pip-version-check "$package$extras"
versions >"$work/after"
if changed=$(comm -23 "$work/before" "$work/after") && [[ -n $changed ]]; then
  echo "error: these packages of the base image were changed or removed by the installation:" >&2
  echo "$changed" >&2
  exit 1
fi
echo "the base's $(wc -l <"$work/before") packages are unchanged; $(comm -13 "$work/before" "$work/after" | wc -l) came new"
