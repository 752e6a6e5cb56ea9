"""The commands of SLURM that a launcher needs, simulated on this machine.

Jobs of an array start at once, and again if they are requeued. The state lies in the folder
$SLURM_DRILL: the script that was submitted, and the process of each job.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ARRAY = "7"


def commands(folder: Path) -> Path:
    """Write a folder of the commands, for PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def state(name: str) -> Path:
    """Return a file of the simulated cluster's state."""
    return Path(os.environ["SLURM_DRILL"]) / name


def sbatch(script: str) -> None:
    """Submit an array of jobs."""
    state("script").write_text(Path(script).read_text())
    with open(state("log"), "a") as log:
        for task in range(read_option("array") + 1):
            subprocess.Popen(
                [sys.executable, __file__, "node", script, str(task)], stdout=log, stderr=log
            )
    print(f"Submitted batch job {ARRAY}")


def node(script: str, task: str) -> None:
    """Run a job of the array, again as often as it is requeued."""
    ids = {"SLURM_JOB_ID": f"10{task}", "SLURM_ARRAY_JOB_ID": ARRAY, "SLURM_ARRAY_TASK_ID": task}
    queued = True
    while queued:
        subprocess.run(["bash", script], env=os.environ | ids)
        queued = (again := state(f"requeue_{ARRAY}_{task}")).exists()
        again.unlink(missing_ok=True)


def srun(*arguments: str) -> None:
    """Run a command with its output in files."""
    unbuffered, output_flag, path, error_flag, error, *command = arguments
    assert (unbuffered, output_flag, error_flag) == ("--unbuffered", "--output", "--error")
    job = f"{ARRAY}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    ids = {f"SLURM_{name}": "0" for name in ("LOCALID", "NODEID", "PROCID")}
    ids |= {f"SLURM_{name}": "1" for name in ("NTASKS", "JOB_NUM_NODES")}
    paths = [Path(name.replace("%A_%a", job).replace("%t", "0")) for name in (path, error)]
    end = time.monotonic() + 900
    while not paths[0].parent.exists():  # until the launcher has made the job's folder
        assert time.monotonic() < end
        time.sleep(0.01)
    with paths[0].open("a") as out, paths[1].open("a") as err:
        running = subprocess.Popen(command, env=os.environ | ids, stdout=out, stderr=err)
    state(f"pid_{job}").write_text(str(running.pid))
    sys.exit(abs(running.wait()))


def read_option(option: str) -> int:
    """Return the number in an option of the submitted script."""
    match = re.search(rf"--{option}=(?:0-)?(\d+)", state("script").read_text())
    assert match
    return int(match[1])


def scontrol(verb: str, job: str) -> None:
    """Note a request, such as to requeue a job."""
    state(f"{verb}_{job}").touch()


def sacct(*_: str) -> None:
    """Print the states of all jobs."""
    print("JobID|State|NodeList", *(f"{ARRAY}_{task}|RUNNING|here" for task in range(2)), sep="\n")


if __name__ == "__main__":
    {f.__name__: f for f in (sbatch, node, srun, scontrol, sacct)}[sys.argv[1]](*sys.argv[2:])
