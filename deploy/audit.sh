#!/bin/bash
# Audits the locked packages: writes their bill of materials (CycloneDX) to build/sbom.json, and looks each version up in
# the OSV database of known vulnerabilities. Exit code 1 if there are any, 3 without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/audit

unavailable() {
    echo "error: $1; $2" >&2
    exit 3
}

if [ ! -e "$tools/installed" ]; then
    # Not in .venv: their dependencies are not those of the service.
    "${PYTHON:-python3}" -m venv --clear "$tools"
    "$tools/bin/python" -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1 > "$tools/log" 2>&1 \
        || unavailable "make audit: its tools cannot be installed (see $tools/log)" "check the network and pip's index"
    touch "$tools/installed"
fi
"$tools/bin/cyclonedx-py" requirements requirements.lock --output-reproducible --of JSON --output-file build/sbom.json
echo "bill of materials: build/sbom.json"
status=0
"$tools/bin/pip-audit" --requirement requirements.lock --require-hashes --disable-pip --vulnerability-service osv \
    --progress-spinner off > "$tools/log" 2>&1 || status=$?
if grep --quiet "ConnectionError\|Timeout" "$tools/log"; then
    unavailable "make audit: the database of vulnerabilities cannot be reached" "run it where api.osv.dev can be"
fi
cat "$tools/log"
exit "$status"
