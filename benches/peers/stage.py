"""The processes of one measurement and their files; both are removed at its end."""

import pathlib
import subprocess
import tempfile

import machine


class Stage:
    """`with Stage(binary) as stage:`; `binary` is Outrigger's, which also issues the certificates."""

    free_port, wait_for = staticmethod(machine.free_port), staticmethod(machine.wait_for)

    def __init__(self, binary):
        self.binary, self.started = str(pathlib.Path(binary).resolve()), []

    def __enter__(self):
        self.directory = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.directory.name)
        self.certs = self.folder / "certs"
        subprocess.run(
            [self.binary, "certs", "--out", self.certs, "--trust-domain", "shop.example", "payments", "checkout"],
            check=True, capture_output=True,
        )
        return self

    def start(self, *command):
        # Their output is kept beside their files, to see why one does not start.
        with open(self.folder / f"said-{len(self.started)}", "wb") as said:
            process = subprocess.Popen(command, cwd=self.folder, stdout=said, stderr=said)
        self.started.append(process)
        return process

    def end(self, process):
        self.started.remove(process)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __exit__(self, *_):
        for process in list(self.started):
            process.terminate()
        for process in list(self.started):
            self.end(process)
        self.directory.cleanup()
