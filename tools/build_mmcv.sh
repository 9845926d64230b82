#!/usr/bin/env bash
# Installs onedl-mmcv with its compiled operators (CPU), which detection needs, into the environment of a Python.
#
#     tools/build_mmcv.sh .venv-mm/bin/python
#
# PyPI has only the source. It is compiled once (about ten minutes on two cores) and the wheel is kept under
# ${XDG_CACHE_HOME:-~/.cache}/cleandift_backbones/mmcv, by versions of mmcv, torch and Python, and by machine.
# torch must be in the environment. FORCE_CUDA=1 compiles for GPUs too, with the nvcc of torch's CUDA version (this has
# not been tried here, and takes far longer). MAX_JOBS: compilers at a time (default: cores), about 1.5 GB of memory each.
set -euo pipefail

VERSION=2.3.6

fail() {
    echo "build_mmcv.sh: error: $*" >&2
    exit 1
}

case "${1:-}" in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
    "") fail "name the Python to install for: tools/build_mmcv.sh .venv-mm/bin/python" ;;
esac
case "$1" in
    /*) python=$1 ;;
    */*) python=$PWD/$1 ;;
    *) python=$(command -v "$1") || fail "there is no Python named $1" ;;
esac
[ -x "$python" ] || fail "$python is not there"
key=$("$python" -c "import platform, sys, torch
print(f'mmcv$VERSION-torch{torch.__version__}-cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}')" \
    2>/dev/null) || fail "$python has no torch: install it first, $python -m pip install torch torchvision"
[ "${FORCE_CUDA:-0}" = 1 ] && key=$key-cuda || CUDA_VISIBLE_DEVICES=""
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cleandift_backbones/mmcv/$key

# Packages that onedl-mmcv's setup.py imports; setuptools 82 dropped pkg_resources.
"$python" -m pip install --quiet "setuptools<82" wheel ninja psutil

if ! ls "$cache"/onedl_mmcv-*.whl >/dev/null 2>&1; then
    command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install g++ (Debian: apt-get install g++)"
    headers=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
    [ -f "$headers/Python.h" ] || fail "$headers/Python.h is missing: install Python's headers (Debian: python3-dev)"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # A compiler in front of the compiler: torch's headers need C++20 where setup.py says 17; and torch/extension.h,
    # which is most of the work of every file, is compiled once. Its flags must be those of the files: hence in here.
    cat >"$work/c++" <<'WRAPPER'
#!/usr/bin/env bash
set -euo pipefail
flags=() plain=() compile="" skip=""
for word in "$@"; do
    case "$word" in
        -std=c++17) word=-std=c++20 ;;
        -O2 | -O3) word=-O1 ;;
        -g) continue ;;
        -c) compile=yes ;;
    esac
    flags+=("$word")
    case "$word" in
        -o | -MF) skip=yes ;;
        -c | -MMD | *.cpp) ;;
        *) if [ -z "$skip" ]; then plain+=("$word"); fi; skip="" ;;
    esac
done
if [ -n "$compile" ]; then
    {
        flock 9
        [ -f "$PCH.gch" ] || "$REAL_CXX" "${plain[@]}" -x c++-header "$PCH" -o "$PCH.gch"
    } 9>"$PCH.lock"
    exec "$REAL_CXX" -include "$PCH" "${flags[@]}"
fi
exec "$REAL_CXX" "${flags[@]}"
WRAPPER
    chmod +x "$work/c++"
    echo '#include <torch/extension.h>' >"$work/all.h"
    echo "compiling onedl-mmcv $VERSION, about ten minutes on two cores; the wheel will be kept in $cache"
    # Without these three options pip makes, and then reuses, a wheel with no operators.
    export CUDA_VISIBLE_DEVICES
    if ! MMCV_WITH_OPS=1 REAL_CXX=${CXX:-g++} PCH=$work/all.h CXX=$work/c++ CC=${CC:-gcc} \
        MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} "$python" -m pip wheel --no-cache-dir --no-deps --no-build-isolation \
        --no-binary :all: --wheel-dir "$work" "onedl-mmcv==$VERSION" >"$work/log" 2>&1; then
        { grep -v "://" "$work/log" || true; } | tail -n 40 >&2
        fail "onedl-mmcv could not be compiled; its last lines stand above"
    fi
    mkdir -p "$cache"
    wheel=$(basename "$work"/onedl_mmcv-*.whl)
    mv "$work/$wheel" "$cache/.$wheel.$$" # from another disk, perhaps: whole or not at all
    mv "$cache/.$wheel.$$" "$cache/$wheel"
fi
# pip keeps an installed package of an equal version, with operators or not.
"$python" -c "import mmcv.ops" >/dev/null 2>&1 || "$python" -m pip uninstall --quiet --yes onedl-mmcv
"$python" -m pip install --quiet "$cache"/onedl_mmcv-*.whl
"$python" -c "import mmcv.ops" || fail "the wheel in $cache has no operators: delete it and run again"
