"""One process that has imported everything and forks a child for each kill: asked by lines of JSON, and answers so."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kill.child import End, ended, on_stage, started, typed
from kill.scenes import PARTS, SCENES, Scene, make_given

Tree = dict[str, str]  # path -> what it is, or a hash of its content
# Of a record: what is another one each time, or in a run that goes on.
_OTHERWISE = ("seconds", "memory", "ended", "git", "pass_shared_by")
_OUT = "out"  # in the place
_PATIENCE = 120  # seconds for all of several runs; they take one
_UNFINISHED = re.compile(r"\.dicer-.*|.*\.partial|tmp.+")  # names of what kills leave


def tree(folder: Path) -> Tree | None:
    """All that lies in a folder, or what a file is; None where nothing is."""
    if not folder.exists():
        return None
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    return {str(path.relative_to(folder)): _content(path) for path in paths}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return "folder"
    content = path.read_bytes()
    if path.parent.name == "logs" and path.suffix == ".json":
        values = json.loads(content)
        content = json.dumps({key: value for key, value in values.items() if key not in _OTHERWISE}).encode()
    elif path.parent.name == "answers":  # safetensors writes its metadata in any order
        end = 8 + int.from_bytes(content[:8], "little")
        content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    return hashlib.sha256(content).hexdigest()


@dataclass
class Prepared:
    """A scene, and what comes of it where nobody disturbs it.

    Attributes:
        scene: the command.
        before: the stage before it.
        old: what the output is before.
        new: what it is behind.
        whole: the stage behind it.
        events: its file operations.
        seconds: how long it takes.
    """

    scene: Scene
    before: Path
    old: Tree | None
    new: Tree
    whole: Tree
    events: list[str]
    seconds: float


class Runner:
    """Runs commands, ends them before their time, runs them once more, and says what there was after each.

    Args:
        base: an empty folder.
    """

    def __init__(self, base: Path) -> None:
        self._base, self._given, self._count = base, base / "given", 0
        for name in ("given", "logs", "stages"):
            (base / name).mkdir()
        make_given(self._given, self._by_itself)
        self._found = tree(self._given)
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, name: str) -> Prepared:
        """A scene with what comes of it; made once."""
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        return self._prepared[name]

    def _prepare(self, name: str) -> Prepared:
        scene, before = SCENES[name], self._base / name
        self._lay_out(scene, before)
        stage = self._stage(before)
        self._by_itself(self._filled(scene.words, stage), scene, stage)  # children need not import what it imports
        whole, stage, log = tree(stage), self._stage(before), self._log()
        start = time.monotonic()
        code = ended(started(scene, stage, self._filled(scene.words, stage), log, end=End()))
        seconds = time.monotonic() - start
        found, new = tree(stage), tree(stage / "place" / _OUT)
        said = log.with_suffix(".err").read_text()
        assert whole is not None
        assert found is not None
        assert new is not None, said
        assert (code, differing(found, whole)) == (0, []), f"{name}: {code} {said} {differing(found, whole)} {stage}"
        events = log.with_suffix(".events").read_text().splitlines()
        return Prepared(scene, before, tree(before / "place" / _OUT), new, whole, events, seconds)

    def _lay_out(self, scene: Scene, before: Path) -> None:
        """Make the stage as a scene finds it."""
        for part in PARTS:
            (before / part).mkdir(parents=True)
        for words in scene.before:
            self._by_itself(self._filled(words, before), scene, before)
        shutil.rmtree(before / "cache")
        (before / "cache").mkdir()
        if scene.keeps:
            (before / "place" / _OUT / scene.keeps).write_text("mine")

    def _by_itself(self, words: str, scene: Scene | None = None, stage: Path | None = None) -> None:
        """Run a command in this process."""
        log = self._log()
        here = on_stage(scene or Scene(""), stage or self._base)
        with here, log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            code = typed(words)
        assert code == 0, f"{words}: {log.read_text()}"

    def _filled(self, words: str, stage: Path) -> str:
        return words.format(given=self._given, place=stage / "place")

    def _stage(self, before: Path) -> Path:
        self._count += 1
        return Path(shutil.copytree(before, self._base / "stages" / str(self._count), symlinks=True))

    def _log(self) -> Path:
        self._count += 1
        log = self._base / "logs" / str(self._count)
        log.with_suffix(".err").touch()  # a child may be killed before it has made it
        return log

    # What can be asked for

    def kill(self, name: str, *, event: int, halves: bool, number: int) -> dict[str, Any]:
        """End a run before a file operation, by a signal, and run it once more."""
        known, log = self.prepared(name), self._log()
        stage = self._stage(known.before)
        words = self._filled(known.scene.words, stage)
        code = ended(started(known.scene, stage, words, log, end=End(event, halves, number)))
        how = f"signal {number} before {event}, {known.events[event]}{', the file before in half' if halves else ''}"
        return self._after(known, stage, log, code, how)

    def kill_at(self, name: str, moment: float) -> dict[str, Any]:
        """Kill a run at a moment, as a fraction of how long it takes, and run it once more."""
        known, log = self.prepared(name), self._log()
        stage = self._stage(known.before)
        child = started(known.scene, stage, self._filled(known.scene.words, stage), log)
        time.sleep(moment * known.seconds)
        os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked for its exit code
        how, code = f"after {moment:.3f} of {known.seconds:.2f} s", ended(child)
        if code == 0:  # it was timed when the machine had more to do
            known.seconds *= 0.8
        return self._after(known, stage, log, code, how)

    def _after(self, known: Prepared, stage: Path, log: Path, code: int, how: str) -> dict[str, Any]:
        """What there is after an end, and after the same command once more."""
        place, scene = stage / "place", known.scene
        said = log.with_suffix(".err").read_text()
        found = {"how": how, "code": code, "said": said, "state": _state(known, place), "names": names(place)}
        left = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if _UNFINISHED.fullmatch(path.name))
        if tree(stage) == tree(known.before):  # then the next run is one that nobody disturbs
            return {**found, "left": left, "again": {"code": 0, "differs": []}}
        words = self._filled(f"{scene.words} {scene.again}", stage)
        again = {"code": ended(started(scene, stage, words, log)), "said": log.with_suffix(".err").read_text()}
        again["differs"] = differing(tree(stage) or {}, known.whole)
        if not again["code"] and not again["differs"]:
            shutil.rmtree(stage)
        return {**found, "left": left, "again": again}

    def several(self, name: str, count: int) -> dict[str, Any]:
        """Let several runs begin at one moment; the one that wins comes to its slow part, and goes on after the others.

        Returns:
            ``ended``: (exit code, seconds from its begin to its end, what it said) of each, in the order of their ends;
            ``differs``: what is not as after one run.
        """
        known = self.prepared(name)
        stage, begin, go_on = self._stage(known.before), os.pipe(), os.pipe()
        words = self._filled(known.scene.words, stage)

        def ready() -> None:
            os.close(begin[1])
            os.close(go_on[1])
            wait_in(known.scene.slow, go_on[0])
            os.read(begin[0], 1)

        runs = [self._log() for _ in range(count)]
        children = {started(known.scene, stage, words, log, ready=ready): log for log in runs}
        time.sleep(0.1)  # all stand at the line
        os.close(begin[1])
        start, found = time.monotonic(), []
        while children and time.monotonic() - start < _PATIENCE:
            if len(children) == 1 and len(found) == count - 1:
                os.close(go_on[1])
            child, status = os.waitpid(-1, 0 if len(found) == count - 1 else os.WNOHANG)
            if child:
                said = children.pop(child).with_suffix(".err").read_text()
                found.append((os.waitstatus_to_exitcode(status), time.monotonic() - start, said))
            time.sleep(0.002)
        for child in children:
            os.kill(child, signal.SIGKILL)
        return {"ended": found, "differs": differing(tree(stage) or {}, known.whole)}

    def events(self, name: str) -> list[str]:
        """The file operations of a scene."""
        return self.prepared(name).events

    def given_changed(self) -> list[str]:
        """What is no longer as it was of what the commands read."""
        return differing(tree(self._given) or {}, self._found or {})


def wait_in(place: str, pipe: int) -> None:
    """Let this process wait where a function is called (``module:name``), until a pipe is closed."""
    module, _, attribute = place.partition(":")
    held = importlib.import_module(module)
    function = getattr(held, attribute)

    def waiting(*args: Any, **options: Any) -> Any:
        os.read(pipe, 1)
        return function(*args, **options)

    setattr(held, attribute, waiting)


def _state(known: Prepared, place: Path) -> str:
    """What the output is: none, old, new, part (of one that grows), aside (old, where the next one finds it)."""
    out = place / _OUT
    found = tree(out)
    if found is None:
        aside = tree(out.with_name(f"{out.name}.partial") / "old")
        return "none" if known.old is None else "aside" if aside == known.old else "lost"
    if known.scene.grows:
        found = {path: said for path, said in found.items() if not re.search(r"(^|/)\.dicer-", path)}
        return "new" if found == known.new else "part" if found.items() <= known.new.items() else "broken"
    return "new" if found == known.new else "old" if found == known.old else "broken"


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def differing(found: Tree, wanted: Tree) -> list[str]:
    """The paths of what is more, less or other."""
    return sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))


def serve() -> None:
    """Do what is asked for in lines of JSON, until there are no more."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may have it ignored
    torch.set_num_threads(1)
    runner = Runner(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(runner, asked.pop("do"))(**asked)), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    serve()
