"""Offloaded backbone layers on a GPU: they lie in pinned host memory, and stream in where a token runs them.

A layer comes through one of two buffers on the device, those of even and of odd layers, so that the next one
is copied while a layer computes:

    copies     | layer 4 | layer 5 | layer 6 | layer 7
    computes             | layer 4 | layer 5 | layer 6 ...
    buffer      0         1         0         1

The next layer is copied only where it is certain to run: a copy takes tens of times as long as a layer of a
decoding step, and one that nobody needs would delay those that somebody does. What a buffer holds stays
there, for the next token that comes so deep. On a CPU nothing of this is needed: offloaded layers are views
of the mapped file, and the kernel reads their pages and drops them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..loading.config import ModelConfig
from ..loading.weights import BlockShape, DecoderBlockWeights, ModelWeights
from .network import Layer, Network


class Buffer:
    """Memory for the matrices of one layer."""

    def __init__(self, like: DecoderBlockWeights, shape: BlockShape, device: torch.device):
        self.matrices: dict[str, Tensor] = {
            name: torch.empty_like(getattr(like, name), device=device) for name in shape.projections()
        }
        self.holds: int | None = None  # the layer
        # streams that were given work on it since its last copy; at first the one that its memory comes from
        self.users = {torch.cuda.current_stream(device)}

    def fill(self, index: int, weights: DecoderBlockWeights, stream: torch.cuda.Stream) -> None:
        """Copies a layer's matrices, on a stream, once all work that reads the ones before is done."""
        for user in self.users:
            stream.wait_stream(user)
        self.users.clear()
        self.holds = None  # an interrupt may come while the copies are given out
        with torch.cuda.stream(stream):
            for name, matrix in self.matrices.items():
                matrix.copy_(getattr(weights, name), non_blocking=True)
        self.holds = index


class StreamedLayer(Layer):
    """A layer whose matrices are where a buffer is: those of this layer once they are fetched.

    Where the device decides, no row may come to its decoder block. The kernels guess, though, and copy the
    beginning of dense weights ahead: of a resident layer's, which no stream overwrites.
    """

    def __init__(self, layer: Layer, config: ModelConfig, matrices: dict[str, Tensor], resident: Layer):
        super().__init__(layer.index, config, replace(layer.weights, **matrices), layer.river)
        self._both |= resident._dense


class StreamedNetwork(Network):
    """A network as one engine runs it, with buffers of the engine's own; all else is the network's."""

    def __init__(self, network: Network):
        vars(self).update(vars(network))
        self.first_fetched = self.config.resident_layers
        resident = network.layers[: self.first_fetched]
        self._offloaded = network.layers[self.first_fetched :]
        self._copies = torch.cuda.Stream(self.device)
        shape = BlockShape.of(self.config)
        self._buffers = [Buffer(layer.weights, shape, self.device) for layer in self._offloaded[:2]]
        self.layers = resident + [
            StreamedLayer(layer, self.config, self._buffer(layer.index).matrices, resident[0])
            for layer in self._offloaded
        ]

    def fetch(self, index: int, depth: int) -> None:
        if index >= self.first_fetched:
            self._copy(index)
            users, stream = self._buffer(index).users, torch.cuda.current_stream(self.device)
            if stream not in users:  # else it has waited, and may go on while the next layer is copied
                stream.wait_stream(self._copies)
                users.add(stream)
        if (following := max(index + 1, self.first_fetched)) < depth:
            self._copy(following)

    def synchronise(self) -> None:
        self._copies.synchronize()

    def _buffer(self, index: int) -> Buffer:
        return self._buffers[(index - self.first_fetched) % len(self._buffers)]

    def _copy(self, index: int) -> None:
        """Into its buffer, unless that holds the layer."""
        if self._buffer(index).holds != index:
            layer = self._offloaded[index - self.first_fetched]
            self._buffer(index).fill(index, layer.weights, self._copies)


def network_of_engine(network: Network) -> Network:
    """What an engine runs: the network itself, unless layers of it are to be streamed to a GPU."""
    return StreamedNetwork(network) if streams(network) else network


def streams(network: Network) -> bool:
    layers = network.config.num_hidden_layers
    return network.device.type == "cuda" and (network.config.resident_layers or layers) < layers


class OnDevice(Sequence):
    """Decoder blocks, each brought to a device when it is asked for, and for as long as it is used."""

    def __init__(self, blocks: Sequence[DecoderBlockWeights], device: torch.device):
        self.blocks, self.device = blocks, device

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> DecoderBlockWeights:
        tensors = vars(self.blocks[index]).items()
        return DecoderBlockWeights(
            **{name: None if tensor is None else tensor.to(self.device) for name, tensor in tensors}
        )


def weights_on_device(weights: ModelWeights) -> ModelWeights:
    """For who goes through the layers one by one, as quantising does."""
    return replace(weights, layers=OnDevice(weights.layers, weights.embed_tokens.device))
