"""What the README shows runs as it stands."""

import re
from pathlib import Path

import timm
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_three_lines_give_the_original_model_back():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    dense = timm.create_model("vit_small_patch16_224", num_classes=100)
    dense.load_state_dict(names["model"].state_dict(), strict=True)
    assert [type(m) for m in dense.modules()] == [type(m) for m in names["model"].modules()]
    assert isinstance(names["optimizer"], torch.optim.AdamW)


def test_every_record_that_the_readme_names_exists():
    root = Path(__file__).parent.parent
    named = set(re.findall(r"records/[\w.-]+", README))
    assert named
    assert all((root / name).exists() for name in named), named
