import numpy as np
import pytest

from rushes.engines.draft.mark import Mark, timecode


@pytest.mark.parametrize(
    ("number", "fps", "expected"),
    [
        (0, 16, "00:00:00:00"),
        (17, 16, "00:00:01:01"),
        (24 * 3661 + 5, 24, "01:01:01:05"),
        (24, 23.976, "00:00:01:00"),
        (3, 0.5, "00:00:03:00"),
    ],
)
def test_timecode(number: int, fps: float, expected: str) -> None:
    assert expected == timecode(number, fps)


@pytest.mark.parametrize(("width", "height"), [(1024, 576), (480, 720), (200, 120), (64, 48)])
def test_only_the_box_in_the_corner_changes(width: int, height: int) -> None:
    before = np.full((height, width, 3), 120, np.uint8)
    after = before.copy()
    mark = Mark(width, height, 16)
    mark.stamp(after, 7)
    x, y, w, h = mark.box
    assert x > 0
    assert x + w <= width
    assert y + h <= height
    rows, columns = np.nonzero((before != after).any(axis=2))
    assert y <= rows.min()
    assert rows.max() < y + h
    assert x <= columns.min()
    assert columns.max() < x + w


def test_the_mark_is_small_and_can_be_read() -> None:
    mark = Mark(1024, 576, 16)
    assert mark.box[2] * mark.box[3] < 0.012 * 1024 * 576
    for ground in (0, 120, 255):
        frame = np.full((576, 1024, 3), ground, np.uint8)
        mark.stamp(frame, 0)
        x, y, w, h = mark.box
        patch = frame[y : y + h, x : x + w].mean(axis=2)
        assert patch.max() - np.median(patch) > 90


def test_the_timecode_counts() -> None:
    mark = Mark(640, 360, 16)
    frames = [np.zeros((360, 640, 3), np.uint8) for _ in range(3)]
    for number, frame in zip((3, 3, 4), frames, strict=True):
        mark.stamp(frame, number)
    assert (frames[0] == frames[1]).all()
    assert (frames[0] != frames[2]).any()


def test_a_frame_with_no_room_stays_as_it_is() -> None:
    frame = np.full((6, 6, 3), 9, np.uint8)
    Mark(6, 6, 16).stamp(frame, 0)
    assert (frame == 9).all()
