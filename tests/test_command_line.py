"""The command line keeps its manners: one sentence for a mistake, no torch to read a page, and a
job that saves when it is told to stop, ends when a part of it dies, and leaves nobody behind.

The jobs run a stand-in for DeepSpeed's launcher with the same shape (launcher -> ranks with
--local_rank=N, the same words in its log): the real one takes 10 s to start.
"""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.load import ConfigError
from launch import cli, grammar
from launch.check import check
from launch.train import MARK, Job
from launch.train import main as train_main
from pretrain.checkpoint import CheckpointError, StorageError

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "configs/runs/cpm-small-1gpu.yaml")
SAMPLE = str(ROOT / "configs/corpora/sample.yaml")

# ---- verbs ---------------------------------------------------------------------------------------


def test_a_bare_call_shows_every_verb_that_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("corpus", "check", "train"))


def test_a_verb_that_is_not_built_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "fly", cli.Verb("launch.wings:main", "", ""))
    assert "fly" not in cli.built()


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "corpus", "train"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"launch {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check", "nowhere.yaml"], "nowhere.yaml"),
        (["check", RUN, "batch.sampels=3"], "did you mean 'samples'"),
        (["check", RUN, "--devices", "3", "parallel.tensor=2"], "parallel.tensor: is 2"),
        (["check"], "check wants a CONFIG"),
        (["corpus", SAMPLE, "data.wrokers=1"], "did you mean 'workers'"),
        (["train", RUN, "--devices", "0"], "--devices is 0"),
        (["train", RUN, "--devices", "3", "parallel.tensor=2"], "parallel.tensor: is 2"),
        (["train", RUN, "--nodes", "0"], "--nodes is 0, must be at least 1"),
        (["train", RUN, "--hostfile", "no-such-file"], "no-such-file: there is no such hostfile"),
        (["check", RUN, "--devices", "0"], "--devices is 0, must be at least 1"),
        (["check", SAMPLE, "--devices", "-8"], "--devices is -8"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("bajie: ")
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", ["train", "cluster", "corpus", "plan"])
def test_only_the_page_is_required(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, *(["--slurm"] if verb == "cluster" else [])])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def test_the_script_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.train import main

    with pytest.raises(SystemExit) as ended:
        main(["--local_rank=0", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith("usage: deepspeed pretrain/train.py [-h] [--gpu] config [key=value ...]")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), 74),
        (OSError(errno.ESTALE, "Stale file handle"), 74),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2),
        (ConfigError("run.steps: is 0"), 2),
        (CheckpointError("no checkpoint is whole"), 2),
        (StorageError("another job is at work"), 74),
    ],
)
def test_a_file_system_that_failed_is_nobodys_mistake(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """74 is begun again where faults.restarts says so, 2 never; limits on files are raised."""
    from pretrain import train

    def fails(*_: object) -> None:
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(limit[1], 65536)
        raise error

    monkeypatch.setattr(train, "train", fails)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limit[1]), limit[1]))
    try:
        assert train.main([RUN, f"run.out={tmp_path / 'run'}"]) == code
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAJIE_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["check", "nowhere.yaml"])


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ValueError) as raised:
        json.loads("{")  # a library's ValueError that reached the roof: nobody's mistake but ours
    assert cli.sentence(raised.value) is None
    assert cli.sentence(KeyError("x")) is None
    assert "not installed" in str(cli.sentence(ModuleNotFoundError("", name="transformers")))
    assert str(cli.sentence(FileNotFoundError(2, "No such file", "a.txt"))).startswith("a.txt: ")


def test_reading_a_page_imports_no_torch(tiny_corpus: Path) -> None:
    code = f"""
        import sys
        from launch.cli import main
        assert main(["check", {RUN!r}, "--json"]) == 0
        built = "data.train=[{{corpus: {tiny_corpus}, weight: 1}}]"
        assert main(["check", {RUN!r}, built]) == 0
        assert main(["train", {RUN!r}, "--dry-run"]) == 0
        heavy = {{"torch", "numpy", "deepspeed"}} & set(sys.modules)
        sys.exit(f"imported: {{heavy}}" if heavy else 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- check ---------------------------------------------------------------------------------------


def test_check_tells_a_run_a_corpus_and_sizes_apart() -> None:
    assert check(RUN, [])["parameters"] == 108_882_432
    assert check(SAMPLE, [])["kind"] == "corpus"
    assert check(str(ROOT / "configs/sizes/cpm/large.yaml"), [])["parameters"] == 2_597_073_920


def test_check_names_the_sources_that_are_not_there() -> None:
    assert check(SAMPLE, [])["sources_not_found"] == []
    found = check(SAMPLE, ["data.sources.0.path=nowhere/*.jsonl"])
    assert found["sources_not_found"] == ["sample"]


def test_check_counts_tokens() -> None:
    found = check(RUN, ["batch.tokens=null", "batch.samples=10", "run.steps=7000"])
    assert found["tokens_per_step"] == 10 * 1024
    assert found["tokens"] == 7000 * 10 * 1024


def test_check_as_json_lists_the_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", RUN, "batch.micro=0", "optimizer.lr=0", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    assert len(answer["problems"]) == 2


@pytest.mark.parametrize("kind", ["run", "corpus", "sizes"])
def test_the_grammar_explains_every_key(kind: str) -> None:
    rows = grammar.fields(kind)
    silent = [row["key"] for row in rows if not row["doc"]]
    assert not silent, f"keys without a docstring in configs/: {silent}"
    assert len({(row["key"], row["type"]) for row in rows if row["key"]}) > 10
    assert grammar.page(kind).count("\n") >= len(rows)


def test_the_grammar_is_what_load_accepts() -> None:
    # Each key of the resolved page must stand in the grammar: the source and the classes are one.
    from configs.load import load, to_dict
    from configs.run import RunConfig

    def keys(value: object, lead: str) -> list[str]:
        if isinstance(value, dict):
            return [
                k for name, v in value.items() for k in [lead + name, *keys(v, f"{lead}{name}.")]
            ]
        if isinstance(value, list):
            return [k for item in value for k in keys(item, f"{lead}N.")]
        return []

    page = to_dict(load(RUN, RunConfig))
    assert set(keys(page, "")) <= {row["key"] for row in grammar.fields("run")}


# ---- train ---------------------------------------------------------------------------------------

LAUNCHER = """
    import os, signal, subprocess, sys, time
    def start(n):
        line = [sys.executable, "-u", sys.argv[1], f"--local_rank={n}", *sys.argv[3:]]
        return subprocess.Popen(line)
    procs = [start(n) for n in range(int(sys.argv[2]))]
    def end(number, frame):  # DeepSpeed's way: one by one, 30 s each
        for p in procs:
            print("[INFO] Killing subprocess", p.pid, flush=True)
            p.terminate()
            try: p.wait(30)
            except subprocess.TimeoutExpired: p.kill()
        sys.exit(max(p.poll() or 0 for p in procs) or 1)
    signal.signal(signal.SIGTERM, end)
    alive = list(procs)
    while alive:
        for p in list(alive):
            if p.poll() is None: continue
            if p.returncode: end(15, None)
            print(f"[INFO] Process {p.pid} exits successfully.", flush=True)
            alive.remove(p)
        time.sleep(0.1)
"""

RANK = """
    import os, signal, sys, time
    out, what = sys.argv[2:4]
    rank = int(sys.argv[1].split("=")[1])
    flag = []
    stubborn = what == "stubborn" or (what == "one fails" and rank == 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *a: None if stubborn else flag.append(1))
    def say(text):
        if rank == 0: sys.stdout.write("\\x1eBAJIE " + text + "\\n")
    print("chatter of a library")
    say("step 1"); say("\\rstep 1.5")
    if what == "good": sys.exit(0)
    if what == "complains":
        say("bajie: batch.micro: is 0 (错)"); sys.exit(2)
    if what == "one fails" and rank == 1: raise RuntimeError("the second rank is ill")
    open(f"{out}/{os.getpid()}", "w").close()
    while not flag: time.sleep(0.05)
    open(f"{out}/saved-{rank}", "w").close()
"""


class Stage:
    """A stand-in launcher and ranks in a folder, and the job that runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = io.BytesIO()
        (folder / "launcher.py").write_text(textwrap.dedent(LAUNCHER))
        (folder / "train.py").write_text(textwrap.dedent(RANK))

    def job(self, what: str, grace_s: float = 20.0) -> Job:
        train = str(self.folder / "train.py")
        line = [sys.executable, "-u", str(self.folder / "launcher.py"), train, "2"]
        env = dict(os.environ)
        return Job([*line, str(self.folder), what], env, self.log, ranks=2, grace_s=grace_s)

    def ranks(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]

    def when_running(self, action: Callable[[], object]) -> threading.Thread:
        def wait() -> None:
            while len(self.ranks()) < 2:
                time.sleep(0.02)
            action()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def nobody_left(self) -> bool:
        return not any(psutil.pid_exists(pid) for pid in self.ranks())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_only_marked_lines_reach_the_terminal(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.job("good").run() == 0
    assert capsys.readouterr().out == "step 1\n"  # no terminal: the passing line is left out
    assert b"chatter of a library" in stage.log.getvalue()
    assert MARK.encode() in stage.log.getvalue()


def test_a_file_gets_some_of_the_passing_lines(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.train.LOGGED_EVERY_S", 0.0)
    assert stage.job("good").run() == 0
    assert capsys.readouterr().out == "step 1\nstep 1.5\n"


def test_a_rank_that_complains_is_heard_once(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    job = stage.job("complains")
    assert job.run() == 2
    assert capsys.readouterr().err == "bajie: batch.micro: is 0 (错)\n"
    assert job.complained


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_rank_save(stage: Stage, number: int) -> None:
    # A shell's background job ignores SIGINT, and so would we: these tests may run in one.
    before = signal.signal(number, signal.SIG_DFL)
    stage.when_running(lambda: os.kill(os.getpid(), number))
    try:
        assert stage.job("runs").run() == 0
    finally:
        signal.signal(number, before)
    assert {"saved-0", "saved-1"} <= {path.name for path in stage.folder.iterdir()}
    assert stage.nobody_left()


def test_a_file_lets_every_rank_save_and_the_code_says_so(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`touch RUN/stop`, through the verb; one that was left from before does not count."""
    command = stage.job("runs").command
    monkeypatch.setattr("launch.train.deepspeed_line", lambda *_, **__: command)
    words = [RUN, f"run.out={tmp_path / 'run'}", "--devices", "2", "--stopped-code", "75"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    stage.when_running((tmp_path / "run" / "stop").touch)
    assert train_main(words) == 75
    assert {"saved-0", "saved-1"} <= {path.name for path in stage.folder.iterdir()}
    assert stage.nobody_left()
    command[-1] = "good"  # a run that came to its end was not stopped
    assert train_main(words) == 0


def test_ranks_that_will_not_end_are_killed_after_the_grace(stage: Stage) -> None:
    stage.when_running(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stage.job("stubborn", grace_s=0.5).run() == 128 + signal.SIGKILL
    assert stage.nobody_left()


def test_a_failed_rank_takes_its_waiting_peers_along(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.train.FAILED_PEER_GRACE_S", 0.5)
    job = stage.job("one fails")
    assert job.run() == 1
    assert job.last_error == "RuntimeError: the second rank is ill"
    assert stage.nobody_left()


def test_a_killed_launcher_leaves_no_rank(stage: Stage) -> None:
    job = stage.job("stubborn")
    stage.when_running(lambda: os.kill(job._process.pid, signal.SIGKILL))
    assert job.run() == 1
    assert stage.nobody_left()


def test_a_launcher_that_answers_0_too_early_is_not_believed(stage: Stage) -> None:
    # deepspeed's runner exits with 0 when its launch.py is killed.
    (stage.folder / "launcher.py").write_text("print('[INFO] Process 1 exits successfully.')")
    job = stage.job("good")
    assert job.run() == 1
    assert job.last_error == "1 of 2 processes ended well"


def test_a_killed_train_verb_lets_its_ranks_save_and_leaves_none(stage: Stage) -> None:
    code = (
        "import sys; from launch.train import Job; import os\n"
        "Job(sys.argv[1:], dict(os.environ), open(os.devnull, 'wb'), ranks=2).run()"
    )
    line = [sys.executable, "-c", code, *stage.job("runs").command]
    verb = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    stage.when_running(verb.kill).join(30)
    verb.wait()
    deadline = time.monotonic() + 20
    while not stage.nobody_left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stage.nobody_left()
    assert {"saved-0", "saved-1"} <= {path.name for path in stage.folder.iterdir()}
