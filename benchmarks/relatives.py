"""The relatives of EWA on one recipe: from scratch, and in fine-tuning, where the old task may be forgotten.

    python benchmarks/relatives.py --omniglot PATH_OF/omniglot_small.zip

From scratch: fashion-mnist-mini (recipes/search/relatives-scratch.yaml). Fine-tuning: weights of
fashion-mnist-mini on 40 characters of Omniglot, 8 drawings each, tested on the 12 others, with
--retain fashion-mnist-mini (recipes/search/relatives-finetune.yaml). Finished runs stay: stop it and start it
again.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image, ImageOps

RECIPES = Path(__file__).parent.parent / "recipes" / "search"
CHARACTERS, TRAINING = 40, 8


def cut(source: Path, target: Path) -> None:
    """Write drawings as an image folder: white on black and 28 x 28, as fashion-mnist-mini is."""
    with zipfile.ZipFile(source) as archive:
        drawings: dict[
            str, dict[str, str]
        ] = {}  # the two sets share characters, so a drawing may be there twice
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                character = drawings.setdefault("-".join(Path(name).parts[-3:-1]), {})
                character.setdefault(Path(name).name, name)
        step = len(drawings) // CHARACTERS
        for character in sorted(drawings)[::step][:CHARACTERS]:
            for number, name in enumerate(drawings[character].values()):
                image = Image.open(io.BytesIO(archive.read(name))).convert("L")
                folder = target / ("train" if number < TRAINING else "val") / character
                folder.mkdir(parents=True, exist_ok=True)
                ImageOps.invert(image).resize((28, 28), Image.Resampling.BOX).save(folder / Path(name).name)


def ewavit(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ewavit.cli", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--omniglot", type=Path, required=True, help="zip of alphabet/character/drawing.png")
    parser.add_argument("--output", type=Path, default=Path("runs/relatives"))
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    characters = args.output / "characters"
    if not characters.exists():
        cut(args.omniglot, characters)
    weights, common = args.output / "pretrained" / "model.safetensors", ["--output", args.output]
    if not weights.exists():
        config = RECIPES / "relatives-pretraining.yaml"
        ewavit("train", "--config", config, "--name", "pretrained", *common)
    start = ["--data", characters, "--initial-checkpoint", weights]
    for name, more in (("relatives-finetune", start), ("relatives-scratch", [])):
        ewavit("compare", "--config", RECIPES / f"{name}.yaml", "--jobs", args.jobs, *more, *common)
        keep = Path(__file__).parent / "records.py"
        subprocess.run([sys.executable, str(keep), str(args.output / name)], check=True)


if __name__ == "__main__":
    main()
