"""What is said of a river's errors, against the weights that were quantised."""

import pytest
import torch
from conftest import write_tiny_checkpoint

from river_ext import ops
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.weights import BlockShape
from river_ext.quant import quality
from river_ext.quant.exit_river import build_river
from river_ext.quant.hqq import quantize
from river_ext.quant.quality import dense_projections


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 100, "head_dim": 6, "num_attention_heads": 5,
                                          "num_key_value_heads": 1}])  # fmt: skip
def test_quantisation_errors(tmp_path, monkeypatch, changes):
    """Every projection and the head, padded or not, is what was quantised."""
    checkpoint = load_checkpoint(write_tiny_checkpoint(tmp_path, num_hidden_layers=2, **changes))
    river = build_river(checkpoint.config, checkpoint.weights, progress=False)
    monkeypatch.setattr(quality, "STRIPS_AT_A_TIME", 2)
    errors = quality.quantisation_errors(checkpoint.config, checkpoint.weights, river)
    shape = BlockShape.of(checkpoint.config)
    assert errors.keys() == shape.projections().keys() | {"lm_head"}
    head = checkpoint.weights.lm_head
    stored = ops.dequantize_w4(ops.pack_w4(*quantize(head)), *head.shape, torch.float32)
    expected = (head - stored).square().sum() / head.square().sum()
    assert errors["lm_head"] == pytest.approx(float(expected), rel=1e-4)
    for name in shape.projections():
        squares, total = 0.0, 0.0
        for block, exit_layer in zip(checkpoint.weights.layers, river, strict=True):
            weight = getattr(block, name)
            packed = ops.pack_w4(*quantize(weight))
            expected = ops.dequantize_w4(packed, *weight.shape, torch.float32)
            torch.testing.assert_close(dense_projections(exit_layer, shape)[name], expected)
            squares, total = squares + (weight - expected).square().sum(), total + weight.square().sum()
        assert errors[name] == pytest.approx(float(squares / total), rel=1e-4)
        assert 0 < errors[name] < 0.02
