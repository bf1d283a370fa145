"""Places: held from the first moment, by one run, with who that is; whole or not there; nothing left of kills."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from tiny import save_tiny

from dicer import holds
from dicer.errors import DicerError, ExperimentError, OutputError
from dicer.files import folder_beside, remove_unfinished, unfinished, write_whole
from dicer.holds import Place, claimed, exchange, held_folder, taken

HELD = "import sys, pathlib\nfrom dicer.holds import claimed\nwith claimed(pathlib.Path(sys.argv[1])):\n"
HELD += "    print('held', flush=True)\n    sys.stdin.read()\n"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(out, content="new", *, folder=False):
    with taken(out) as place:
        if folder:
            place.new.mkdir()
            (place.new / content).touch()
        else:
            place.new.write_text(content)
        place.finish()


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``out``."""
    command = [sys.executable, "-c", HELD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("can_exchange", [False, True])
def test_what_is_made(tmp_path, monkeypatch, folder, there, can_exchange):
    out = tmp_path / "out"
    if not can_exchange:
        monkeypatch.setattr(holds, "exchange", lambda *_: False)
    if there:
        make(out, "old", folder=folder)
    make(out, folder=folder)
    assert (names(out) == ["new"]) if folder else (out.read_text() == "new")
    assert names(tmp_path) == ["out"]


def test_exchange(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["file"], [])
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        exchange(tmp_path / "a", tmp_path / "none")


def test_who_holds_it(tmp_path, other):
    says = rf"another run of dicer writes .*out now \(process {other.pid} on .+, since \d{{4}}-.*\); wait for its end"
    for hold in (claimed, taken, lambda out: claimed(out.parent / "x" / ".." / "out")):
        with pytest.raises(OutputError, match=says), hold(tmp_path / "out"):
            pass
    other.communicate("")
    assert names(tmp_path) == []
    with claimed(tmp_path / "out"):
        assert names(tmp_path) == ["out.partial"]
    assert names(tmp_path) == []


def test_kill_lets_go(tmp_path, other):
    other.kill()
    other.wait()
    assert names(tmp_path) == ["out.partial"]
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_kills_have_left_beside_it(tmp_path):
    """As of what a run went on from, which goes when it ends."""
    (tmp_path / ".dicer-abc.partial").mkdir()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_claim_is_taken_once(tmp_path):
    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        with taken(tmp_path / "out") as place:
            with pytest.raises(OutputError, match=f"process {os.getpid()}"), taken(tmp_path / "out"):
                pass
            place.new.write_text("new")
            place.finish()
        assert names(tmp_path) == ["out"]
    assert names(tmp_path) == ["out"]


def test_claim_of_the_first_process_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path / "out"), claimed(None):
        assert names(tmp_path) == []


def test_failure_leaves_no_folder_behind(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(ZeroDivisionError), claimed(out):
        _ = 1 / (not out.with_name("out.partial").is_dir())
    assert names(tmp_path) == []


@pytest.mark.parametrize("inside", [None, ".dicer-partial", "new"])
def test_planted_links(tmp_path, inside):
    """Nothing is written through a link that somebody put where our own things go."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    if inside is None:
        (tmp_path / "out.partial").symlink_to(victim)
    else:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / inside).symlink_to(victim / "file")
    with pytest.raises(DicerError):
        make(tmp_path / "out")
    assert (names(victim), (victim / "file").read_text()) == (["file"], "mine")
    assert not (tmp_path / "out").exists()


def test_folder_of_another_user(tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    monkeypatch.setattr("dicer.holds.is_own", lambda _: False)
    with pytest.raises(OutputError, match="in the way and was not made by dicer"):
        make(tmp_path / "out")


def test_folder_that_is_filled(tmp_path):
    with held_folder(tmp_path / "a" / "b", tmp_path / "a" / "b" / ".lock"):
        with held_folder(tmp_path / "a" / "b", tmp_path / "a" / "b" / ".lock"):
            pass
        code = "import sys, pathlib; from dicer.holds import held_folder; p = pathlib.Path(sys.argv[1])\n"
        code += "with held_folder(p, p / '.lock'): pass"
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "a" / "b"], capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr
    assert names(tmp_path) == []
    with held_folder(tmp_path / "a", tmp_path / "a" / ".lock"):
        (tmp_path / "a" / "record").touch()
    assert names(tmp_path / "a") == ["record"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot use"), held_folder(tmp_path / "file", tmp_path / "file" / ".lock"):
        pass
    assert issubclass(ExperimentError, DicerError)


# What kills leave of files


def test_leftovers_go_with_the_next_file(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in (f".dicer-{int(dead.stdout)}-abc.partial", ".dicer-abc.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "new").write_text("half")
    (tmp_path / ".dicer-link.partial").symlink_to(tmp_path)
    with folder_beside(tmp_path / "other") as held:
        write_whole(tmp_path / "file", "new")
        assert unfinished(tmp_path) == {held, tmp_path / ".dicer-link.partial"}
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".dicer-link.partial", "file"]


KILLED = """
import os, pathlib, signal, sys
from dicer.files import folder_beside
with folder_beside(pathlib.Path(sys.argv[1])) as folder:
    (folder / "new").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_makes_stays(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        write_whole(tmp_path / "other", "new")
        assert len(unfinished(tmp_path)) == 1
        process.kill()
        process.wait()
    write_whole(tmp_path / "other", "new")
    assert names(tmp_path) == ["other"]


# Signals: before any file operation, and several runs at once, are tests/kill

SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import dicer.pipeline
def score(*_, **__): os.kill(os.getpid(), signal.{name})
dicer.pipeline.score = score
from dicer.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signal(tmp_path, model, name, code):
    words = ["prune", str(model), "-o", str(tmp_path / "deep" / "out"), "--method", "weight-l2"]
    script = [sys.executable, "-c", SIGNALLED.format(name=name), *words]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "dicer: stopped. Nothing unfinished is left.\n")
    assert names(tmp_path) == []


def test_ignored_signal_stays_so(tmp_path):
    code = "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom dicer.cli import main\n"
    code += "with main._signals():\n    signal.raise_signal(signal.SIGINT)\nprint('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_holding_needs_no_torch(tmp_path):
    """So that a run that comes second says so at once."""
    code = "import sys, dicer.holds, dicer.cli.main\nprint([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert Place(tmp_path / "out").folder == tmp_path / "out.partial"
