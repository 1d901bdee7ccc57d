"""PyFilesystem's FSTestCases and the tests of its backend for SFTP, against the server that the environment names.

The latter start a server by Docker, which is left out here.
"""

import os
import sys
import types
import unittest.mock
import uuid

# What the backend's tests import, and its package lacks.
sys.modules["tests.utils"] = types.SimpleNamespace(
    docker_client=True, mock=unittest.mock, startServer=lambda *_: None, stopServer=lambda _: None
)

import fs.path
from fs.sshfs import SSHFS
from fs.subfs import ClosingSubFS
from tests import test_sshfs


class TestServer(test_sshfs.TestSSHFS):
    def make_fs(self):
        self.ssh_fs = SSHFS("server", config_path=os.environ["SSH_CONFIG"])
        home = self.ssh_fs._sftp.normalize(".")
        self.test_folder = fs.path.join(home, uuid.uuid4().hex)
        self.ssh_fs.makedir(self.test_folder, recreate=True)
        return self.ssh_fs.opendir(self.test_folder, factory=ClosingSubFS)


# Otherwise it would run too, against a server of its own.
del test_sshfs
