#!/usr/bin/env bash
# What demo.sh and test.sh share: from a bare machine to a ready .venv. Run by itself it makes .venv and stops:
#
#   ./launch/setup.sh [--gpu] [EXTRA ...]     ray, hf, web, test: pyproject.toml's; --gpu: torch with CUDA, for the
#                                             machines that share .venv, even if this one (a login node) has no GPU
#
#   a Python 3.11-3.13 -> memory, disk -> .venv -> torch, pinned -> the rest, pinned -> a try of it -> stamp
#                                                   |
#         no NVIDIA driver: your own pip sources if they hold a CPU build, else PyTorch's CPU index,
#         else (and with a driver) whatever your ordinary index gives, its cost said first
#
# The stamp is a hash of what was asked for, and the extras; while it holds, all of this is skipped in a blink. An
# environment that never had one is thrown away by the next set-up; one that was ready once is never: what is missing
# is added. torch with CUDA serves machines without a GPU too. Two scripts started together wait for each other.
#
#   BAJIE_VENV=DIR      where the environment lies (default: .venv in the project)
#   BAJIE_PYTHON=PATH   the Python to use
#   BAJIE_SKIP_CHECKS=1 do not look at memory and disk
set -euo pipefail

bajie_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bajie_cpu_index=https://download.pytorch.org/whl/cpu
bajie_memory_mb=4000     # the demo's two ranks, a tokenizer in training, and pip
bajie_disk_mb=6000       # 2 GB environment, downloads on their way, a demo's artifacts
bajie_cuda_disk_mb=14000 # torch with CUDA: 3 GB down, 7 GB on disk, beside the rest
bajie_ready_disk_mb=1000 # the environment stands: a demo's artifacts only
bajie_args=()
bajie_job=
bajie_torch=cpu # what torch must be able to do; cuda also serves the CPU

bajie_say() { printf 'bajie: %s\n' "$*" >&2; }

bajie_stop() { # ENGLISH CHINESE [STATUS]
    printf 'bajie: %s (%s)\n' "$1" "$2" >&2
    exit "${3:-1}"
}

# ---- the machine ------------------------------------------------------------------------------------------------

bajie_try_python() { # PATH: answers "ok VERSION", "old VERSION" or "novenv VERSION"; nothing if it does not run
    "$1" -I -c '
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("old " + version)
else:
    try:
        import ensurepip, ssl, venv
        print("ok " + version)
    except ImportError:
        print("novenv " + version)
' 2>/dev/null || true
}

bajie_find_python() { # prints the first Python that really runs, is 3.11 to 3.13 and can make a venv
    local name path answer met="" paths
    if [[ -n ${BAJIE_PYTHON:-} ]]; then
        answer=$(bajie_try_python "$BAJIE_PYTHON")
        [[ $answer == ok* ]] || bajie_stop "BAJIE_PYTHON=$BAJIE_PYTHON is not a usable Python 3.11 to 3.13 (it answers: ${answer:-nothing})" \
            "BAJIE_PYTHON 不可用，需要 Python 3.11 到 3.13"
        command -v -- "$BAJIE_PYTHON"
        return
    fi
    # A name may stand several times on the PATH, and a version manager's shim may stand first and not run.
    for name in python3 python3.13 python3.12 python3.11 python; do
        mapfile -t paths < <(type -aP "$name" || true)
        for path in ${paths[@]+"${paths[@]}"}; do
            answer=$(bajie_try_python "$path")
            case $answer in
            ok*)
                printf '%s\n' "$path"
                return
                ;;
            ?*) met+="${met:+, }$path is $answer" ;;
            esac
        done
    done
    if [[ $met == *novenv* ]]; then
        bajie_stop "a Python 3.11 to 3.13 is here, but without its venv module (${met//novenv /}): install python3-venv, or set BAJIE_PYTHON" \
            "缺少 venv 模块：请安装 python3-venv，或设置 BAJIE_PYTHON"
    fi
    bajie_stop "no Python 3.11 to 3.13 on the PATH (${met:-none runs}${met:+; needed 3.11, 3.12 or 3.13}): install one, or set BAJIE_PYTHON" \
        "找不到 Python 3.11 到 3.13：请安装，或设置 BAJIE_PYTHON"
}

bajie_free_memory_mb() { # what is available, by the kernel and by the container's limit
    local free limit used cache
    free=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
    if [[ -r /sys/fs/cgroup/memory.max ]]; then
        limit=$(</sys/fs/cgroup/memory.max)
        used=$(</sys/fs/cgroup/memory.current)
        cache=$(awk '$1 == "inactive_file" {print $2}' /sys/fs/cgroup/memory.stat)
    elif [[ -r /sys/fs/cgroup/memory/memory.limit_in_bytes ]]; then
        limit=$(</sys/fs/cgroup/memory/memory.limit_in_bytes)
        used=$(</sys/fs/cgroup/memory/memory.usage_in_bytes)
        cache=$(awk '$1 == "total_inactive_file" {print $2}' /sys/fs/cgroup/memory/memory.stat)
    fi
    if [[ ${limit:-max} =~ ^[0-9]+$ && ${#limit} -lt 16 ]]; then
        used=$(((limit - used + ${cache:-0}) / 1048576))
        ((used < free)) && free=$used
    fi
    printf '%s\n' "$free"
}

bajie_free_disk_mb() { # FOLDER (or the nearest one above it that exists)
    local folder=$1 blocks size
    while [[ ! -d $folder ]]; do folder=$(dirname -- "$folder"); done
    read -r blocks size < <(stat -f -c '%a %S' -- "$folder")
    printf '%s\n' $((blocks * (size / 512) / 2048))
}

bajie_gb() { awk -v mb="$1" 'BEGIN {printf "%.1f", mb / 1000}'; }

bajie_check_disk() { # FOLDER MB
    local free
    [[ -n ${BAJIE_SKIP_CHECKS:-} ]] && return
    free=$(bajie_free_disk_mb "$1")
    ((free >= $2)) || bajie_stop "$(bajie_gb "$free") GB of disk are free at $1, $(bajie_gb "$2") GB are needed: make room, or set BAJIE_VENV to a larger disk" \
        "磁盘空间不足：需要 $(bajie_gb "$2") GB，现有 $(bajie_gb "$free") GB"
}

bajie_check_memory() {
    local free
    [[ -n ${BAJIE_SKIP_CHECKS:-} ]] && return
    free=$(bajie_free_memory_mb)
    ((free >= bajie_memory_mb)) || bajie_stop "$(bajie_gb "$free") GB of memory are available, $(bajie_gb "$bajie_memory_mb") GB are needed: close something, or set BAJIE_SKIP_CHECKS=1 to try all the same" \
        "内存不足：需要 $(bajie_gb "$bajie_memory_mb") GB，现有 $(bajie_gb "$free") GB"
}

bajie_has_nvidia() { [[ -e /proc/driver/nvidia/version ]] || timeout 20 nvidia-smi -L >/dev/null 2>&1; }

# ---- the surroundings ---------------------------------------------------------------------------------------------

bajie_surroundings() { # what every process of ours inherits; needs bajie_venv
    local caches=$bajie_venv/caches
    unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
    export PYTHONNOUSERSITE=1 PYTHONUTF8=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    if [[ -z ${HOME:-} || ! -d $HOME || ! -w $HOME ]]; then
        # Libraries write caches at home; without one they get a room inside the environment.
        export HOME=$caches/home PIP_NO_CACHE_DIR=1
        export XDG_CACHE_HOME=$caches
        export HF_HOME=${HF_HOME:-$caches/huggingface} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
        export MPLCONFIGDIR=${MPLCONFIGDIR:-$caches/matplotlib} NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$caches/numba}
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$caches/torch_extensions}
        mkdir -p -- "$HOME"
    fi
    if [[ -n ${BAJIE_GPU:-} ]]; then
        unset DS_ACCELERATOR
    else
        export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    fi
}

# ---- the installation ---------------------------------------------------------------------------------------------

bajie_broken_off() { # a signal came: pip goes too, and the missing stamp tells the next set-up
    trap '' INT TERM HUP
    if [[ -n $bajie_job ]]; then
        kill -- "-$bajie_job" 2>/dev/null || true
        wait "$bajie_job" 2>/dev/null || true
    fi
    bajie_say "set-up broken off; the next one takes it up again (安装中断，下次会继续)"
    exit 130
}

bajie_quietly() { # TEXT COMMAND...: the output goes to the log; a line counts the seconds; the command's own status
    local text=$1 start=$SECONDS status=0
    shift
    printf '\n### %s\n+ %s\n' "$text" "$*" >>"$bajie_log"
    set -m # a process group of its own, so that a signal to us can end all of it
    "$@" >>"$bajie_log" 2>&1 </dev/null &
    bajie_job=$!
    set +m
    if [[ -t 2 ]]; then
        while kill -0 "$bajie_job" 2>/dev/null; do
            printf '\rbajie: %s ... %d s' "$text" $((SECONDS - start)) >&2
            sleep 0.5
        done
        printf '\r\033[K' >&2
    fi
    wait "$bajie_job" || status=$?
    bajie_job=
    ((status == 0)) && bajie_say "$text: $((SECONDS - start)) s"
    return $status
}

bajie_pip() { "$bajie_venv/bin/python" -m pip "$@"; }

bajie_pip_install() { bajie_pip install --no-compile "$@"; } # that is done on all cores: bajie_install

bajie_failed() { # WHAT CHINESE: one sentence, with the first complaint of the step that failed
    local complaint
    complaint=$(awk '/^### / {said = ""} !said && /^ *(ERROR|error|OSError|[A-Za-z.]*Error:)/ {said = $0} END {print substr(said, 1, 300)}' "$bajie_log")
    bajie_stop "$1${complaint:+: $complaint}; the whole story: $bajie_log" "$2，详见日志"
}

bajie_pip_says() { # PATTERN: do pip's settings (its files and PIP_*) match? Read whole: a pipe cut short would fail
    grep -qiE "$1" <<<"$(bajie_pip config list 2>/dev/null || true)"
}

bajie_own_sources() { bajie_pip_says '(index-url|find-links|no-index)='; } # has the user told pip where to look?

bajie_no_index() { bajie_pip_says "no-index='?(1|true|yes|on)"; }

bajie_torch_version() { sed -n 's/^torch==//p' "$bajie_root/constraints.txt"; }

bajie_has_torch() { # VERSION KIND (cpu|cuda): is this torch here, and of a build that can do this?
    "$bajie_venv/bin/python" -c '
import importlib.metadata, sys
try:
    version, _, local = importlib.metadata.version("torch").partition("+")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(version != sys.argv[1] or (sys.argv[2] == "cuda" and local == "cpu"))
' "$1" "$2"
}

bajie_install_torch() { # KIND (cpu|cuda)
    local version listed
    version=$(bajie_torch_version)
    bajie_has_torch "$version" "$1" && return
    if [[ $1 == cpu ]]; then
        if bajie_own_sources && bajie_quietly "torch $version, CPU build, from your own pip sources" \
            bajie_pip_install --no-deps --retries 2 "torch==$version+cpu"; then
            return
        fi
        if ! bajie_no_index; then
            # Bounded: a network that swallows packets costs 45 s once, a refusal nothing.
            listed=$(timeout 45 "$bajie_venv/bin/python" -m pip index versions torch --index-url "$bajie_cpu_index" \
                --timeout 8 --retries 1 2>>"$bajie_log" || true)
            if [[ $listed == *"$version+cpu"* ]] &&
                bajie_quietly "torch $version, PyTorch's CPU build (0.2 GB down)" \
                    bajie_pip_install --no-deps --index-url "$bajie_cpu_index" --timeout 30 --retries 3 "torch==$version+cpu"; then
                return
            fi
            bajie_say "PyTorch's CPU index does not answer; torch comes from your ordinary index, about 3 GB down and 7 GB on disk (CPU 版索引不可用，改用普通索引，约 3 GB 下载)"
            bajie_check_disk "$bajie_venv" "$bajie_cuda_disk_mb"
        fi
        bajie_quietly "torch $version" bajie_pip_install --no-deps "torch==$version" || bajie_failed "torch $version did not install" "torch 安装失败"
    else
        bajie_check_disk "$bajie_venv" "$bajie_cuda_disk_mb"
        bajie_quietly "torch $version with CUDA (about 3 GB down, 7 GB on disk)" \
            bajie_pip_install --no-deps --force-reinstall "torch==$version" ||
            bajie_failed "torch $version with CUDA did not install (if this node has no network: ./launch/setup.sh --gpu on one that has)" "CUDA 版 torch 安装失败"
    fi
}

bajie_extras() { sed -n '/^\[project.optional-dependencies\]/,/^\[/s/^\([a-z0-9_-]*\) *=.*/\1/p' "$bajie_root/pyproject.toml"; }

bajie_known() { [[ $'\n'$(bajie_extras)$'\n' == *$'\n'"$1"$'\n'* ]]; } # EXTRA: is there one of this name?

bajie_write_requirements() { # EXTRAS...: pyproject.toml's ranges as a list for pip
    "$bajie_venv/bin/python" - "$bajie_root/pyproject.toml" "$@" >"$bajie_venv/requirements.txt" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[2:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
PYTHON
}

bajie_install() { # KIND EXTRAS...
    local kind=$1 constraints=$bajie_root/constraints.txt site
    shift
    mkdir -p -- "$bajie_venv/tmp"
    export TMPDIR=$bajie_venv/tmp # the disk that was looked at; /tmp may be small
    bajie_quietly "setuptools" bajie_pip_install -c "$constraints" setuptools || bajie_failed "pip could not install setuptools" "pip 无法安装 setuptools"
    bajie_install_torch "$kind"
    # deepspeed and jieba are built from source, pure Python both: with our setuptools and torch instead of pip's
    # isolated ones (which would bring a second torch), and with no op compiled.
    export DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1
    bajie_quietly "what the build of deepspeed asks for" \
        bajie_pip_install -c "$constraints" torch numpy packaging psutil py-cpuinfo ninja tqdm hjson pydantic ||
        bajie_failed "torch's own needs did not install" "依赖安装失败"
    bajie_write_requirements "$@"
    bajie_quietly "deepspeed, megatron-core, datasets, datatrove ... ($(wc -l <"$bajie_venv/requirements.txt") packages and what they need)" \
        bajie_pip_install -c "$constraints" --no-build-isolation --use-pep517 -r "$bajie_venv/requirements.txt" ||
        bajie_failed "the packages did not install" "依赖安装失败"
    unset DS_BUILD_OPS DS_IGNORE_CUDA_DETECTION TMPDIR
    rm -rf -- "$bajie_venv/tmp"
    site=$("$bajie_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$bajie_root" >"$site/bajie.pth" # `python -m launch` from any folder
    # Not by pip, on one core; not at the first import: whoever may not write here would compile at every start.
    bajie_quietly "compiling for Python" "$bajie_venv/bin/python" -m compileall -q -j 0 "$site" || true # templates fail
    bajie_quietly "a try" "$bajie_venv/bin/python" -c 'import torch, deepspeed, sentencepiece, yaml' ||
        bajie_failed "the installed packages do not import" "安装后无法导入"
}

bajie_hash() { # of all that decides what is installed, but for the extras and the build of torch
    { cat "$bajie_root/pyproject.toml" "$bajie_root/constraints.txt" && printf '%s' "$bajie_root"; } | sha256sum | cut -c 1-32
}

bajie_is_ready() { # HASH KIND EXTRAS...: the stamp is of this hash and names these extras; the Python runs, torch is of this kind
    local hash=$1 kind=$2 stamp extra
    shift 2
    [[ -r $bajie_venv/bajie-stamp ]] || return 1
    stamp=" $(<"$bajie_venv/bajie-stamp") "
    [[ $stamp == " $hash "* ]] || return 1
    for extra in "$@"; do [[ $stamp == *" $extra "* ]] || return 1; done
    bajie_has_torch "$(bajie_torch_version)" "$kind" 2>/dev/null
}

bajie_stamp() { # HASH EXTRAS...: in one move, so that it is never half written
    printf '%s\n' "$*" >"$bajie_venv/bajie-stamp.new"
    mv -- "$bajie_venv/bajie-stamp.new" "$bajie_venv/bajie-stamp"
}

bajie_make_venv() { # a folder with a Python that runs, either ours (made afresh if it was never ready) or one that the user made
    local python
    if [[ -e $bajie_venv/bajie-made ]] &&
        { [[ ! -e $bajie_venv/bajie-stamp ]] || ! "$bajie_venv/bin/python" -c 'pass' 2>/dev/null; }; then
        bajie_say "an unfinished or moved environment is thrown away: $bajie_venv (清除未完成的环境)"
        find "$bajie_venv" -mindepth 1 -maxdepth 1 ! -name setup.lock ! -name caches -exec rm -rf -- {} +
    fi
    if [[ -x $bajie_venv/bin/python ]]; then
        [[ $(bajie_try_python "$bajie_venv/bin/python") == ok* ]] || bajie_stop "the environment $bajie_venv is not of a Python 3.11 to 3.13 that runs: remove it, or set BAJIE_VENV" \
            "该环境的 Python 不可用：请删除它，或设置 BAJIE_VENV"
    else
        [[ -z $(find "$bajie_venv" -mindepth 1 -maxdepth 1 ! -name setup.lock ! -name caches -print -quit) ]] || bajie_stop "the folder $bajie_venv is neither empty nor a Python environment: set BAJIE_VENV to another" \
            "目录非空且不是 Python 环境：请另设 BAJIE_VENV"
        python=$(bajie_find_python) || exit 1
        : >"$bajie_venv/bajie-made"
        bajie_quietly "an environment for $("$python" -V)" "$python" -m venv "$bajie_venv" || bajie_failed "no environment could be made in $bajie_venv" "无法创建 venv"
    fi
}

bajie_setup() { # EXTRAS -- ARGUMENTS...: a ready environment; bajie_args are the arguments without --gpu
    local extras=() kind hash argument extra had=()
    while [[ $# -gt 0 && $1 != -- ]]; do
        extras+=("$1")
        shift
    done
    [[ $# -gt 0 ]] && shift
    for argument in "$@"; do
        if [[ $argument == --gpu ]]; then export BAJIE_GPU=1; else bajie_args+=("$argument"); fi
    done
    for extra in ${extras[@]+"${extras[@]}"}; do
        bajie_known "$extra" || bajie_stop "there is no extra '$extra'; there are $(bajie_extras | paste -sd ' '), and --gpu" "没有这个附加项" 2
    done
    [[ $(uname -s) == Linux ]] || bajie_stop "this is $(uname -s); bajie runs on Linux (x86-64 or aarch64)" "只支持 Linux"
    [[ -z ${BAJIE_GPU:-} ]] || bajie_torch=cuda
    [[ -z ${BAJIE_GPU:-} ]] || bajie_has_nvidia || bajie_stop "--gpu is given, but no NVIDIA driver is found: leave it out to use the CPU" "未找到 NVIDIA 驱动，请去掉 --gpu"
    bajie_venv=${BAJIE_VENV:-$bajie_root/.venv}
    [[ $bajie_venv == /* ]] || bajie_venv=$PWD/$bajie_venv
    bajie_log=$bajie_venv/setup.log
    mkdir -p -- "$bajie_venv" 2>/dev/null && [[ -w $bajie_venv ]] || bajie_stop "the folder $bajie_venv cannot be written by $(id -un 2>/dev/null || id -u): set BAJIE_VENV to one that can" \
        "目录不可写：请设置 BAJIE_VENV"
    bajie_check_memory
    bajie_surroundings
    hash=$(bajie_hash)
    if bajie_is_ready "$hash" "$bajie_torch" ${extras[@]+"${extras[@]}"}; then
        bajie_check_disk "$bajie_venv" "$bajie_ready_disk_mb"
    else
        exec 9>>"$bajie_venv/setup.lock"
        if ! flock -n 9 2>/dev/null; then
            bajie_say "another script is installing; waiting for it (另一个脚本正在安装，等待中)"
            flock 9 || true # a file system without locks: go on alone
        fi
        if ! bajie_is_ready "$hash" "$bajie_torch" ${extras[@]+"${extras[@]}"}; then
            bajie_check_disk "$bajie_venv" "$bajie_disk_mb"
            trap bajie_broken_off INT TERM HUP
            kind=$bajie_torch
            [[ -r $bajie_venv/bajie-stamp ]] && read -r -a had <"$bajie_venv/bajie-stamp" && had=("${had[@]:1}")
            if ! bajie_is_ready "$hash" "$kind"; then
                bajie_has_nvidia && kind=cuda
                # More than extras will change: until it is done, the set that stood here is none that is known.
                [[ -r $bajie_venv/bajie-stamp ]] && bajie_stamp - ${had[@]+"${had[@]}"}
            fi
            bajie_say "setting up $bajie_venv, once; 1 to 5 minutes and 2 GB (首次安装，约一到五分钟)"
            bajie_make_venv
            # Extras that an earlier set-up installed stay installed, and stay in the stamp.
            for extra in ${had[@]+"${had[@]}"}; do bajie_known "$extra" && extras+=("$extra"); done
            mapfile -t extras < <(printf '%s\n' ${extras[@]+"${extras[@]}"} | sed '/^$/d' | sort -u)
            bajie_install "$kind" ${extras[@]+"${extras[@]}"}
            bajie_stamp "$hash" ${extras[@]+"${extras[@]}"}
            trap - INT TERM HUP
        fi
        exec 9>&-
    fi
    bajie_python=$bajie_venv/bin/python
    export VIRTUAL_ENV=$bajie_venv PATH=$bajie_venv/bin:$PATH
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    case ${1:-} in -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit
        ;;
    esac
    bajie_words=()
    bajie_has_nvidia && bajie_torch=cuda # what is made by itself is made for all that the machine has
    for bajie_word in "$@"; do
        if [[ $bajie_word == --gpu ]]; then bajie_torch=cuda; else bajie_words+=("$bajie_word"); fi
    done
    bajie_setup ${bajie_words[@]+"${bajie_words[@]}"} --
    bajie_say "ready: $bajie_python"
fi
