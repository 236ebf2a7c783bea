"""Random weights of a network, as benchmarks take them: `river_ext.random_model` draws them."""

import torch

from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig
from river_ext.random_model import dense_weight, packed_weight, random_river, random_weights

__all__ = ["dense_weight", "packed_weight", "random_network", "random_river", "random_weights"]


def random_network(config: ModelConfig, device: str = "cuda") -> Network:
    with torch.device(device):
        return Network(config, random_weights(config), random_river(config))
