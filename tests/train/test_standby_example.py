"""The comparison of standby tokens with other ways to show 16 tokens: what each model is given."""

import numpy as np
import pytest

from examples.demo.grids import SIDE, draw_grid
from examples.standby.train import NAMES, draw_picture, draw_video, table, training_batch
from examples.standby.ways import TOKENS, WAYS


@pytest.mark.parametrize("name", WAYS)
def test_every_way_shows_a_picture_by_as_many_tokens(name):
    way, examples = WAYS[name](), [draw_picture("train", 0, n) for n in range(2)]
    batch = training_batch(way, examples)
    here = batch.feature_index[..., 0] >= 0
    assert here.sum(1).tolist() == [TOKENS, TOKENS]
    assert (batch.labels >= 0).any(1).all()
    video = training_batch(way, [draw_video("train", 0, 0, 3)])
    assert (video.feature_index[..., 0] >= 0).sum() == 3 * TOKENS


def test_a_video_is_asked_about_one_of_its_frames():
    example = draw_video("test", 0, 5, 4)
    ((question, answer),) = example.turns
    row, ago = int(question.split()[4][0]) - 1, int(question.split(", ")[1].split()[0])
    grid = draw_grid("test", 0, 5 * 4 + 3 - ago)
    assert answer == ", ".join(NAMES[label] for label in grid.labels[row])
    assert len(example.frames) == SIDE
    np.testing.assert_array_equal(example.frames[3 - ago], grid.picture)
    assert table({"a": {"x": "1 %"}}) == "|  | a |\n| --- | --- |\n| x | 1 % |"
