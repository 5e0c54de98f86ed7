"""Feature maps to codes and back, out of pieces behind one interface.

    codebook     what a vector is replaced by: learned rows, rows of moving averages, signs, several under one index
    quantizer    how a map is walked: every cell once; again and again on the rest; coarse to fine
    layout       how the codes of a picture are arranged, apart from what predicts them

    quantizer(map) -> Quantized(codes, vectors, losses, partials)      quantizer.lookup(codes) -> map
"""
from diptych.parts.quantize.codebook import CodebookConfig, JointConfig, SignConfig, pack, unpack
from diptych.parts.quantize.codes import CodeLayout, Grid, Health, Quantized, health
from diptych.parts.quantize.residual import (
    MixConfig,
    ResidualConfig,
    ResidualQuantizer,
    draw_flips,
    flip_bits,
    resize,
    scale_inputs,
)
from diptych.parts.quantize.vector import LossWeights, VectorConfig, VectorQuantizer

AnyQuantizerConfig = VectorConfig | ResidualConfig
AnyQuantizer = VectorQuantizer | ResidualQuantizer

__all__ = ["AnyQuantizer", "AnyQuantizerConfig", "CodeLayout", "CodebookConfig", "Grid", "Health", "JointConfig",
           "LossWeights", "MixConfig", "Quantized", "ResidualConfig", "ResidualQuantizer", "SignConfig", "VectorConfig",
           "VectorQuantizer", "draw_flips", "flip_bits", "health", "pack", "resize", "scale_inputs", "unpack"]
