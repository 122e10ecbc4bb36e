"""A few random kills over three stages; `random_kills.py --kills 60` is the whole of it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import toys

pytestmark = pytest.mark.usefixtures("alone")


def test_randomly_killed_runs_end_bit_identical():
    script = pathlib.Path(toys.__file__).with_name("random_kills.py")
    command = [sys.executable, str(script), "--kills", "2", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == found["identical"] >= 2
