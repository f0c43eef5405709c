from .._torch import decode_grads, encode_threshold, encode_topk, sparse_decode, topk  # noqa: F401
