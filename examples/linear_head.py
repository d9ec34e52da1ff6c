"""Loss and gradients of a head with and without its logits: `python -m examples.linear_head --framework torch`."""

import argparse

import numpy as np


def in_torch(hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, chunk_bytes: int) -> tuple[list, list]:
    """[loss, dhidden, dweight] from whole logits, and from chunks."""
    import torch

    from torch_api import cross_entropy, linear_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, w = (torch.from_numpy(x).to(device).requires_grad_() for x in (hidden, weight))
    y = torch.from_numpy(labels).to(device)
    results = []
    for loss in (cross_entropy(h @ w.T, y), linear_cross_entropy(h, w, y, max_logits_bytes=chunk_bytes)):
        arrays = (loss, *torch.autograd.grad(loss, (h, w)))
        results.append([x.detach().cpu().numpy() for x in arrays])
    return results[0], results[1]


def in_jax(hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, chunk_bytes: int) -> tuple[list, list]:
    """The same, with the weight as an embedding table [V, D]."""
    import jax
    import jax.numpy as jnp

    from jax_api import cross_entropy, linear_cross_entropy

    def whole(h, w):
        return cross_entropy(h @ w.T, jnp.asarray(labels))

    def in_chunks(h, w):
        return linear_cross_entropy(h, w, jnp.asarray(labels), class_axis=0, max_logits_bytes=chunk_bytes)

    results = []
    for function in (whole, in_chunks):
        loss, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(jnp.asarray(hidden), jnp.asarray(weight))
        results.append([np.asarray(x) for x in (loss, *gradients)])
    return results[0], results[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["torch", "jax"], default="torch")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=4000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(options.rows, 64)).astype(np.float32)
    weight = (rng.normal(size=(options.classes, 64)) / 8).astype(np.float32)
    labels = rng.integers(0, options.classes, options.rows)
    chunk_bytes = 128 * options.classes * 4  # 128 rows of float32 logits
    run = in_torch if options.framework == "torch" else in_jax
    whole, chunked = run(hidden, weight, labels, chunk_bytes)
    print(f"logits: {options.rows * options.classes * 4 / 2**20:.1f} MiB, a chunk: {chunk_bytes / 2**20:.1f} MiB")
    print(f"loss: {whole[0]:.6f} from whole logits, {chunked[0]:.6f} in chunks")
    for name, x, y in zip(("hidden", "weight"), whole[1:], chunked[1:], strict=True):
        print(f"gradient of {name} within {np.abs(x - y).max() / np.abs(x).max():.1e} of its largest element")


if __name__ == "__main__":
    main()
