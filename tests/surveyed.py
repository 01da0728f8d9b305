"""Survey a group of ranks on this machine with an architecture of a few layers, and print the table.

python surveyed.py MODEL. In MODEL, {rank} is the rank.
"""

import sys

import mlx.core as mx

from mlx_zimage.bench import ARCHITECTURES
from mlx_zimage.distributed import Group
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.survey import survey, survey_table
from mlx_zimage.weights.checkpoint import open_checkpoint

ARCHITECTURES["tiny"] = (
    TransformerConfig(dim=128, n_layers=6, n_heads=1, cap_feat_dim=64),
    TextEncoderConfig(64, 128, 2, 2, 2, 32, vocab_size=512),
    VAEConfig(block_out_channels=(32, 32, 64, 64)),
)

if __name__ == "__main__":
    group = Group(mx.distributed.init(backend="ring", strict=True))
    found = survey(group, 128, 96, open_checkpoint(sys.argv[1].format(rank=group.rank)), "tiny")
    if group.leads:
        print(survey_table(found, 128, 96))
