"""What `import ewavit` and its names bring in."""

import subprocess
import sys

import pytest

import ewavit as ewa
import ewavit.core
import ewavit.distributed

EXTRAS = {"timm", "torchvision", "accelerate", "transformers", "PIL", "matplotlib", "safetensors", "yaml"}


@pytest.mark.parametrize("module", [ewa, ewavit.core, ewavit.distributed], ids=lambda module: module.__name__)
def test_every_public_name_exists_and_has_one_home(module):
    assert len(module.__all__) == len(set(module.__all__)) > 3
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    others = {ewa, ewavit.core, ewavit.distributed} - {module}
    assert not set(module.__all__) & {name for other in others for name in other.__all__}


def test_the_door_has_the_verbs_and_their_settings():
    assert 20 < len(ewa.__all__) < 28
    assert ewa.distributed is ewavit.distributed


def imported_by(script: str) -> set[str]:
    """The packages outside the standard library that a script has imported in the end."""
    report = (
        "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", script + report], capture_output=True, text=True, check=True)
    startup = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) - set(startup.stdout.split())


def test_import_brings_in_the_standard_library_only():
    assert imported_by("import ewavit") == {"ewavit"}


@pytest.mark.parametrize("use", ["import ewavit as ewa; ewa.expand", "from ewavit import expand"])
def test_a_public_name_brings_in_torch_and_what_torch_needs(use):
    found = imported_by(use)
    assert found - imported_by("import torch") == {"ewavit"}
    assert "torch" in found
    assert not found & EXTRAS


@pytest.mark.parametrize("name", ewa.__all__)
def test_every_name_of_the_door_is_found_by_its_own_name(name):
    assert getattr(ewa, name).__name__ == name
    assert name in dir(ewa)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'expnad'"):
        ewa.expnad  # noqa: B018


def test_the_error_is_a_value_error():
    assert issubclass(ewa.EwavitError, ValueError)
