"""Static int8 by the quantisers of others, one file for each: weights and activations in eight bits."""
