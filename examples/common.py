"""What both training scripts share: sizes, optimiser settings and the initial weights."""

import numpy as np

VOCAB, TIME, BATCH = 8192, 128, 8
WIDTH, HEADS, LAYERS = 192, 6, 2
LEARNING_RATE = 1e-3
NORM_EPSILON = 1e-6  # written out because the frameworks' defaults differ
IGNORE = -100  # the label of positions without one, as in PyTorch


def initial_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every matrix of the decoder as float32, [input, output]; the norms start at one in both frameworks."""
    shapes = {"token_embedding": (VOCAB, WIDTH), "position_embedding": (TIME, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"blocks.{layer}.qkv": (WIDTH, 3 * WIDTH),
            f"blocks.{layer}.out": (WIDTH, WIDTH),
            f"blocks.{layer}.up": (WIDTH, 4 * WIDTH),
            f"blocks.{layer}.down": (4 * WIDTH, WIDTH),
        }
    shapes["head"] = (WIDTH, VOCAB)
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
