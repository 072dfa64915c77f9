"""Reading a converted model needs no DeepSpeed."""

import subprocess
import sys


def test_the_reader_of_converted_models_does_not_import_deepspeed():
    code = "import sys, sltrain_ds.models.converted; print('deepspeed' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "False"
