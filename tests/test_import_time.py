"""What every worker process imports before its first step."""

import subprocess
import sys


def test_the_compiler_is_not_imported_by_those_who_do_not_compile():
    code = "import sys, etastar.engine.worker, etastar.engine.slots; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
