"""Several processes on this machine as torchrun starts them, without the seconds that torchrun and imports take.

They are forked from a server that has imported train.py, find each other by the environment, and what each of them says
is in a file.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import traceback

import torch

import train
from m3em_fast.uda import _pulse
from train_cases import at_call

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as train.py has it, for the server
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _member(rank, size, port, machines, folder, action, arguments):
    machine = rank * machines // size
    local = rank - sum(other * machines // size < machine for other in range(size))
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "GROUP_RANK": machine}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_PORT": str(port)})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for number, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    faulthandler.enable()
    code = 70
    try:
        code = action(rank, *arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def started(size, folder, action, *arguments, machines=1):
    """``action(rank, *arguments)`` in each of ``size`` processes, which returns an exit code."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    members = [
        SERVER.Process(target=_member, args=(rank, size, port, machines, folder, action, arguments), daemon=True)
        for rank in range(size)
    ]
    for member in members:
        member.start()
    return members


def ended(members, folder, timeout=60):
    """Exit codes, and what each said without the progress bar; none may still be there after a minute."""
    for member in members:
        member.join(timeout)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()
    return codes, [said(folder, rank) for rank in range(len(members))]


def said(folder, rank):
    lines = (folder / f"errors{rank}").read_text().replace("\r", "\n").splitlines()
    return [line for line in lines if line and "step/s" not in line and "s/step" not in line]


def together(size, folder, action, *arguments, **more):
    return ended(started(size, folder, action, *arguments, **more), folder)


def run_main(rank, options, change=None, *arguments):
    """What train.py's process does, after ``change(rank, *arguments)``; its exit code."""
    if change is not None:
        change(rank, *arguments)
    train.parse = lambda *_: options
    return train.main()


def signal_at(rank, who, name, count, *numbers):
    """Signals that rank ``who`` gets at a certain call."""
    if rank == who:
        at_call(train, name, count, lambda: [os.kill(os.getpid(), number) for number in numbers])


def impatient(*_):
    """Four seconds instead of forty without a sign of life."""
    _pulse.LOST = 4.0
