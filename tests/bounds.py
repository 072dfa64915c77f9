"""How far two ways of computing the same numbers may lie apart: from dtype and length of the sums.

A sum of n terms is off by at most n u of the sum of its terms' sizes, whatever the order (u = eps / 2; Higham, Accuracy
and Stability of Numerical Algorithms, section 4.2), so two orders differ by at most n eps of it.
"""

import torch


def of_sum(dtype: torch.dtype, terms: int, size: float = 1.0) -> float:
    """The most by which two sums of `terms` numbers in `dtype` differ; `size` is the sum of the numbers' magnitudes."""
    return torch.finfo(dtype).eps * terms * size


def of_roundings(dtype: torch.dtype, roundings: int = 1) -> float:
    """The most, relative to the largest value, by which `roundings` results in a row, each rounded to `dtype`, differ.

    For sums that are formed in a wider type. Roundings are independent, so they add up as a random walk does.
    """
    return torch.finfo(dtype).eps * roundings**0.5


def of_chain(dtype: torch.dtype, length: int, products: int) -> float:
    """The like, relative to the largest value, for `products` matrix products in a row, sums of `length` terms each.

    The terms of a product are taken to be about as large together as its largest value: of random weights they are
    sqrt(length) times as large, and their roundings, which are random too, add up to as much less.
    """
    return of_sum(dtype, length * products)


def products_of(config: dict) -> int:
    """Matrix products between a LLaMA's tokens and its logits, norms counted as such: B A of a layer are two."""
    return config["num_hidden_layers"] * (2 * 2 + 2 + 2 * 2 + 2) + 2


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Every value within `bound` of the largest expected one."""
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=bound * size)


def same_logits(found: torch.Tensor, expected: torch.Tensor, config: dict, dtype: torch.dtype = torch.float32) -> None:
    """Logits of two forms of one LLaMA of that config, computed in `dtype` (sums of a narrow one in fp32)."""
    longest, products = max(config["hidden_size"], config["intermediate_size"]), products_of(config)
    bound = of_chain(dtype, longest, products) if dtype == torch.float32 else of_roundings(dtype, products)
    close(found, expected, bound)


def check_sums(found: torch.Tensor, exact: torch.Tensor, sizes: torch.Tensor) -> None:
    """Sums of terms of random sign, formed in fp32 and rounded once to found's dtype, against float64.

    `sizes` are the sums of the terms' magnitudes. After k of n terms of size s a sum is about sqrt(k) s, so n roundings
    of it add up to 0.4 n s u (standard deviation): 8 eps of n s is twenty times that, and a lost term is 1 / n of it.
    """
    rounding = torch.finfo(found.dtype).eps * exact.abs()
    allowed = rounding + 8 * torch.finfo(torch.float32).eps * sizes
    apart = (found.double() - exact).abs()
    assert (apart <= allowed).all(), f"off by up to {float((apart / allowed).max()):.3g} of what is allowed"
