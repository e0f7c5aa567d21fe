"""Each batched point operation equals a slow twin that reads like its definition, in double precision."""

import pytest
import torch
from torch import Tensor

from ewavit import EwavitError
from ewavit.points import ops


def clouds(batch: int, size: int) -> Tensor:
    return torch.rand(batch, size, 3, dtype=torch.float64)


def distances(query: Tensor, cloud: Tensor) -> list[float]:
    return [float((query - point).square().sum()) for point in cloud]


def farthest_point_sample_reference(cloud: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        nearest = [min(distances(point, cloud[chosen])) for point in cloud]
        chosen.append(nearest.index(max(nearest)))
    return chosen


def knn_reference(query: Tensor, cloud: Tensor, k: int) -> list[tuple[float, int]]:
    return sorted((distance, index) for index, distance in enumerate(distances(query, cloud)))[:k]


def ball_query_reference(query: Tensor, cloud: Tensor, radius: float, k: int) -> list[int]:
    away = distances(query, cloud)
    inside = [index for index, distance in enumerate(away) if distance <= radius**2][:k]
    first = inside[0] if inside else away.index(min(away))
    return inside + [first] * (k - len(inside))


def interpolate_reference(query: Tensor, cloud: Tensor, features: Tensor, k: int) -> Tensor:
    nearest = knn_reference(query, cloud, k)
    weights = [1 / (distance + 1e-8) for distance, _ in nearest]
    return sum(w * features[index] for w, (_, index) in zip(weights, nearest, strict=True)) / sum(weights)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_farthest_points_are_those_of_the_definition(count):
    points = clouds(3, 20)
    expected = [farthest_point_sample_reference(cloud, count) for cloud in points]
    assert ops.farthest_point_sample(points, count).tolist() == expected


def test_farthest_points_of_all_points_are_every_point_once():
    assert ops.farthest_point_sample(clouds(2, 9), 9).sort(1)[0].tolist() == [list(range(9))] * 2


def test_repeated_points_are_chosen_last():
    points = clouds(1, 5).repeat(1, 3, 1)
    chosen = ops.gather_points(points, ops.farthest_point_sample(points, 5))
    assert chosen.unique(dim=1).shape == (1, 5, 3)


@pytest.mark.parametrize("k", [1, 4, 15])
def test_neighbours_are_those_of_the_definition(k):
    queries, points = clouds(2, 6), clouds(2, 15)
    found, index = ops.knn(queries, points, k)
    for b in range(2):
        for m in range(6):
            expected = knn_reference(queries[b, m], points[b], k)
            assert index[b, m].tolist() == [i for _, i in expected]
            torch.testing.assert_close(
                found[b, m], torch.tensor([d for d, _ in expected]).double(), rtol=1e-6, atol=1e-12
            )


def test_small_distances_far_from_the_origin_are_not_rounded_away():
    points = torch.tensor([[[1000.0, 0, 0], [1000.001, 0, 0], [1000.0, 0.01, 0]]])
    distance, index = ops.knn(points[:, :1], points, 3)
    assert index.tolist() == [[[0, 1, 2]]]
    torch.testing.assert_close(distance[0, 0].sqrt(), torch.tensor([0, 0.001, 0.01]), rtol=3e-2, atol=0)


@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0])
def test_balls_are_those_of_the_definition(radius):
    points = clouds(2, 25)
    queries = torch.cat([points[:, :3], clouds(2, 3) + 5], 1)  # balls of all sizes, and empty ones
    expected = [
        [ball_query_reference(query, cloud, radius, 4) for query in of_cloud]
        for of_cloud, cloud in zip(queries, points, strict=True)
    ]
    assert ops.ball_query(queries, points, radius, 4).tolist() == expected


def test_interpolation_is_that_of_the_definition():
    queries, points, features = clouds(2, 5), clouds(2, 8), torch.randn(2, 8, 4, dtype=torch.float64)
    found = ops.interpolate(queries, points, features)
    expected = [
        torch.stack([interpolate_reference(query, cloud, f, 3) for query in of_cloud])
        for of_cloud, cloud, f in zip(queries, points, features, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_interpolation_at_a_point_gives_its_feature_and_fewer_points_than_k_suffice():
    points, features = clouds(1, 2), torch.randn(1, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(ops.interpolate(points, points, features), features, rtol=1e-6, atol=1e-6)


def test_interpolation_has_the_gradient_of_its_features():
    queries, points = clouds(1, 4), clouds(1, 6)
    features = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: ops.interpolate(queries, points, f), features)


def test_slices_of_a_large_cloud_change_nothing(monkeypatch):
    queries, points, features = clouds(2, 7), clouds(2, 11), torch.randn(2, 11, 3, dtype=torch.float64)

    def results() -> list[Tensor]:
        return [
            *ops.knn(queries, points, 4),
            ops.ball_query(queries, points, 0.4, 4),
            ops.interpolate(queries, points, features),
        ]

    whole = results()
    monkeypatch.setattr(ops, "CHUNK", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(), strict=True))


@pytest.mark.parametrize("count", [0, 6])
def test_a_cloud_that_is_too_small_is_named(count):
    points = clouds(1, 5)
    for call in (
        lambda: ops.farthest_point_sample(points, count),
        lambda: ops.knn(points, points, count),
        lambda: ops.ball_query(points, points, 1.0, count),
    ):
        with pytest.raises(EwavitError, match=f"cannot choose {count} of 5 points"):
            call()
