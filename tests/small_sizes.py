"""Sizes of a detector that trains in seconds."""

SIZES = {
    "num_queries": 5,
    "d_model": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dim_feedforward": 32,
    "backbone": "conv:8-16",
}
