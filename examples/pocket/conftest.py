"""What the tests of LoRA and ControlNet share."""

import pytest

from mlx_zimage import ZImagePipeline
from mlx_zimage.weights.hub import POCKET


@pytest.fixture(scope="module", autouse=True)
def nothing_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ZIMAGE_EMBEDDINGS", "off")
        yield


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(POCKET, dtype="float32")
