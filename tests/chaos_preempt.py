"""Two processes under torchrun, which gets SIGTERM again and again, as from a scheduler that wants the machine."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chaos_run
import chaos_worker
from chaos_process import Child, tail
from chaos_run import STAGES, digest, leftovers, log_of
from chaos_table import Line
from conftest import TINY
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from blip3o.weights import CorruptModel, check_folder

PROCESSES = 2
STEPS = 60  # of each stage
AHEAD = 12  # steps that a run goes before it is told to stop, at most
MOST = 30.0  # seconds from the signal to the end
PATIENCE = 120.0  # seconds for a start, or for an end that is late
MARK = "BLIP3O_CHAOS"  # in the environment of all processes of a run


class Torchrun:
    """torchrun, and what it has started."""

    EARLIEST = 0  # steps, before it is told to stop: while it starts, too

    def __init__(self, run: Path, errors: Path) -> None:
        self.mark, self.errors = f"{os.getpid()}-{time.monotonic_ns()}", errors
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES),
            str(Path(__file__).with_name("chaos_worker.py")), *arguments(run),
        ]  # fmt: skip
        with errors.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, MARK: self.mark}, stdout=output, stderr=output, start_new_session=True
            )
        self.pid = self.process.pid

    def processes(self) -> list[int]:
        """Those that are alive: torchrun and its workers, wherever they have gone."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is no business of ours
                continue
        return found

    def end(self, seconds: float) -> int | None:
        """The exit status, within so many seconds; None if it goes on."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """What is left of it."""
        for number in self.processes():
            os.kill(number, signal.SIGKILL)
        self.end(PATIENCE)


class Forked(Torchrun):
    """What torchrun is a command for, the agent that starts the workers and hands signals on, in forks of this process:
    a start costs no imports. A forked worker has the agent's own way with signals until training begins."""

    EARLIEST = 1

    def __init__(self, run: Path, errors: Path) -> None:
        self.errors = errors
        self.child = Child(lambda say: agent(arguments(run)), errors)
        self.pid = self.child.pid

    def processes(self) -> list[int]:
        """Those of the agent's session."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if session == str(self.child.pid) and state != "Z":
                found.append(int(place.name))
        return found

    def end(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self.child.status is None:
            pid, status = os.waitpid(self.child.pid, os.WNOHANG)
            if pid:
                self.child.status = status
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.005)
        return os.waitstatus_to_exitcode(self.child.status)


def agent(words: list[str]) -> None:
    os.setsid()
    config = LaunchConfig(
        1, 1, PROCESSES, run_id="chaos", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    elastic_launch(config, chaos_worker.main)(words)


def arguments(run: Path) -> list[str]:
    """Of `blip3o train`."""
    changes = [f"steps={STEPS}", "clip.steps=3", *(f"{stage}.ema={chaos_run.EMA}" for stage in STAGES)]
    return [str(run.parent / "recipe.toml"), *changes, "--out", str(run)]


def rows(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def measure(times: int, seed: int, folder: Path, start: type[Torchrun] = Torchrun) -> list[Line]:
    choices = random.Random(seed)
    prompt = Line(f"it ends within {MOST:.0f} s of SIGTERM")
    status = Line("its exit status says that it did not come to its end")
    gone = Line("no process is left")
    saved = Line("every step that was logged is in the checkpoint, which is whole; nothing is left beside it")
    ends = Line("a run that was stopped ends as the one that was not, bit for bit")
    seconds: list[float] = []
    statuses: Counter[int | None] = Counter()
    (folder / "recipe.toml").write_text(TINY.read_text().partition("[decoder]")[0])
    uncut = chaos_run.begun(folder / "uncut")
    running = start(uncut, folder / "uncut.err")
    if running.end(10 * PATIENCE) != 0:
        running.kill()
        raise RuntimeError(f"the run that nobody stops failed:\n{tail(folder / 'uncut.err')}")
    signals = number = 0
    while signals < times or number == 0:
        run, number = chaos_run.begun(folder / f"run{number}"), number + 1
        while True:
            running = start(run, folder / "run.err")
            wanted = rows(run) + choices.randint(start.EARLIEST, AHEAD)
            deadline = time.monotonic() + PATIENCE
            while signals < times and rows(run) < wanted and time.monotonic() < deadline:
                if running.end(0.01) is not None:
                    break
            if signals < times:
                time.sleep(choices.uniform(0, 0.2))
            if signals >= times or running.end(0) is not None:
                code = running.end(PATIENCE * 10)
                same = code == 0 and states(run) == states(uncut)
                ends.hold(same, f"status {code}\n{tail(running.errors)}" if code else f"run {number} ends otherwise")
                running.kill()
                break
            signals += 1
            told = time.monotonic()
            # To torchrun, or to all at once, as Slurm does it by default.
            for process in {running.pid, *(running.processes() if choices.random() < 0.5 else ())}:
                os.kill(process, signal.SIGTERM)
            code = running.end(PATIENCE)
            seconds.append(time.monotonic() - told)
            prompt.hold(code is not None and seconds[-1] < MOST, f"{seconds[-1]:.1f} s")
            statuses[code] += 1
            status.hold(code not in (0, None), f"status {code}\n{tail(running.errors)}")
            left = running.processes()
            gone.hold(not left, f"{len(left)} are left")
            running.kill()
            saved.hold(*examine(run))
        shutil.rmtree(run)
        if ends.broken:
            break
    prompt.note = f"at most {max(seconds):.1f} s"
    status.note = ", ".join(f"{code}: {count} times" for code, count in statuses.items())  # torchrun's own
    ends.note = f"{number} runs, {signals} signals"
    return [prompt, status, gone, saved, ends]


def states(run: Path) -> tuple[str, str, list[dict[str, object]]]:
    return digest(run / "checkpoint"), digest(run / "model"), log_of(run)


def examine(run: Path) -> tuple[bool, str]:
    """Whether the run is as a clean stop leaves it, and what is wrong."""
    try:
        check_folder(run / "checkpoint")
    except (CorruptModel, FileNotFoundError) as error:
        return False, str(error)
    left = [path.name for path in leftovers(run)]
    state = chaos_run.state_of(run)
    logged = [(row["stage"], row["step"]) for row in log_of(run) if row["stage"] in STAGES]
    done = STEPS * sum(stage in state["finished"] for stage in STAGES) + state["step"] * (state["stage"] != "")
    return not left and len(logged) == done, f"{done} steps saved, {len(logged)} logged, beside it {left}"
