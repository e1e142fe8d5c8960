"""What a user does on the machine from which a cluster is started, and what happens to that cluster. Runs inside lab.sh.

`ray up`, a run over three hosts, and one mishap after another; then the files that test_lab.py looks at.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

LAB, RESULTS, PROJECT = Path(os.environ["LAB"]), Path(os.environ["RESULTS"]), Path(os.environ["PROJECT"])
sys.path.insert(0, str(PROJECT))
HOSTS = {"head": "10.77.0.10", "worker1": "10.77.0.11", "worker2": "10.77.0.12"}
RAY = str(Path(sys.executable).with_name("ray"))
CONFIG = "/tmp/cluster.yaml"
DISK = LAB / "disk"
FOLDER = DISK / "runs" / "lab"
PROGRAM = "cd ~/sequence-flows && MLFLOW_TRACKING_URI=http://127.0.0.1:5000 ~/venv/bin/python -m distributed.run "
AUTO = "--run.address auto --actors.num_rollout_actors auto --actors.max_rollout_actors 4 --actors.rollout_resource rollout "
SMALL = (
    "--run.num_learner_steps 1000000 --run.max_seconds 3000 --actors.num_cpus 1 --actors.batch_size 256 --network.hidden_size 32 "
    "--network.num_layers 2 --network.kmer_sizes [] --evaluation.every_steps 1000000 --tracking.log_every_steps 5 "
    "--replay.capacity 20000 --oracle.name callable --oracle.cache_size 0 --evaluation.exact never "
)
FIRST = (
    f"{PROGRAM}{AUTO}{SMALL}--run.name lab --run.output_folder {FOLDER.parent} --run.save_every_seconds 3 "
    "--oracle.function tests.oracles:quarter_second"
)
AGAIN = f"{PROGRAM}--resume {FOLDER}"
HANGING = (
    f"{PROGRAM}{AUTO}{SMALL}--run.name hanging --run.output_folder {FOLDER.parent} "
    "--oracle.function tests.oracles:hangs_on_worker1 --oracle.timeout_seconds 1 --oracle.max_retries 0 "
    "--oracle.max_consecutive_failures 3"
)


def ray(*arguments: str, log: str, timeout: float = 300) -> int:
    """A command of `ray`, its output kept in the results."""
    with open(RESULTS / log, "w") as file:
        command = [RAY, arguments[0], "-y", *arguments[1:]] if arguments[0] in ("up", "down") else [RAY, *arguments]
        return subprocess.run(
            command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=timeout
        ).returncode


def execute(command: str, log: str) -> subprocess.Popen:
    """`ray exec` on the head."""
    with open(RESULTS / log, "w") as file:
        return subprocess.Popen([RAY, "exec", CONFIG, command], stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.3)


def newest(name: str, folder: Path = FOLDER) -> float:
    """The newest value of a metric; 0 if there is none yet."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    values = [json.loads(line)[name] for line in lines if f'"{name}"' in line and line.endswith("}")]
    return values[-1] if values else 0


def goes_on(after: str, steps: int = 20, folder: Path = FOLDER) -> None:
    before = newest("step", folder)
    wait_for(lambda: newest("step", folder) > before + steps, f"the run goes on after {after}")


def processes(*parts: str, host: str = "head") -> list[psutil.Process]:
    """Processes of a host whose command holds all parts."""
    space = os.readlink(f"/proc/{host_pid(host)}/ns/pid")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        try:
            inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space
        except OSError:
            continue  # it ended meanwhile
        if inside and words and words[0] not in ("bash", "sh") and all(part in " ".join(words) for part in parts):
            found.append(process)
    return found


def kill(*parts: str) -> None:
    found = processes(*parts)
    assert found, f"nothing to kill: {parts}"
    for process in found:
        process.kill()


def host_pid(host: str) -> int:
    return int((LAB / f"{host}.pid").read_text())


def memory() -> int:
    """Resident bytes of the driver, the learner and the buffer."""
    names = ("-m distributed.run", "ray::LearnerActor", "ray::ReplayBufferActor")
    return sum(max(process.memory_info().rss for process in processes(name)) for name in names)


def checkpoint_step() -> int:
    return max((int(path.name.split("_")[1]) for path in (FOLDER / "checkpoints").glob("step_*")), default=0)


def interrupt(run: subprocess.Popen) -> None:
    for process in processes("-m distributed.run"):
        process.send_signal(signal.SIGINT)
    run.wait(120)


def lose_actors() -> None:
    """kill -9 of buffer and learner."""
    for number, role in enumerate(("ReplayBufferActor", "LearnerActor"), start=1):
        wait_for(lambda: checkpoint_step() > 0, "a checkpoint")
        kill(f"ray::{role}")
        wait_for(lambda number=number: newest("num_restarts") == number, f"{role} is replaced")
        goes_on(f"the death of {role}")


def lose_mlflow(start: str) -> None:
    kill("mlflow", "server")
    goes_on("the loss of MLflow")
    assert execute(start, "mlflow_again.log").wait(120) == 0


def fill_disk() -> None:
    """Nothing can be written for a while: not a checkpoint, not a line of metrics."""
    log = RESULTS / "run.log"
    with open(DISK / "rubbish", "wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError:
            pass
    wait_for(lambda: "no checkpoint at step" in log.read_text(), "a checkpoint fails")
    (DISK / "rubbish").unlink()
    before = checkpoint_step()
    wait_for(lambda: checkpoint_step() > before, "a checkpoint after the disk was full")
    goes_on("a full disk")


def cut_link(worker_start: list[str]) -> None:
    """Worker 2 is out of reach, then joins anew."""
    subprocess.run(["ip", "link", "set", "vworker2", "down"], check=True)
    wait_for(lambda: newest("num_rollout_actors") == 2, "the actors of the host out of reach are given up")
    goes_on("the loss of a link")
    subprocess.run(["ip", "link", "set", "vworker2", "up"], check=True)
    script = "\n".join([f"export RAY_HEAD_IP={HOSTS['head']}", *worker_start])
    options = ["-i", str(LAB / "key"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    command = ["ssh", *options, f"root@{HOSTS['worker2']}", f"bash -lc {shlex.quote(script)}"]
    with open(RESULTS / "join.log", "w") as file:
        for _ in range(3):  # `ray start` itself has little patience on a busy machine
            if subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, timeout=120).returncode == 0:
                break
    wait_for(lambda: newest("num_rollout_actors") == 4, "the host joins anew")


def lose_host() -> None:
    os.kill(host_pid("worker1"), signal.SIGKILL)
    wait_for(lambda: newest("num_rollout_actors") == 2, "the actors of the dead host are given up")
    goes_on("the loss of a host")


def main() -> None:
    from tests.cluster.derive import for_hosts

    facts: dict[str, Any] = {}
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    values = for_hosts(PROJECT / "cluster.yaml", HOSTS["head"], [HOSTS["worker1"], HOSTS["worker2"]], LAB / "key")
    Path(CONFIG).write_text(yaml.safe_dump(values))
    start_mlflow = values["head_start_ray_commands"][-1]
    facts["up"] = ray("up", "--no-config-cache", CONFIG, log="up.log")
    run = execute(FIRST, "run.log")
    try:
        wait_for(lambda: newest("num_rollout_actors") == 4, "four rollout actors on two workers")
        goes_on("its start", steps=50)
        facts["memory"] = [memory()]
        lose_actors()
        lose_mlflow(start_mlflow)
        fill_disk()
        cut_link(values["worker_start_ray_commands"])

        facts["memory"].append(memory())
        kill("-m distributed.run")
        run.wait(60)
        run = execute(AGAIN, "resumed.log")
        goes_on("the death of the driver")
        lose_host()

        os.kill(host_pid("head"), signal.SIGKILL)
        run.wait(120)
        subprocess.run(["bash", str(LAB / "start_host.sh"), "head", HOSTS["head"]], check=True)
        subprocess.run(["bash", str(LAB / "start_host.sh"), "worker1", HOSTS["worker1"]], check=True)
        facts["up_again"] = ray("up", "--no-config-cache", CONFIG, log="up_again.log")
        run = execute(AGAIN, "resumed_again.log")
        goes_on("the loss of the head")
        facts["nodes"] = subprocess.run(
            [RAY, "exec", CONFIG, "~/venv/bin/python -m distributed.doctor --address auto --json"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        ).stdout  # fmt: skip
        interrupt(run)

        run = execute(HANGING, "hanging.log")
        folder = FOLDER.with_name("hanging")
        wait_for(lambda: newest("num_rollout_actors", folder) == 2, "the actors whose oracle hangs are given up")
        goes_on("an oracle that hangs on one host", folder=folder)
        interrupt(run)
    finally:
        run.kill()
        shutil.copytree(DISK / "runs", RESULTS / "runs", dirs_exist_ok=True)
        home = Path(f"/proc/{host_pid('head')}/root/root")
        for name in ("mlflow.log", "mlflow.db", "mlflow.db-wal"):
            if (home / name).exists():
                shutil.copy(home / name, RESULTS / name)
    facts["fetched"] = ray("rsync-down", CONFIG, f"{FOLDER}/", "/tmp/fetched/", log="rsync.log")
    facts["fetched_files"] = sorted(path.name for path in Path("/tmp/fetched").glob("*"))
    facts["down"] = ray("down", CONFIG, log="down.log")
    facts["left"] = [
        " ".join(p.info["cmdline"]) for part in ("raylet", "gcs_server") for p in processes(part)
    ]  # on the head
    (RESULTS / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
