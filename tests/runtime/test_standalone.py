import shutil
import subprocess
import sys
from pathlib import Path

import llmspec.runtime

IMPORT_ALL = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("runtime").glob("*.py")):
    importlib.import_module(f"runtime.{path.stem}")
print(sorted({name.split(".")[0] for name in sys.modules} & {"llmspec", "lark", "scipy"}))
"""


def test_a_copy_of_the_folder_works_without_the_package(tmp_path):
    folder = Path(llmspec.runtime.__file__).parent
    shutil.copytree(folder, tmp_path / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
