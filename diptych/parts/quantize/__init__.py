"""Feature maps to codes and back, out of pieces behind one interface.

    codebook     what a vector is replaced by: learned rows, rows moved by averages, signs, pairs under one index
    quantizer    how a map is walked with it: every cell once, again and again on the rest, from coarse scales to fine
    layout       how the codes of a picture are arranged, apart from what predicts them

    Quantizer:  quantizer(map) -> Quantized(codes, vectors, losses, partials);  quantizer.lookup(codes) -> map
"""
from diptych.parts.quantize.codebook import Codebook, CodebookConfig, JointCodebook, JointConfig, SignCodebook, SignConfig
from diptych.parts.quantize.codes import CodeLayout, Health, Quantized, health
from diptych.parts.quantize.vector import LossWeights, VectorConfig, VectorQuantizer

AnyQuantizerConfig = VectorConfig

__all__ = ["AnyQuantizerConfig", "CodeLayout", "Codebook", "CodebookConfig", "Health", "JointCodebook", "JointConfig", "LossWeights", "Quantized",
           "SignCodebook", "SignConfig", "VectorConfig", "VectorQuantizer", "health"]
