"""Where a run's data lie: data specs with their local path made absolute, and found again from anywhere."""

from pathlib import Path

from ewavit.data.sources import is_folder, is_timm
from ewavit.errors import EwavitError
from ewavit.points.sources import is_points


def split_path(spec: str) -> tuple[str, Path | None]:
    """The kind and the path of a data spec: "points:" and PATH, or "" and a folder; None without a path."""
    kind, colon, place = spec.partition(":")
    if is_points(spec):
        return f"{kind}:", Path(place).expanduser() if colon and place else None
    return "", Path(spec).expanduser() if is_folder(spec) else None


def absolute_spec(spec: str) -> str | None:
    """A data spec with its local path made absolute; None for a spec without a path."""
    kind, path = split_path(spec)
    return None if path is None else f"{kind}{path.absolute()}"


def portable_spec(spec: str) -> str:
    """A data spec as a published file may hold it: of an absolute path, there or gone, its last name only."""
    kind = f"{spec.partition(':')[0]}:" if is_points(spec) else ""
    place = Path(spec.removeprefix(kind))
    return f"{kind}{place.name}" if place.is_absolute() else spec


def found_spec(spec: str, absolute: str | None) -> str:
    """The spec of a run's data, found from any working directory.

    Args:
        spec: as the run was given it.
        absolute: the same with an absolute path, as `absolute_spec` returned it; None if there was none.

    Returns:
        `spec` if it is the same place from here or `absolute` is gone, else `absolute`.

    Raises:
        EwavitError: neither path exists.
    """
    if absolute is None or absolute_spec(spec) == absolute:
        return spec
    kind, path = split_path(spec)
    place = Path(absolute.removeprefix(kind))
    if place.exists():
        return absolute
    if path is None or not path.exists():
        raise EwavitError(
            f"the data {spec!r} of the run is neither at {place} nor in this folder: give its place with "
            "--data"
        )
    return spec


def spec_of_file(spec: str, absolute: str | None) -> str:
    """As `found_spec`, for a spec that a file names and nobody gave: it may come from a stranger.

    Raises:
        EwavitError: as `found_spec`, or the data are fetched by a library that may run code from them.
    """
    if is_timm(spec) and not spec.lower().startswith("torch/"):
        raise EwavitError(
            f"a file names the data {spec!r}, which may come from the network and run code: if you trust "
            f"them, give --data {spec}"
        )
    return found_spec(spec, absolute)


def given_spec(spec: str) -> dict[str, str]:
    """The change `data` for `resume` of a run whose command names its data again; empty for local data.

    Local data may have moved, and are found by what the run recorded.
    """
    return {"data": spec} if is_timm(spec) else {}
