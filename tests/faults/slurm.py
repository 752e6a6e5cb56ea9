"""As much of SLURM as a launcher needs, on this machine: jobs of an array start at once, and again if they are queued
again. Its state lies in the folder $SLURM_DRILL: the script that was submitted, and the process of each job."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ARRAY = "7"


def commands(folder: Path) -> Path:
    """Makes a folder of them, for PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def state(name: str) -> Path:
    return Path(os.environ["SLURM_DRILL"]) / name


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    state("script").write_text(text)
    array = re.search(r"--array=0-(\d+)", text)
    assert array
    with open(state("log"), "a") as log:
        for task in range(int(array[1]) + 1):
            subprocess.Popen([sys.executable, __file__, "node", script, str(task)], stdout=log, stderr=log)
    print(f"Submitted batch job {ARRAY}")


def node(script: str, task: str) -> None:
    time.sleep(0.5)  # by then the launcher has put the job where it is looked for
    ids = {"SLURM_JOB_ID": f"10{task}", "SLURM_ARRAY_JOB_ID": ARRAY, "SLURM_ARRAY_TASK_ID": task, "SLURM_NTASKS": "1"}
    ids |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    queued = True
    while queued:
        subprocess.run(["bash", script], env=os.environ | ids)
        queued = (again := state(f"requeue_{ARRAY}_{task}")).exists()
        again.unlink(missing_ok=True)


def srun(*arguments: str) -> None:
    """Becomes the command, with its output in files."""
    unbuffered, out, path, err, error, *command = arguments
    assert (unbuffered, out, err) == ("--unbuffered", "--output", "--error")
    job = f"{ARRAY}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    for number, name in ((1, path), (2, error)):
        file = Path(name.replace("%A_%a", job).replace("%t", "0"))
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    state(f"pid_{job}").write_text(str(os.getpid()))
    os.execvp(command[0], command)


def scontrol(verb: str, job: str) -> None:
    state(f"{verb}_{job}").touch()


def sacct(*_: str) -> None:
    print("JobID|State|NodeList", *(f"{ARRAY}_{task}|RUNNING|here" for task in range(2)), sep="\n")


if __name__ == "__main__":
    {f.__name__: f for f in (sbatch, node, srun, scontrol, sacct)}[sys.argv[1]](*sys.argv[2:])
