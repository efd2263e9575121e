#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
# llama-cpp-py-sync 0.11739: the wheel says manylinux2014 (glibc 2.17 and newer), but the llama.cpp library in it asks for symbols of
# glibc 2.38, so pip installs it on Debian 12, Ubuntu 22.04 and JetPack 6 (2.35, 2.36), where the library cannot be loaded.
python3 -m pip -q download --no-deps --only-binary=:all: --platform manylinux2014_x86_64 --python-version 3.11 --dest "$T" llama-cpp-py-sync==0.11739
python3 - "$T" <<'PY'
import glob
import re
import sys
import zipfile

path = glob.glob(f"{sys.argv[1]}/*.whl")[0]
wheel, needed = zipfile.ZipFile(path), set()
for name in wheel.namelist():
    if ".so" in name:
        needed |= {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+\.\d+)\b", wheel.read(name))}
newest = ".".join(map(str, max(needed)))
print(f"tag: {path.split('-')[-1].removesuffix('.whl')}; newest symbols that its libraries ask for: GLIBC_{newest}")
assert "manylinux2014" in path and max(needed) >= (2, 38)
PY
