"""What `import ewavit` brings in."""

import subprocess
import sys

import ewavit as ewa


def test_import_brings_in_torch_and_the_standard_library_only():
    script = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import ewavit
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - sys.stdlib_module_names))
heavy = {"timm", "torchvision", "accelerate", "transformers", "PIL", "matplotlib", "safetensors", "yaml"}
print(sorted(after & heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['ewavit']", "[]"]


def test_every_public_name_exists():
    assert len(ewa.__all__) == len(set(ewa.__all__)) > 20
    assert [name for name in ewa.__all__ if not hasattr(ewa, name)] == []


def test_the_error_is_a_value_error():
    assert issubclass(ewa.EwavitError, ValueError)
