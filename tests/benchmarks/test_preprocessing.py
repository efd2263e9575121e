"""The checkpoints that preprocessing is measured with."""

from pathlib import Path

from benchmarks.towers import TOWERS, save
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import open_weights, understand
from tests.families.row import rows


def test_every_family_is_measured() -> None:
    assert set(TOWERS) == set(rows())
    for tower in TOWERS.values():
        assert tower.here < tower.layers or tower.here == tower.layers <= 1, "fewer layers, or those that there are"


def test_image_sizes_are_the_real_ones(tmp_path: Path) -> None:
    save("paligemma", tmp_path)
    source = open_source(str(tmp_path))
    image = understand(source, open_weights(source)).model.image
    assert image is not None
    assert (image.shape, image.features) == ((3, 224, 224), 256)
