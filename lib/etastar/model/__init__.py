"""Floor 2: the decoder, its parametrization, and its twin in transformers."""
