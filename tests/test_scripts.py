"""The scripts set themselves up on any machine, or say in one sentence what is missing.

setup.sh is sourced and its functions are tried one by one, against a PATH and a machine made for
the test; the whole set-up, from nothing, is the slow test at the end.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "launch" / "setup.sh"
SCRIPTS = [SETUP, ROOT / "launch/demo.sh", ROOT / "launch/test.sh", ROOT / ".ci/run"]
GOOD = "echo 'ok 3.12'"
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("BAJIE_", "VIRTUAL_ENV"))}


def bash(
    code: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    """Source setup.sh, then run `code` in the same shell."""
    return subprocess.run(
        ["bash", "-c", f'source "{SETUP}"\n{code}'],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**CLEAN, **(env or {})},
        timeout=60,
        check=False,
    )


def program(folder: Path, name: str, body: str) -> Path:
    """An executable shell script in a folder of a made-up PATH."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def one_sentence(done: "subprocess.CompletedProcess[str]", *says: str) -> None:
    """It stopped, with one line of English and Chinese that says these things."""
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("bajie: ")
    assert re.search(r"[\u4e00-\u9fff]", lines[0]), "the Chinese half is missing"
    for word in says:
        assert word in lines[0], lines[0]


# ---- the files themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_executable(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS[:3], ids=lambda path: path.name)
def test_help_installs_nothing(script: Path, tmp_path: Path) -> None:
    env = {**CLEAN, "BAJIE_VENV": str(tmp_path / "venv")}
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0
    assert len(done.stdout) > 100
    assert not (tmp_path / "venv").exists()


def test_every_dependency_is_pinned_inside_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow the pin {pin}"
    assert "+" not in pins["torch"], "the pin holds for CPU and CUDA builds: no local version"


# ---- which Python --------------------------------------------------------------------------------


def test_a_shim_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path / "shims", "python3", "echo 'pyenv: not found' >&2; exit 127")
    program(tmp_path / "shims", "python3.13", "echo 'pyenv: not found' >&2; exit 127")
    good = program(tmp_path / "bin", "python3.12", GOOD)
    path = f"{tmp_path}/shims:{tmp_path}/bin"
    done = bash(f"PATH='{path}' bajie_find_python")
    assert done.stdout.strip() == str(good), done.stderr


def test_the_second_of_two_by_the_same_name_is_found(tmp_path: Path) -> None:
    program(tmp_path / "a", "python3", "echo 'old 3.8'")
    good = program(tmp_path / "b c", "python3", GOOD)  # a space in the PATH too
    done = bash(f"PATH='{tmp_path}/a:{tmp_path}/b c' bajie_find_python")
    assert done.stdout.strip() == str(good), done.stderr


@pytest.mark.parametrize("answer", ["old 3.8", "old 3.14"])
def test_no_python_of_the_right_age_is_one_sentence(tmp_path: Path, answer: str) -> None:
    program(tmp_path, "python3", f"echo '{answer}'")
    done = bash(f"PATH='{tmp_path}' bajie_find_python")
    one_sentence(done, "3.11 to 3.13", answer, "BAJIE_PYTHON")


def test_no_python_at_all_is_one_sentence(tmp_path: Path) -> None:
    one_sentence(bash(f"PATH='{tmp_path}' bajie_find_python"), "none runs")


def test_a_python_without_venv_is_one_sentence(tmp_path: Path) -> None:
    program(tmp_path, "python3", "echo 'novenv 3.11'")
    one_sentence(bash(f"PATH='{tmp_path}' bajie_find_python"), "python3-venv")


def test_a_python_that_was_named_is_the_one_that_is_used(tmp_path: Path) -> None:
    done = bash("bajie_find_python", {"BAJIE_PYTHON": sys.executable})
    assert done.stdout.strip() == sys.executable
    bad = program(tmp_path, "mine", "exit 1")
    one_sentence(bash("bajie_find_python", {"BAJIE_PYTHON": str(bad)}), str(bad))


def test_this_very_python_is_found_good() -> None:
    answer = bash(f"bajie_try_python '{sys.executable}'").stdout.strip()
    assert answer == f"ok {sys.version_info.major}.{sys.version_info.minor}"


# ---- memory, disk, folder ------------------------------------------------------------------------


def test_what_is_free_is_measured() -> None:
    memory = int(bash("bajie_free_memory_mb").stdout)
    disk = int(bash(f"bajie_free_disk_mb '{ROOT}/not/yet/there'").stdout)
    assert 0 < memory < 10**8
    # Other processes write meanwhile: within 5 % is the same disk in the same unit.
    assert disk == pytest.approx(shutil.disk_usage(ROOT).free / 2**20, rel=0.05)


def test_too_little_memory_is_one_sentence() -> None:
    done = bash("bajie_free_memory_mb() { echo 1500; }; bajie_check_memory")
    one_sentence(done, "1.5 GB of memory", "4.0 GB")


def test_too_little_disk_is_one_sentence(tmp_path: Path) -> None:
    done = bash(f"bajie_free_disk_mb() {{ echo 900; }}; bajie_check_disk '{tmp_path}' 6000")
    one_sentence(done, "0.9 GB of disk", "6.0 GB", str(tmp_path))


def test_the_checks_can_be_left_out() -> None:
    code = "bajie_free_memory_mb() { echo 1; }; bajie_check_memory; echo went on"
    assert "went on" in bash(code, {"BAJIE_SKIP_CHECKS": "1"}).stdout


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = bash("bajie_setup --", {"BAJIE_VENV": str(tmp_path), "BAJIE_SKIP_CHECKS": "1"})
    assert done.returncode != 0
    assert "neither empty nor a Python environment" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unfinished_environment_is_thrown_away(tmp_path: Path) -> None:
    for name in ("bajie-made", "half"):
        (tmp_path / name).touch()
    code = f"bajie_venv='{tmp_path}'; bajie_log=/dev/null; bajie_find_python() {{ return 1; }}"
    done = bash(f"{code}; bajie_make_venv")
    assert "thrown away" in done.stderr
    assert not (tmp_path / "half").exists()


def test_a_signal_ends_what_is_being_installed(tmp_path: Path) -> None:
    code = f"""
        bajie_log='{tmp_path}/log'; trap bajie_broken_off INT TERM
        (sleep 1; kill -TERM $$) &
        bajie_quietly step bash -c 'echo $$ >{tmp_path}/pid; sleep 55 & wait'"""
    done = bash(code)
    assert done.returncode == 130
    assert "broken off" in done.stderr
    assert not Path("/proc", (tmp_path / "pid").read_text().strip(), "exe").exists()


def test_a_failed_step_is_one_sentence_with_its_own_complaint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("### a\nERROR: of an earlier step\n### b\nERROR: no wheel\nERROR: see above\n")
    done = bash(f"bajie_log='{log}'; bajie_failed 'torch did not install' '安装失败'")
    one_sentence(done, "torch did not install: ERROR: no wheel;", str(log))


# ---- the surroundings ----------------------------------------------------------------------------


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_without_a_home_caches_lie_in_the_environment(tmp_path: Path, home: str | None) -> None:
    code = f"""
        {"unset HOME" if home is None else f"export HOME={home}"}
        unset HF_HOME TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR NUMBA_CACHE_DIR MPLCONFIGDIR
        bajie_venv='{tmp_path}'; bajie_surroundings
        for name in HOME HF_HOME TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR NUMBA_CACHE_DIR MPLCONFIGDIR
        do echo "${{!name}}"; done"""
    lines = bash(code).stdout.split()
    assert len(lines) == 6
    assert all(line.startswith(str(tmp_path)) for line in lines)


def test_the_cpu_is_used_unless_the_gpu_is_asked_for(tmp_path: Path) -> None:
    code = f"bajie_venv='{tmp_path}'; bajie_surroundings"
    shown = '; echo "[${CUDA_VISIBLE_DEVICES-unset}] [${DS_ACCELERATOR-unset}]"'
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    assert bash(code + shown, env).stdout.strip() == "[] [cpu]"
    assert bash(code + shown, env | {"BAJIE_GPU": "1"}).stdout.strip() == "[0] [unset]"


def test_an_extra_that_is_none_is_one_sentence_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "bajie-made").touch()
    (tmp_path / "bajie-stamp").write_text("hash ray\n")
    for word in ("raay", "", "test hf", "--cpu"):
        env = {**CLEAN, "BAJIE_VENV": str(tmp_path)}
        done = subprocess.run([SETUP, word], capture_output=True, text=True, env=env, check=False)
        one_sentence(done, f"no extra '{word}'", "test hf ray web")
        assert done.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bajie-made", "bajie-stamp"}
    assert (tmp_path / "bajie-stamp").read_text() == "hash ray\n"


def test_gpu_without_a_driver_is_one_sentence() -> None:
    one_sentence(bash("bajie_has_nvidia() { return 1; }; bajie_setup -- --gpu"), "--gpu", "driver")


# ---- where torch comes from ----------------------------------------------------------------------

TORCH = """
bajie_venv='{folder}'; bajie_log='{folder}/log'
bajie_has_torch() {{ return 1; }}
bajie_check_disk() {{ echo "disk $2"; }}
bajie_quietly() {{ echo "try ${{*:2}}"; [[ "$*" == *{accepts}* ]]; }}
bajie_own_sources() {{ {own}; }}
bajie_no_index() {{ {no_index}; }}
bajie_install_torch {kind}
"""


def torch_from(folder: Path, accepts: str, **told: str) -> "subprocess.CompletedProcess[str]":
    """What bajie_install_torch tries where only the command with `accepts` in it succeeds and
    PyTorch's index lists our version unless `index` says otherwise."""
    index = told.pop("index", "echo 'Available versions: 2.13.0+cpu, 2.12.0+cpu'")
    program(folder / "bin", "python", index)
    told = {"own": "false", "no_index": "false", "kind": "cpu"} | told
    return bash(TORCH.format(folder=folder, accepts=accepts, **told))


def test_your_own_pip_sources_come_first(tmp_path: Path) -> None:
    tried = torch_from(tmp_path, "+cpu", own="true").stdout.splitlines()
    assert len(tried) == 1
    assert "--index-url" not in tried[0]
    assert tried[0].endswith("torch==2.13.0+cpu")


def test_without_own_sources_the_public_cpu_index_is_used(tmp_path: Path) -> None:
    tried = torch_from(tmp_path, "--index-url").stdout.splitlines()
    assert len(tried) == 1
    assert "download.pytorch.org/whl/cpu" in tried[0]


def test_an_index_that_does_not_answer_costs_a_sentence(tmp_path: Path) -> None:
    done = torch_from(tmp_path, "torch==2.13.0", index="exit 1")
    assert "3 GB down and 7 GB on disk" in done.stderr
    assert done.stdout.splitlines()[0] == "disk 14000"
    assert done.stdout.splitlines()[1].endswith("--no-deps torch==2.13.0")


def test_no_index_means_no_index(tmp_path: Path) -> None:
    done = torch_from(tmp_path, "==2.13.0", own="false", no_index="true")
    assert "download.pytorch.org" not in done.stdout


def test_with_a_driver_torch_is_the_ordinary_one(tmp_path: Path) -> None:
    tried = torch_from(tmp_path, "torch", kind="cuda").stdout.splitlines()
    assert tried[0] == "disk 14000"
    assert tried[1].endswith("--force-reinstall torch==2.13.0")


# ---- the stamp -----------------------------------------------------------------------------------

PYTHON = """
printf '%s\\n' "$*" >>'{folder}/asked'
case "$*" in
*sysconfig*) echo '{folder}' ;;
*'metadata.version("torch")'*) [[ ${{!#}} != cuda || -e '{folder}/cuda' ]] ;;
*'-m pip install '*) [[ ! -e '{folder}/offline' ]] || {{ echo 'ERROR: no wheel'; exit 1; }}
    [[ "$*" != *--force-reinstall* ]] || : >'{folder}/cuda' ;;
*) echo 'ok 3.12' ;;
esac"""


def environment(folder: Path, stamp: str = "$(bajie_hash) ray") -> None:
    """An environment of a set-up that was ready once; its Python notes what it is asked, pip does
    nothing, or fails where there is a file `offline`; torch is the CPU build until it is
    installed anew."""
    program(folder / "bin", "python", PYTHON.format(folder=folder))
    (folder / "bajie-made").touch()
    bash(f'echo "{stamp}" >{folder}/bajie-stamp')


def set_up(
    folder: Path, words: str, nvidia: bool = False
) -> tuple["subprocess.CompletedProcess[str]", list[str], str]:
    """bajie_setup, what pip was asked to install meanwhile, and the extras of the stamp if it is
    that of a ready environment."""
    (folder / "asked").write_text("")
    code = f"bajie_has_nvidia() {{ {'true' if nvidia else 'false'}; }}; bajie_setup {words}"
    done = bash(code, {"BAJIE_VENV": str(folder), "BAJIE_SKIP_CHECKS": "1"})
    asked = (folder / "asked").read_text().splitlines()
    stamp, _, extras = (folder / "bajie-stamp").read_text().strip().partition(" ")
    ready = stamp == bash("bajie_hash").stdout.strip()
    return done, [line for line in asked if "pip install" in line], extras if ready else ""


def test_a_ready_environment_is_trusted_and_nothing_else(tmp_path: Path) -> None:
    environment(tmp_path, "$(bajie_hash) test hf")

    def is_ready(arguments: str, before: str = "true") -> bool:
        code = f"bajie_venv='{tmp_path}'; {before}; bajie_is_ready {arguments}"
        return bash(code).returncode == 0

    assert is_ready('"$(bajie_hash)" cpu')
    assert is_ready('"$(bajie_hash)" cpu test hf')
    assert not is_ready('"$(bajie_hash)" cpu ray'), "an extra that was never installed"
    assert not is_ready('"$(bajie_hash)" cuda'), "torch cannot do this"
    assert not is_ready("another cpu"), "another set"
    assert not is_ready('"$(bajie_hash)" cpu', 'rm "$bajie_venv/bajie-stamp"'), "no stamp"
    environment(tmp_path)
    gone = 'ln -sf /nowhere "$bajie_venv/bin/python"'
    assert not is_ready('"$(bajie_hash)" cpu', gone), "Python has gone"


def test_extras_that_do_not_install_leave_a_ready_environment_ready(tmp_path: Path) -> None:
    environment(tmp_path)
    (tmp_path / "offline").touch()
    done, _, extras = set_up(tmp_path, "test hf --")
    assert done.returncode == 1
    assert "ERROR: no wheel" in done.stderr
    done, installed, extras = set_up(tmp_path, "-- --quick")  # as demo.sh does it
    assert (done.returncode, done.stderr, installed, extras) == (0, "", [], "ray")
    (tmp_path / "offline").unlink()
    done, installed, extras = set_up(tmp_path, "test hf --")
    assert (done.returncode, extras) == (0, "hf ray test")
    assert "thrown away" not in done.stderr and len(installed) == 3


def test_a_changed_set_is_not_ready_until_it_is_whole_and_is_kept_meanwhile(
    tmp_path: Path,
) -> None:
    """A pin was raised: a set-up that fails may have installed a part, so that the set of before
    does not count as ready either; extras are remembered, but for one that is no more."""
    environment(tmp_path, "before ray forgotten")
    (tmp_path / "offline").touch()
    for _ in range(2):
        done, _, extras = set_up(tmp_path, "--")
        assert (done.returncode, extras) == (1, "")
        assert (tmp_path / "bajie-stamp").read_text() == "- ray forgotten\n"
    (tmp_path / "offline").unlink()
    done, _, extras = set_up(tmp_path, "--")
    assert (done.returncode, extras) == (0, "ray")
    assert "thrown away" not in done.stderr


def test_a_login_node_and_a_gpu_node_share_an_environment(tmp_path: Path) -> None:
    environment(tmp_path)
    for nvidia in (False, True):  # the CPU build is enough for what runs on the CPU
        done, installed, _ = set_up(tmp_path, "ray --", nvidia)
        assert (done.returncode, installed) == (0, [])
    done, installed, extras = set_up(tmp_path, "-- --gpu", nvidia=True)
    assert (done.returncode, extras) == (0, "ray")
    assert sum("--force-reinstall torch==" in line for line in installed) == 1
    for nvidia, word in ((False, ""), (True, "--gpu"), (False, "")):  # and it stays
        done, installed, _ = set_up(tmp_path, f"ray -- {word}", nvidia)
        assert (done.returncode, installed) == (0, [])
    done, installed, _ = set_up(tmp_path, "hf --")  # more extras: the same torch
    assert done.returncode == 0
    assert not any("torch==" in line for line in installed)


def test_a_login_node_can_install_for_gpu_nodes(tmp_path: Path) -> None:
    environment(tmp_path)
    env = {**CLEAN, "BAJIE_VENV": str(tmp_path), "BAJIE_SKIP_CHECKS": "1"}
    for _ in range(2):
        done = subprocess.run(
            [SETUP, "--gpu", "ray"], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert asked.count("--force-reinstall torch==") == 1
    done, installed, extras = set_up(tmp_path, "ray -- --gpu", nvidia=True)
    assert (done.returncode, installed, extras) == (0, [], "ray")


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_nothing_with_no_compiler_and_no_home(tmp_path: Path) -> None:
    # A clone in a path with a space; a PATH without compilers; no HOME; from another folder.
    clone, tools = tmp_path / "a clone", tmp_path / "tools"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    tools.mkdir()
    (tools / "python3").symlink_to(Path(sys.executable).resolve())  # one that can make a venv
    compilers = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|nvcc|cpp|ld|as|make)(-\d+)?")
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if not compilers.fullmatch(tool.name) and not os.path.lexists(tools / tool.name):
                (tools / tool.name).symlink_to(tool)
    env = {k: v for k, v in CLEAN.items() if k not in ("HOME", "CC", "CXX")} | {"PATH": str(tools)}
    script = clone / "launch" / "setup.sh"
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(
            [script], cwd="/", env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    python = clone / ".venv" / "bin" / "python"
    line = [python, "-P", "-m", "launch", "check", f"{clone}/configs/sizes/cpm/tiny.yaml"]
    assert subprocess.run(line, cwd="/", env=env, check=False).returncode == 0
