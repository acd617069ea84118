"""Merge of two partial attentions over disjoint sets of tokens."""

from torch import Tensor

from sparsed.kernels import reference


def merge_states(
    o_a_BHGD: Tensor, lse_a_BHG: Tensor, o_b_BHGD: Tensor, lse_b_BHG: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of tokens, from the result over each.

    Plain torch on every device: two small tensors, a step reads them once.

    Shapes: o (B, H, G, D) float32, normalised over its own set; lse (B, H, G) float32, natural
    log of the sum of exponentials, -inf for an empty set (then its o must be finite). Returns
    the merged pair; two empty sets give o = 0, lse = -inf.
    Errors: AssertionError on other shapes.
    Source: the log-sum-exp merge of FlashDecoding and of FlashInfer, arXiv 2501.01005.
    """
    assert o_a_BHGD.shape == o_b_BHGD.shape
    assert lse_a_BHG.shape == lse_b_BHG.shape == o_a_BHGD.shape[:-1]
    return reference.merge_states(o_a_BHGD, lse_a_BHG, o_b_BHGD, lse_b_BHG)
