"""Kernels forked from a process that has the large imports behind it, for smoke runs; all else about a run is as it
is, papermill and sockets included.

jupyter_client finds `ForkedKernels` by the entry point `forked` in forked_kernels-1.dist-info, and starts kernels
by it where it is the default provisioner.
"""
import gc
import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

FORKS = multiprocessing.get_context("forkserver")


def serve_kernel(ready: Connection, arguments: list[str], environment: Mapping[str, str], folder: str) -> None:
    "Be an IPython kernel; for a process of its own."
    gc.freeze()  # what is inherited is no garbage of this process: looking through it again and again would copy it
    os.setsid()
    ready.send("a group of its own")  # whoever stops the kernel stops its group
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import plotly.io
    from ipykernel.kernelapp import launch_new_instance

    plotly.io.renderers.default = environment["PLOTLY_RENDERER"]  # plotly has read it already
    launch_new_instance(argv=arguments)


class ForkedProcess:
    "What a provisioner asks of the process of a kernel."

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: str):
        here, there = FORKS.Pipe()
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        self.process = FORKS.Process(target=serve_kernel, args=(there, arguments, dict(environment), folder))
        self.process.start()
        there.close()
        here.recv()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedKernels(LocalProvisioner):
    "Start a kernel by forking; everything else is as for a kernel of this machine."

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        self.cwd = options.get("cwd") or os.getcwd()
        self.process = ForkedProcess(cmd, options["env"], self.cwd)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def fork_kernels(monkeypatch) -> None:
    "Let kernels that this process starts be forked, until the patch ends."
    monkeypatch.setattr(KernelProvisionerFactory.instance(), "default_provisioner_name", "forked")
