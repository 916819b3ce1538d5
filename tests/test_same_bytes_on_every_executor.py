"""The same corpus, byte for byte, whoever does the work: processes, Ray, Slurm, killed or not.

Ray and Slurm are real ones on this machine (slow, and skipped with a reason where they are not
installed). The stage of `stage_jobs` stands in where a test must know what a task does just now.
"""

import contextlib
import errno
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stage_jobs
from small_slurm import missing, small_slurm
from stage_jobs import SMALL
from test_corpus_build import contents, page, start, write_source

from configs.corpus import Data
from configs.executing import Slurm
from configs.load import ConfigError, from_dict
from data_pipeline import blocks, build, executors, on_slurm
from data_pipeline.shards import CorpusError

pytestmark = pytest.mark.timeout(1800)  # three schedulers on a machine that may be busy
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (./launch/setup.sh ray)"
)
needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SECTIONS: dict[str, Any] = {
    "dedup": {"near": {}},
    "encode": {"pseudo_summary": True},
}


# ---- on every machine


def test_who_works_is_in_no_key(tmp_path: Path) -> None:
    def asked(**data: Any) -> Any:
        return page(tmp_path / "c", "text.jsonl", data=data).data.content()

    slurm = {"partition": "big", "memory_gb_per_task": None}
    assert asked() == asked(executor="ray", workers=7) == asked(executor="slurm", slurm=slurm)
    assert asked() != asked(task_mb=2)
    job = [stage_jobs.Job(tmp_path, "fine")]
    folders = {
        crew(job, 3, tmp_path / blocks.stage_key(job, 3, [])).folder
        for crew in (executors.local(2), on_slurm.crew(Slurm(), 2))
    }
    assert len(folders) == 1


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"executor": "yarn"}, "executor: is 'yarn', must be one of local, ray, slurm"),
        ({"slurm": {"time": "1 day"}}, "data.slurm.time: is '1 day', must be minutes"),
        ({"slurm": {"sbatch": ["--account=x"]}}, "without its dashes"),
        ({"slurm": {"sbatch": ["array=0-3"]}}, "'array' is the build's own"),
        ({"slurm": {"cpus_per_task": 0}}, "data.slurm.cpus_per_task: is 0"),
        ({"slurm": {"memory_gb_per_task": 0}}, "data.slurm.memory_gb_per_task: is 0"),
        ({"ray": {"cpus_per_task": 0}}, "data.ray.cpus_per_task: is 0"),
        ({"ray": {"memory_gb_per_task": -1}}, "data.ray.memory_gb_per_task: is -1"),
        ({"ray": {"retries": -1}}, "data.ray.retries: is -1"),
    ],
)
def test_a_page_that_cannot_be(data: dict[str, Any], sentence: str) -> None:
    source = {"kind": "jsonl", "name": "s", "path": "x"}
    with pytest.raises(ConfigError) as error:
        from_dict(Data, {"out": "c", "sources": [source], **data}, "data")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("blame", CorpusError, "^line 7 is not JSON; correct data.sources"),
        ("fill", OSError, "No space left on device"),
        ("bug", RuntimeError, "(?s)on node .*KeyError: 'forgotten'"),
    ],
)
def test_what_goes_wrong_elsewhere_is_said_here(
    what: str, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    executor = executors.local(1)([stage_jobs.Job(tmp_path, what)], 3, tmp_path)
    for block in executor.pipeline:
        block.folder = tmp_path
    told = executors.attempt(executor, 1, executors.Surroundings.here())
    with pytest.raises(kind, match=said) as error:
        executors.raise_again(json.loads(json.dumps(told)))
    assert what != "fill" or (error.value.errno, error.value.filename) == (errno.ENOSPC, "a/file")
    assert executors.attempt(executor, 0, executors.Surroundings.here()) is None


def test_a_node_with_another_environment_is_named(tmp_path: Path) -> None:
    here = executors.Surroundings.here()
    other = executors.Surroundings(here.cwd, "", here.versions | {"zstandard": "0.1"})
    with pytest.raises(CorpusError, match=r"has zstandard .* was started with 0\.1; give all"):
        other.enter(tmp_path)
    with pytest.raises(CorpusError, match=r"does not see .*gone; data\.out, the sources"):
        here.enter(tmp_path / "gone")
    here.enter(tmp_path)


@pytest.mark.parametrize("name", ["opencc", "pyarrow", "datasets", "trafilatura", "lxml", "warcio"])
def test_every_package_that_decides_bytes_is_compared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the extra `web` where both machines have them."""
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda of: "1.0" if of == name else installed(of)
    )
    executors._versions.cache_clear()
    here = executors.Surroundings.here()
    other = executors.Surroundings(here.cwd, "", here.versions | {name: "2.0"})
    try:
        here.enter(tmp_path)
        with pytest.raises(CorpusError, match=rf"has {name} 1\.0, the build .* with 2\.0"):
            other.enter(tmp_path)
        without = {key: version for key, version in here.versions.items() if key != name}
        executors.Surroundings(here.cwd, "", without).enter(tmp_path)
    finally:
        executors._versions.cache_clear()


def test_without_ray_or_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match=r"data\.executor is ray, but .*setup\.sh ray"):
        stage_jobs.stage("ray", tmp_path / "c", "fine")
    with pytest.raises(CorpusError, match=r"data\.executor is slurm, but there is no sbatch"):
        stage_jobs.stage("slurm", tmp_path / "c", "fine")
    assert stage_jobs.stage("local", tmp_path / "c", "fine").counts["numbers"] == 3


def test_the_script_of_a_job_says_what_the_page_says(tmp_path: Path) -> None:
    config = Slurm(
        partition="cpu",
        memory_gb_per_task=2.0,
        sbatch=("account=lab", "exclusive"),
        setup="module load x\nsource env/bin/activate",
        python="/opt/a b/python",
    )
    folder = tmp_path / "my corpora" / "clean-0"
    executor = on_slurm.crew(config, 4)([], 9, folder)
    script = executor.get_launch_file_contents(executor.get_sbatch_args(9), "")
    for line in ("partition=cpu", "mem=1907M", "account=lab", "exclusive", "array=0-8%4"):
        assert f"#SBATCH --{line}\n" in script
    for option in ("output", "error"):
        assert f'#SBATCH --{option}="{folder}/slurm_logs/%A_%a.out"\n' in script
    assert script.index("module load x\nsource env/bin/activate\n") < script.index("exec '/opt/a b")


# ---- Ray and Slurm, real ones


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with small_slurm() as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> str:
    if request.param == "slurm":
        request.getfixturevalue("slurm")
    return str(request.param)


clusters = pytest.mark.parametrize(
    "executor",
    [pytest.param("ray", marks=needs_ray), pytest.param("slurm", marks=needs_slurm)],
    indirect=True,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "text.jsonl", copies=6, every=3)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(page(out, source, data={"workers": 1}, **SECTIONS))
    return out


def assert_same(out: Path, built: Path) -> None:
    mine, local = contents(out), contents(built)
    assert mine.keys() == local.keys()
    assert [name for name in mine if mine[name] != local[name]] == []
    assert {"manifest.json", "train.bin", "train.idx", "train.gaps", "report.html"} <= mine.keys()
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
@clusters
def test_the_same_bytes(executor: str, source: Path, built: Path, tmp_path: Path) -> None:
    config = page(tmp_path / "corpus", source, data={"executor": executor, **SMALL}, **SECTIONS)
    build.build(config)
    assert_same(tmp_path / "corpus", built)
    assert len(list(built.glob("documents/train-*"))) > 1  # there was work to share
    stages = [
        {path.name for path in (out / "stages").iterdir()} for out in (tmp_path / "corpus", built)
    ]
    assert stages[0] == stages[1]


@pytest.mark.slow
@clusters
def test_what_goes_wrong_on_a_node(executor: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"^line 7 is not JSON; correct data\.sources"):
        stage_jobs.stage(executor, tmp_path / "a", "blame")
    with pytest.raises(OSError, match="No space left on device"):
        stage_jobs.stage(executor, tmp_path / "b", "fill")
    (tmp_path / "c").mkdir()
    node = re.escape(os.uname().nodename)
    how = {"ray": r", try 2 of 2 \(\w+", "slurm": r": FAILED, exit code 0:9"}[executor]
    said = rf"task 1 of job-\w+.* died on node {node}, process \d+{how}.*what is done is kept"
    with pytest.raises(CorpusError, match=said):
        stage_jobs.stage(executor, tmp_path / "c", "die")
    assert (tmp_path / "c" / "deaths").read_text() == {"ray": "xx", "slurm": "x"}[executor]
    (tmp_path / "c" / "immune").touch()
    assert stage_jobs.stage(executor, tmp_path / "c", "die").counts["numbers"] == 3


def drive(executor: str, out: Path) -> "subprocess.Popen[str]":
    """A driver in a process of its own, its task 1 waiting for OUT/open."""
    out.mkdir(exist_ok=True)
    path = Path(__file__).with_name("stage_jobs.py")
    process = subprocess.Popen(
        [sys.executable, str(path), executor, str(out), "wait"],
        env={**os.environ, "PYTHONPATH": str(path.parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: bool(list(out.glob("stages/job-*/where/00001"))))
    return process


def until(true: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def alive(out: Path) -> bool:
    """Whether the process of task 1 lives."""
    (note,) = out.glob("stages/job-*/where/00001")
    return Path(f"/proc/{note.read_text().rpartition(' ')[2]}").exists()


@pytest.mark.slow
@clusters
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop_calls_its_tasks_off(
    executor: str, blow: signal.Signals, tmp_path: Path
) -> None:
    process = drive(executor, tmp_path / "c")
    process.send_signal(blow)
    assert process.wait(240) != 0
    until(lambda: not alive(tmp_path / "c"))
    (tmp_path / "c" / "open").touch()
    assert stage_jobs.stage(executor, tmp_path / "c", "wait").counts["numbers"] == 3


@pytest.mark.slow
@needs_slurm
def test_a_killed_driver_is_followed_by_one_that_finds_its_jobs(
    slurm: None, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    drive("slurm", out).kill()
    (folder,) = out.glob("stages/job-*")
    job = json.loads((folder / "slurm.json").read_bytes())["job"]
    with pytest.raises(CorpusError, match=rf"Slurm job {job} of an earlier build .*scancel {job}"):
        stage_jobs.stage("local", out, "wait")
    second = drive("slurm", out)
    time.sleep(3)
    assert alive(out)
    (out / "open").touch()
    assert second.wait(240) == 0
    assert not (folder / "slurm.json").exists()
    arrays = {path.name.partition("_")[0] for path in (folder / "slurm_logs").iterdir()}
    assert arrays == {job}  # nothing was submitted twice


@pytest.mark.slow
@needs_slurm
def test_what_slurm_refuses_is_a_sentence(slurm: None, tmp_path: Path) -> None:
    for wrong, word in (({"partition": "none"}, "partition"), ({"memory_gb_per_task": 99}, "")):
        said = rf"sbatch refused the job of job-\w+: .*{word}.*correct data\.slurm"
        with pytest.raises(CorpusError, match=said):
            stage_jobs.stage("slurm", tmp_path / "c", "fine", slurm=wrong)
    nowhere = {"slurm": {"memory_gb_per_task": 0.9, "python": "/no/python"}}
    said = r"died on node \w+, before it began: FAILED, exit code 12\d:0, its last words: .*/no/pyt"
    with pytest.raises(CorpusError, match=said):
        stage_jobs.stage("slurm", tmp_path / "c", "fine", **nowhere)


@pytest.mark.slow
@clusters
def test_blows_to_tasks_and_drivers(
    executor: str, source: Path, built: Path, tmp_path: Path
) -> None:
    """kill -9 of the driver, or of a task that is at work; the builds that follow make the same."""
    draw = random.Random(3)
    out = tmp_path / "corpus"
    data = {"executor": executor, "ray": {"retries": 0}, **SMALL}
    config, struck = page(out, source, data=data, **SECTIONS), {"driver": 0, "task": 0}
    for attempt in range(6):
        process, wanted = start(config, tmp_path), draw.randrange(1, 5)
        seen: set[str] = set()  # tasks that were found at work
        while process.poll() is None:
            time.sleep(0.001)
            for path in out.glob("stages/*/where/*"):
                with contextlib.suppress(OSError):  # it has just ended, or begins again
                    pid = int(path.read_text().rpartition(" ")[2] or 0)
                    if not pid or (path.parents[1] / "completions" / path.name).exists():
                        continue
                    seen.add(f"{path} {pid}")
                    if len(seen) >= wanted:
                        os.kill(process.pid if attempt % 2 else pid, signal.SIGKILL)
                        struck["driver" if attempt % 2 else "task"] += 1
                        wanted = 10**9
        _, said = process.communicate(timeout=400)
        assert process.returncode <= 0 or "died on node" in said, said
    process = start(config, tmp_path)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert_same(out, built)
    assert struck["driver"] > 0 and struck["task"] > 0, struck
