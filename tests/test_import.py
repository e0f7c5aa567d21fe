"""What `import ewavit` brings in."""

import subprocess
import sys

import pytest

import ewavit as ewa
import ewavit.core
import ewavit.distributed


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


@pytest.mark.parametrize("module", [ewa, ewavit.core, ewavit.distributed], ids=lambda module: module.__name__)
def test_every_public_name_exists_and_has_one_home(module):
    assert len(module.__all__) == len(set(module.__all__)) > 3
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    others = {ewa, ewavit.core, ewavit.distributed} - {module}
    assert not set(module.__all__) & {name for other in others for name in other.__all__}


def test_the_door_has_the_verbs_and_their_settings():
    assert 20 < len(ewa.__all__) < 28
    assert ewa.distributed is ewavit.distributed


def test_the_error_is_a_value_error():
    assert issubclass(ewa.EwavitError, ValueError)
