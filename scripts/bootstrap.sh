#!/usr/bin/env bash
# Prepares .venv from nothing but Python >= 3.11: installs the system packages that are missing, then the Python packages.
# Called by make, which also decides whether it is needed at all.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

stop() {
    echo "metadiff: $*" >&2
    exit 2
}

# `python3` first: it is the one that the system's packages belong to. Started, not only found: version managers leave dead stubs on PATH.
find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$name" && return
    done
    stop "no Python >= 3.11 on PATH ($(python3 --version 2>/dev/null || echo "no python3 at all")); install python3.11 or newer and try again"
}

# Of Python's own packages only the content is probed: a Python that did not come from Debian brings its own.
missing_packages() {
    for package in "${system_packages[@]}"; do
        case $package in
            python*-venv) "$python" -c "import ensurepip, venv" 2>/dev/null || echo "$package" ;;
            python*-dev) "$python" -c "import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))" ||
                echo "$package" ;;
            *) [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package" ;;
        esac
    done
}

install_packages() {
    local as_root=()
    if ((EUID != 0)); then
        as_root=(sudo -n)
    fi
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        stop "system packages are missing; as root run: apt-get update && apt-get install -y --no-install-recommends $*"
    fi
    # One package source that does not answer is no reason to stop: the installation itself says what cannot be had.
    "${as_root[@]}" apt-get update || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" || stop "apt-get could not install $*"
}

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# FFCV is compiled, against OpenCV and TurboJPEG.
system_packages=("python$version-venv" "python$version-dev" g++ pkg-config libturbojpeg0-dev libopencv-dev)

missing=$(missing_packages)
[[ -z $missing ]] || install_packages $missing

# An environment that never got its stamp was cut short: start it afresh.
[[ -e .venv/.installed ]] || "$python" -m venv --clear .venv
rm -f .venv/.installed
.venv/bin/python -m pip install --no-user --constraint constraints.txt --editable ".[ray,ffcv,s3,gcs,dev]"
touch .venv/.installed
