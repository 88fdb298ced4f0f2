"""Stands in for decord, which lmms-eval's wrappers import and no question about images needs."""


class VideoReader:
    """Refuses to read a video."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("decord is not installed, so no video can be read")


def cpu(index: int = 0) -> None:
    """Refers to a device in decord; nothing here."""
