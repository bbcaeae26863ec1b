#!/bin/sh
# Writes the CycloneDX bill of materials of the packages that the interpreter $1 sees into the file $2.
set -eu
tool=$(mktemp -d)
PIP_CONSTRAINT="" python3 -m pip --quiet --disable-pip-version-check install --no-cache-dir --root-user-action ignore \
    --require-hashes --target "$tool" -r /requirements/sbom.txt
# On the path of this process alone: what it starts to look around must not see the tool's own packages.
python3 - "$tool" environment --output-reproducible --spec-version 1.6 --output-format JSON --validate \
    --output-file "$2" "$(command -v "$1")" <<'PYTHON'
import runpy
import sys

sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("cyclonedx_py", run_name="__main__", alter_sys=True)
PYTHON
rm -rf "$tool"
