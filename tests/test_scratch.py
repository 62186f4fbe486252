"""The scratch folder goes with its process: when it ends, or when the next one starts."""

import os
import signal
import subprocess
import sys

CODE = """
import os, sys, numpy as np
from sparsecut_jax.data.scratch import MappedArray, scratch
MappedArray(np.arange(3))
print(scratch(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "waits":
    sys.stdin.read()
"""


def start(how: str, folder) -> subprocess.Popen:
    environment = os.environ | {"TMPDIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CODE, how], stdin=pipe, stdout=pipe, text=True, env=environment)


def test_scratch_goes_with_its_process(tmp_path):
    killed = start("killed", tmp_path)
    left = killed.communicate()[0].strip()
    assert killed.returncode == -signal.SIGKILL and os.path.isdir(left)
    with start("waits", tmp_path) as alive:
        kept = alive.stdout.readline().strip()
        assert not os.path.exists(left)
        assert start("ends", tmp_path).communicate()[0].strip().startswith(str(tmp_path))
        assert os.listdir(tmp_path) == [os.path.basename(kept)] and len(os.listdir(kept)) == 2
        alive.stdin.close()
    assert os.listdir(tmp_path) == []
