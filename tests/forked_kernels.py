"""Kernels forked from a process that has the large imports behind it, for smoke runs; all else about a run is as it is, papermill and sockets included."""
import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection

FORKS = multiprocessing.get_context("forkserver")


def serve_kernel(ready: Connection, arguments: list[str], environment: Mapping[str, str], folder: str) -> None:
    "Be an IPython kernel; for a process of its own."
    os.setsid()
    ready.send("a group of its own")  # whoever stops the kernel stops its group
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import plotly.io
    from ipykernel.kernelapp import launch_new_instance

    plotly.io.renderers.default = environment["PLOTLY_RENDERER"]  # plotly has read it already
    launch_new_instance(argv=arguments)


class ForkedKernel:
    "What jupyter_client asks of the process of a kernel."

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: Mapping[str, str], cwd: str | None = None, **options):
        here, there = FORKS.Pipe()
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        self.process = FORKS.Process(target=serve_kernel, args=(there, arguments, dict(env), cwd or os.getcwd()))
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
