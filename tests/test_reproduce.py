"""The recipes of the paper's breadth, `ewavit reproduce` and `ewavit data`.

The smoke runs replace each cell's data by a few made samples in the published layout, its model by a tiny one
of the same family with the cell's own settings, downloaded weights by fresh ones, and all seeds and epochs by
one; of the arms all are built and the last one is trained.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ewavit.cli import main
from ewavit.cli.compare import OWN, comparison_yaml
from ewavit.compare.arms import arm_recipe, make_arms
from ewavit.compare.cells import cells, shrunk
from ewavit.errors import EwavitError
from ewavit.study.published import PUBLISHED, check
from ewavit.training.loop import train
from ewavit.training.recipe import Recipe
from image_sets import write_cifar, write_tiny_imagenet
from point_sets import write_npz, write_scanobjectnn, write_shapenetpart, write_text

TINY = {  # by how a model's name begins
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "deit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin": {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "patch_size": 2, "window_size": 4},
    "pvt": {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "cait": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "xcit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "point": {
        "dim": 16, "depth": 3, "num_heads": 2, "num_group": 8, "group_size": 8, "encoder_width": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The data spec of each set, by the beginning of a cell's name."""
    root = tmp_path_factory.mktemp("made")
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (root / "folders" / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "folders" / split / name / f"{number}.png")
    scans = write_scanobjectnn(root / "scans")
    return {
        "cifar100": str(write_cifar(root / "100", coarse=True)),
        "cifar10": str(write_cifar(root / "10")),
        "tiny-imagenet": str(write_tiny_imagenet(root / "tiny")),
        **dict.fromkeys(("imagenet", "flowers", "pets", "cars"), str(root / "folders")),
        "modelnet10": f"modelnet10:{write_npz(root / 'npz')}",
        "modelnet40": f"modelnet40:{write_text(root / 'text')}",
        "scanobjectnn-bg": f"obj_bg:{scans}",
        "scanobjectnn-only": f"obj_only:{scans}",
        "scanobjectnn": f"pb_t50_rs:{scans}",
        "shapenetpart": f"shapenetpart:{write_shapenetpart(root / 'parts')}",
    }


@pytest.mark.parametrize("name", cells())
def test_a_cell_trains_for_one_epoch_on_made_data(name, made, tmp_path):
    own = {}
    chosen = comparison_yaml(cells()[name], "recipe", own)
    recipe = Recipe(**{key: value for key, value in chosen.items() if key not in OWN})
    assert chosen["seeds"] >= 3
    points = recipe.model.startswith("point")
    model = recipe.model.replace("transformer", "transformer_s") if name != "shapenetpart" else None
    tiny = next(kwargs for family, kwargs in TINY.items() if recipe.model.startswith(family))
    small = replace(
        recipe,
        data=next(spec for start, spec in made.items() if name.startswith(start)),
        model=model if points else recipe.model.partition(".")[0],
        model_kwargs=recipe.parsed("model_kwargs") | tiny,
        img_size=56 if recipe.model.startswith("pvt") else recipe.img_size and 32,
        num_points=32 if points else None,
        pretrained=False,
        epochs=1,
        batch_size=2 if points else 4,
        workers=0,
        output=str(tmp_path),
        name=name,
    )
    arms = make_arms(chosen["arms"], small, own)
    done = train(arm_recipe(small, arms[-1]))
    assert done.model_file.exists()
    assert np.isfinite(done.row["eval_loss"])


@pytest.mark.parametrize("name", cells())
def test_the_header_of_a_cell_says_command_expected_figure_cost_and_source(name):
    lines = cells()[name].read_text().splitlines()
    assert re.fullmatch(rf"#   ewavit reproduce {name} --data (\w+:)?PATH", lines[1])
    assert [line.split(":")[0] for line in lines[2:5]] == ["# Expected", "# Cost", "# Source"]
    chosen = comparison_yaml(cells()[name], "recipe", {})
    assert f"{len(chosen['arms']) * chosen['seeds']} runs of {chosen['epochs']} epochs" in lines[3]


def test_reproduce_shrinks_a_cell_and_writes_its_record(made, tmp_path, capsys):
    flags = "--no-amp --workers 0 --batch-size 2 --limit 4 --arms dense,ewa --jobs 1 --model-kwargs"
    tiny = "patch_size=8,embed_dim=32,depth=2,num_heads=2"
    data = made["cifar10"]
    command = ["reproduce", "cifar10-vit-ti", "--data", data, "--scale", "0.004", "--output", str(tmp_path)]
    assert main([*command, "--with", *flags.split(), tiny]) == 0
    assert (
        "scale 0.004: epochs 1, warmup_epochs 0, val_interval 1, limit 1, seeds 2" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "cifar10-vit-ti-x0.004" / "record.json").read_text())
    assert record["reproduce"] == {
        "recipe": "cifar10-vit-ti",
        "scale": 0.004,
        "shrunk": {"epochs": 1, "warmup_epochs": 0, "val_interval": 1, "limit": 1, "seeds": 2},
        "training_samples": 4,
        "evaluation_samples": 6,
        "published": False,
    }
    assert record["command"].startswith("ewavit reproduce cifar10-vit-ti --data cifar-10-batches-py ")
    assert [(arm["name"], len(arm["runs"])) for arm in record["arms"]] == [("dense", 2), ("ewa", 2)]
    assert "curve" not in record["arms"][0]["runs"][0]


def test_a_shrunk_cell_keeps_what_a_comparison_needs():
    whole = {"epochs": 300, "warmup_epochs": 20, "val_interval": 10, "seeds": 5}
    assert shrunk(whole, 1, 50_000) == {}
    assert shrunk(whole, 0.1, 50_000) == {
        "epochs": 30, "warmup_epochs": 2, "val_interval": 10, "limit": 5_000, "seeds": 2,
    }  # fmt: skip
    assert min(shrunk(whole, 1e-9, 50_000)[name] for name in ("epochs", "limit")) == 1
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(EwavitError, match="out of range"):
            shrunk(whole, wrong, 50_000)


def test_reproduce_lists_its_recipes_and_refuses_wrong_words(made, capsys):
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out.count("\n") == len(cells())
    for words, said in (
        (["cifar10-vit-t"], "did you mean cifar10-vit-ti?"),
        (["cifar10-vit-ti"], "give --data PATH"),
        (["cifar10-vit-ti", "--data", made["cifar10"], "--scale", "2"], "--scale 2 is out of range"),
        (["cifar10-vit-ti", "--data", made["cifar10"], "--with", "--epochs", "0"], "--epochs 0"),
    ):
        assert main(["reproduce", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_copy_that_differs_from_what_was_published_is_told(made, capsys):
    report = check(made["cifar10"])
    assert (report.published, report.train, report.evaluation, report.classes) == ("cifar-10", 30, 6, 10)
    assert report.problems[0] == "30 training samples in place of 50,000"
    assert sum("MD5" in problem for problem in report.problems) == 7
    assert main(["data", "check", made["modelnet10"]]) == 1
    said = capsys.readouterr().out
    assert "not as modelnet10 was published: 2 training samples in place of 3,991" in said
    assert main(["data", "check", made["pets"]]) == 0
    assert "no published set has this layout and number of classes" in capsys.readouterr().out


def test_data_lists_what_was_published_and_refuses_wrong_words(capsys):
    assert main(["data", "list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(PUBLISHED) + 1
    assert main(["data", "check"]) == 2
    assert "give the PATH to check" in capsys.readouterr().err
    assert main(["data", "list", "x"]) == 2
    assert "leave out x" in capsys.readouterr().err
