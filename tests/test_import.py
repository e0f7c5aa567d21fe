"""What `import ewavit` and its names bring in."""

import os
import subprocess
import sys

import pytest

import ewavit as ewa
import ewavit.core
import ewavit.distributed
from ewavit.cli import SPIN_COUNT

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


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses libgomp on Linux only")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPIN_COUNT), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_the_command_line_bounds_the_loop_of_waiting_threads_unless_the_user_does(given, spins):
    kept = {
        name: os.environ[name] for name in os.environ if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    script = "from ewavit import cli; cli.main(['train', '--help']); import torch"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | given | {"OMP_DISPLAY_ENV": "VERBOSE"},  # libgomp then says what it has read
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'expnad'"):
        ewa.expnad  # noqa: B018


def test_the_error_is_a_value_error():
    assert issubclass(ewa.EwavitError, ValueError)


def test_dir_shows_the_public_names_only():
    assert [name for name in dir(ewa) if not name.startswith("__")] == sorted({*ewa.__all__, "distributed"})
    assert {"__version__", "__doc__", "__all__"} <= set(dir(ewa))
