"""A group of processes that do jobs together: ``python -m tests.distributed.group RANK SIZE FOLDER`` is one of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import jobs

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that a job may take, processes that start included


class Group:
    """Starts processes, lets them all do a job of :mod:`.jobs`, and returns what each has found."""

    def __init__(self, size: int) -> None:
        """So many processes."""
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.group", str(rank), str(size), self._folder.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            for rank in range(size)
        ]
        self._count = 0

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def run(self, job: str, *args: Any) -> list[Any]:
        """What the job of that name returns in each process; an exception that it raised there."""
        self._count += 1
        torch.save((job, args), f"{self._folder.name}/job{self._count}.pt")
        for process in self.processes:
            if process.poll() is None:
                assert process.stdin is not None
                process.stdin.write(f"{self._count}\n")
                process.stdin.flush()
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()  # ends with the process
        files = [Path(f"{self._folder.name}/result{self._count}-{rank}.pt") for rank in range(len(self.processes))]
        return [torch.load(file, weights_only=False) if file.exists() else "gone" for file in files]


def serve(rank: int, size: int, folder: str) -> None:
    """Do jobs as they come."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    for line in sys.stdin:
        number = int(line)
        job, args = torch.load(f"{folder}/job{number}.pt", weights_only=False)
        try:
            result = getattr(jobs, job)(*args)
        except Exception as error:  # noqa: BLE001 - it is the result
            traceback.print_exc()
            result = error
        torch.save(result, f"{folder}/partial{number}-{rank}.pt")
        Path(f"{folder}/partial{number}-{rank}.pt").rename(f"{folder}/result{number}-{rank}.pt")
        print(number, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
