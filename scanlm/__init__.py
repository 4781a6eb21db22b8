"""scanlm: a Transformer language model whose long-range memory is a parallel prefix scan."""
