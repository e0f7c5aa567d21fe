"""The table of model families: some are run here, and the page is that of its record."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "tools" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Of each kind one that needs no other library than the tests.
@pytest.mark.parametrize(
    ("name", "verdict", "split"),
    [
        ("transformers T5", "token", False),
        ("transformers wav2vec 2 conformer", "token", False),
        ("transformers ELECTRA", "token", True),
        ("transformers Deformable DETR", "token", False),
        ("transformers LXMERT", "token", True),
        ("torch nn.Transformer", "token", True),
        ("torchvision mvit v2 (video)", "token", False),
        ("transformers ConvNeXt 2", "image", True),
        ("transformers SegFormer", "image", False),
    ],
)
def test_a_family_trains_and_collapses_as_the_table_says(
    tool: ModuleType, name: str, verdict: str, split: bool
) -> None:
    [family] = [each for each in tool.all_families() if f"{each.library} {each.name}" == name]
    found = tool.check(family)
    assert "failed" not in found, found
    assert (found["verdict"], found["split"]) == (verdict, split)
    recorded = json.loads((ROOT / "records/families.json").read_text())["families"]
    assert [row["verdict"] for row in recorded if row["name"] == family.name] == [verdict]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformers MobileNet 2", "convolutions with BatchNorm are none"),
        ("transformers I-BERT", "intermediate (IBertIntermediate) holds 0 linear layers"),
        ("transformers BLOOM", "missing 1 required positional argument: 'residual'"),
    ],
)
def test_a_refused_family_has_a_reason(tool: ModuleType, name: str, reason: str) -> None:
    [family] = [each for each in tool.all_families() if f"{each.library} {each.name}" == name]
    found = tool.check(family)
    assert found["verdict"] == "refused"
    assert reason in found["reason"]


def test_the_page_of_families_is_that_of_its_record(tool: ModuleType) -> None:
    record = json.loads((ROOT / "records/families.json").read_text())
    assert (ROOT / "docs/families.md").read_text() == tool.page(record)
    assert len(record["families"]) >= 100
    assert not [row for row in record["families"] if "failed" in row]
    for verdict, count in record["counts"].items():
        assert count == sum(row["verdict"] == verdict for row in record["families"])
    libraries = {row["library"] for row in record["families"]}
    assert libraries >= {"timm", "torchvision", "transformers", "open_clip", "vit-pytorch", "diffusers"}
    assert all(row.get("reason") for row in record["families"] if row["verdict"] == "refused")
