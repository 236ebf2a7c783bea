"""The shapes of a layer are declared for the very fields that hold it."""

from dataclasses import fields

from tiny_model import random_model

from river_ext.loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights


def test_every_field_has_its_shape():
    model = random_model(biases=True, qk_norm=True)
    shape = BlockShape.of(model.config)
    for weights, shapes in ((model.weights.layers[1], shape.tensors()), (model.river[1], shape.tiles())):
        assert {name: tuple(tensor.shape) for name, tensor in vars(weights).items()} == shapes


def test_no_field_lacks_a_shape():
    shape = BlockShape.of(random_model().config)
    assert {field.name for field in fields(DecoderBlockWeights)} == shape.tensors().keys()
    assert {field.name for field in fields(ExitLayerWeights)} == shape.tiles().keys()
