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
    state("script").write_text(Path(script).read_text())
    with open(state("log"), "a") as log:
        for task in range(asked("array") + 1):
            subprocess.Popen([sys.executable, __file__, "node", script, str(task)], stdout=log, stderr=log)
    print(f"Submitted batch job {ARRAY}")


def node(script: str, task: str) -> None:
    time.sleep(0.5)  # by then the launcher has put the job where it is looked for
    ids = {"SLURM_JOB_ID": f"10{task}", "SLURM_ARRAY_JOB_ID": ARRAY, "SLURM_ARRAY_TASK_ID": task}
    queued = True
    while queued:
        subprocess.run(["bash", script], env=os.environ | ids)
        queued = (again := state(f"requeue_{ARRAY}_{task}")).exists()
        again.unlink(missing_ok=True)


def srun(*arguments: str) -> None:
    """Runs the command, with its output in files."""
    unbuffered, out, path, err, error, *command = arguments
    assert (unbuffered, out, err) == ("--unbuffered", "--output", "--error")
    job = f"{ARRAY}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    ids = {f"SLURM_{name}": "0" for name in ("LOCALID", "NODEID", "PROCID")}
    ids |= {f"SLURM_{name}": "1" for name in ("NTASKS", "JOB_NUM_NODES")}
    out, err = (open(name.replace("%A_%a", job).replace("%t", "0"), "a") for name in (path, error))  # noqa: SIM115
    running = subprocess.Popen(command, env=os.environ | ids, stdout=out, stderr=err)
    state(f"pid_{job}").write_text(str(running.pid))
    sys.exit(abs(running.wait()))


def asked(option: str) -> int:
    found = re.search(rf"--{option}=(?:0-)?(\d+)", state("script").read_text())
    assert found
    return int(found[1])


def scontrol(verb: str, job: str) -> None:
    state(f"{verb}_{job}").touch()


def sacct(*_: str) -> None:
    print("JobID|State|NodeList", *(f"{ARRAY}_{task}|RUNNING|here" for task in range(2)), sep="\n")


if __name__ == "__main__":
    {f.__name__: f for f in (sbatch, node, srun, scontrol, sacct)}[sys.argv[1]](*sys.argv[2:])
