"""Training from Python: `ewavit train` is `train(Recipe(...))`, and every flag is a field of `Recipe`.

python examples/from_python.py
"""

import argparse

import torch

import ewavit
from ewavit.training.export import evaluate
from ewavit.training.loop import train
from ewavit.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", default="runs", help="folder of all runs")
    args = parser.parse_args()

    recipe = Recipe(
        data="fashion-mnist-mini",  # or a folder with train/ and val/
        limit=args.limit,
        model="vit_tiny_patch16_224",
        model_kwargs="patch_size=4,embed_dim=64,depth=4,num_heads=4",
        epochs=args.epochs,
        experts=4,  # 1 trains the dense model at the same seeds and images
        output=args.output,
    )
    result = train(recipe)

    print(f"{result.run}: top-1 {result.row['eval_top1']:.2f} %")
    metrics = evaluate(result.run)  # the deployed model, on the evaluation images
    assert abs(metrics["top1"] - result.row["eval_top1"]) < 0.1

    model = ewavit.load(result.run)  # the plain timm model, in eval mode
    with torch.no_grad():
        print(model(torch.zeros(1, 1, 28, 28)).shape)


if __name__ == "__main__":
    main()
