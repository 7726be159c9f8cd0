"""An enclosed program reaches nothing outside its folder, by whatever call."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import enclosure

READS = {
    "open": "open(path).read()",
    "descriptor": "import os; os.read(os.open(path, os.O_RDONLY), 9)",
    "library": "import ctypes; f = ctypes.CDLL(None).fopen; f.restype = ctypes.c_void_p;"
    " assert f(path.encode(), b'r'), 'not there'",
    "process": "import subprocess; subprocess.run(['cat', path], check=True)",
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("is_enclosed", [True, False])
def test_a_file_elsewhere_is_not_there(tmp_path, monkeypatch, way, is_enclosed):
    if is_enclosed and enclosure.reason_not_to():
        pytest.skip(enclosure.reason_not_to())
    if not is_enclosed:  # the same reads succeed, or the test would show nothing
        monkeypatch.setattr(enclosure, "reason_not_to", lambda: "no")
    folder, elsewhere = tmp_path / "a folder", tmp_path / "state"
    folder.mkdir()
    elsewhere.write_text("a document")
    (folder / "own").write_text("own")
    code = f"assert open('own').read() == 'own'; path = {str(elsewhere)!r}; {READS[way]}"
    done = enclosure.run(["-S", "-c", code], folder, dict(os.environ))
    assert (done.returncode == 0) is not is_enclosed, done.stderr
    assert "own'" not in done.stderr


def test_where_it_cannot_be_done_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(enclosure.shutil, "which", lambda _: None)
    assert "no unshare" in enclosure.reason_not_to.__wrapped__()
    assert str(Path(sys.prefix).resolve()) in enclosure.interpreter()
