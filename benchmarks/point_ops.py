"""How many points per second do our point operations take in, against the best wheels that install from PyPI?

    python benchmarks/point_ops.py

Farthest-point sampling against fpsample's two exact methods, nearest neighbours against scipy's k-d tree, on
random clouds in the sizes of the models (32 of 1,024 points) and of scanned objects (8 of 8,192). The others
take one cloud at a time, on one thread of the CPU, and so do we there. A figure is the points of all clouds
over the fastest of a few calls; the results are compared. Without fpsample (pip install it) its rows are left
out. Writes records/point_ops-DEVICE.json.
"""

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.spatial import cKDTree

from ewavit.points import ops
from records import write_record

SIZES = ((32, 1024, 64, 32), (32, 1024, 128, 32), (8, 8192, 512, 32))  # clouds, points, centres, neighbours
FPS = ("fps_sampling", "bucket_fps_kdline_sampling") if importlib.util.find_spec("fpsample") else ()


def fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call, of at least three and as many as fit."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def farthest_from_any(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The largest distance of a point of each cloud from its nearest centre, (clouds,)."""
    return ops.knn(points, centres, 1)[0].amax((1, 2)).sqrt()


def sample_with(name: str, clouds: np.ndarray, count: int) -> np.ndarray:
    method = getattr(importlib.import_module("fpsample"), name)
    # The bucket method takes no notice of start_idx: its choice begins, and then differs, elsewhere.
    more = {"h": 3 if clouds.shape[1] < 4096 else 5} if "kdline" in name else {}
    return np.stack([method(cloud, count, start_idx=0, **more) for cloud in clouds]).astype(np.int64)


def neighbours_with_tree(centres: np.ndarray, clouds: np.ndarray, k: int) -> np.ndarray:
    return np.stack([cKDTree(cloud).query(c, k)[1] for c, cloud in zip(centres, clouds, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    rows = []
    for batch, size, count, k in SIZES:
        clouds = torch.rand(batch, size, 3, generator=torch.Generator().manual_seed(0))
        points, array = clouds.to(device), clouds.numpy()
        centres = ops.gather_points(points, ops.farthest_point_sample(points, count))
        for name in FPS:
            others = ops.gather_points(points, torch.from_numpy(sample_with(name, array, count)).to(device))
            ratio = farthest_from_any(points, others) / farthest_from_any(points, centres)
            assert (ratio < 1.15).all(), f"{name} leaves gaps {ratio.max():.2f} x ours"
        queries = centres.cpu().numpy()
        found = ops.knn(centres, points, k)[1].cpu()
        tree = torch.from_numpy(neighbours_with_tree(queries, array, k))
        assert (found.sort(-1)[0] == tree.sort(-1)[0]).float().mean() > 0.99

        calls: list[tuple[str, str, Callable[[], object]]] = [
            ("farthest points", f"ewavit, {args.device}", partial(ops.farthest_point_sample, points, count)),
            *(
                ("farthest points", f"fpsample {name}", partial(sample_with, name, array, count))
                for name in FPS
            ),
            ("neighbours", f"ewavit, {args.device}", partial(ops.knn, centres, points, k)),
            ("neighbours", "scipy cKDTree", partial(neighbours_with_tree, queries, array, k)),
        ]
        for what, who, call in calls:
            rate = round(batch * size / fastest(call, device, args.seconds))
            setting = {"operation": what, "clouds": batch, "points": size, "centres": count, "k": k}
            rows.append({**setting, "by": who, "points_per_second": rate})
            print(
                f"{what:<16}{batch:>3} x {size:>5} -> {count:>4}  {who:<36}{rate:>12,} points/s", flush=True
            )
    write_record(f"point_ops-{args.device}", vars(args), rows)


if __name__ == "__main__":
    main()
