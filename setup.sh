#!/usr/bin/env bash
# Makes .venv: the pinned stack and this project. Does nothing when that is already so.
#   PYTHON=python3.12   the interpreter to use; default: the first of python3.11, 3.12, 3.13 that runs
#   CXX=clang++         the C++ compiler that torch.compile will use; default: g++
set -euo pipefail
cd "$(dirname "$0")"
PATH=${PATH//"$PWD/.venv/bin:"/} # an activated .venv must not be made from itself

ready=.venv/ready # written last, so that an interrupted set-up never has it
needed_gib=9      # .venv takes 6, the packages on their way into it 3
cached_gib=12     # and 3 more where pip keeps them for the next time
# 1: this checkout's folder, which .venv has absolute paths into; 2: what was installed.
stamp=$(pwd; cat pyproject.toml constraints.txt setup.sh | cksum)

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

# "3.12 ensurepip Python.h": the version and which of the two are there; nothing if "$1" does not run.
describe() {
    "$1" -c 'import importlib.util, os, sys, sysconfig
print("%d.%d" % sys.version_info[:2],
      "ensurepip" if importlib.util.find_spec("ensurepip") else "",
      "Python.h" if os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) else "")' 2>/dev/null
}

identity() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null; }

# Sets `python` and `facts`.
find_python() {
    local candidate seen= without_venv=
    local candidates=(python3.11 python3.12 python3.13 python3 python)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        facts=$(describe "$candidate") || continue # a pyenv shim exists and yet may not run
        case $facts in
            3.1[123]\ *ensurepip*) python=$candidate; return ;;
            3.1[123]\ *) without_venv=${without_venv:-python${facts%% *}} ;;
            *) seen+="${seen:+, }$candidate is ${facts%% *}" ;;
        esac
    done
    if [[ -n $without_venv ]]; then
        fail "$without_venv has no ensurepip. Install it: sudo apt install $without_venv-venv $without_venv-dev g++"
    fi
    fail "Python 3.11, 3.12 or 3.13 is needed (${seen:-${PYTHON:-python3} does not run})." \
        "Install one (sudo apt install python3 python3-venv, where that is recent enough) or name one: make PYTHON=/path/to/python3.12 ..."
}

check_compiler() {
    local compiler=${CXX:-g++}
    if ! "$compiler" -x c++ -fopenmp -fsyntax-only - <<<'#include <omp.h>' 2>/dev/null; then
        fail "No working C++ compiler with OpenMP ($compiler). Install one (sudo apt install g++) or name one: make CXX=clang++ ..."
    fi
}

check_disk() {
    local free_kib
    free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
    if ((free_kib < needed_gib << 20)); then
        fail "Needs $needed_gib GiB free in $PWD, there are $((free_kib >> 20)). Make room or move the checkout to another disk."
    fi
    if ((free_kib < cached_gib << 20)); then export PIP_NO_CACHE_DIR=1; fi
}

make_environment() {
    rm -rf .venv
    check_disk
    "$python" -m venv .venv || fail "$python could not make .venv, see above. Mend that, then run the same command again."
}

install() {
    # Here and not in /tmp, which is often a small disk in memory.
    export TMPDIR=$PWD/.venv/tmp
    mkdir -p "$TMPDIR"
    unset PYTHONHOME PYTHONPATH
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]' ||
        fail "The installation failed; pip says why above (no network? disk full?). Mend that, then run the same command again."
    .venv/bin/python -c 'import torchvision' ||
        fail "The installed packages cannot be imported, see above. Start afresh: make clean, then run the same command again."
    rm -rf "$TMPDIR"
}

exec {lock}<setup.sh
flock "$lock" # one set-up at a time; the others then find it done

if [[ -f $ready ]] && runs=$(identity .venv/bin/python) && [[ $(head -n 1 $ready) == "$PWD" ]] &&
    [[ -z ${PYTHON:-} || $(identity "$PYTHON") == "$runs" ]]; then
    if [[ $(<$ready) == "$stamp" ]]; then exit; fi
    echo "setup: requirements have changed, updating .venv"
    rm $ready
else
    find_python
    check_compiler
    echo "setup: making .venv with Python ${facts%% *}: 3 GB to download, 6 GB on disk"
    make_environment
fi
install
if [[ ${facts:-Python.h} != *Python.h* ]]; then
    echo "setup: note: without Python.h torch.compile cannot work: sudo apt install python${facts%% *}-dev" >&2
fi
printf '%s\n' "$stamp" >$ready
