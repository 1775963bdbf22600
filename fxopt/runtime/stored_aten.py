"""Which operators of ATen a stored graph may call: those that check what they are given.

ATen has operators that leave the checks to their callers: some take offsets or indices on trust
and read or write wherever those point. A folder is untrusted, so only listed operators run: Core
ATen, which other compilers implement from its description, and the rest of what captures and
passes write. In-place forms check as much as the others and go by the same name; `out=` forms
resize what they write to and are left out.
"""

from typing import Any

import torch

# Core ATen that is left out: inner halves of other operators, which trust the sizes and indices
# that those have made, and views whose sizes `torch.compile` does not check.
_TRUSTING = ("_", "native_", "as_strided")

# Beyond Core ATen. What captures of tests/zoo.py hold is all here, and their like.
_LISTED = {
    "sizes and facts about them": """
        _assert_async _assert_scalar _assert_tensor_metadata item numel sym_constrain_range
        sym_constrain_range_for_size
    """,
    "making tensors": """
        empty_like empty_permuted eye lift_fresh_copy linspace new_empty new_full new_ones
        new_zeros ones ones_like rand_like randn_like zeros zeros_like
    """,
    "views, layouts and dtypes": """
        _to_copy _unsafe_view adjoint broadcast_tensors broadcast_to chunk conj contiguous detach
        expand_as flatten imag mH mT meshgrid moveaxis movedim narrow numpy_T ravel real reshape
        reshape_as resolve_conj resolve_neg split swapaxes swapdims t tensor_split to transpose
        type_as unbind unflatten unfold view_as view_as_complex view_as_real
    """,
    "putting together and taking apart": """
        argsort atleast_1d atleast_2d atleast_3d block_diag bucketize column_stack concat
        concatenate diag diag_embed diagonal_scatter dstack fliplr flipud hstack im2col index_add
        index_copy index_fill kthvalue masked_fill masked_select msort one_hot pad pixel_shuffle
        pixel_unshuffle put repeat_interleave roll rot90 stack take take_along_dim tile tril triu
        vstack
    """,
    "element by element": """
        __and__ __or__ __xor__ absolute addcdiv addcmul angle bitwise_left_shift
        bitwise_right_shift celu clamp_max clamp_min clip complex conj_physical copysign deg2rad
        divide erfc erfinv exp2 float_power floor_divide fmax fmin frac glu greater greater_equal
        hardshrink hardsigmoid hardswish heaviside hypot isclose isfinite isneginf isposinf isreal
        ldexp lerp less less_equal lgamma log_sigmoid logaddexp logaddexp2 logit mish multiply
        nan_to_num negative not_equal polar positive prelu rad2deg relu6 rsub selu sgn signbit
        silu sinc softplus softshrink square subtract threshold true_divide xlogy zero
    """,
    "reductions": """
        _log_softmax _softmax all aminmax count_nonzero cosine_similarity cummax cummin cumprod
        diff equal histc linalg_norm linalg_vector_norm log_softmax logcumsumexp logsumexp median
        nanmean nansum norm softmax std std_mean trace var_mean
    """,
    "products, convolutions and pooling": """
        addbmm addmv addr adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d baddbmm bilinear cdist conv1d conv2d conv3d
        conv_transpose1d conv_transpose2d conv_transpose3d cross dot einsum inner kron
        linalg_cross linalg_matmul linear matmul max_pool1d max_pool2d max_pool3d mv outer
        scaled_dot_product_attention tensordot upsample_bicubic2d upsample_linear1d
        upsample_nearest1d upsample_nearest3d upsample_trilinear3d vdot
    """,
    "norms, dropout and transforms": """
        batch_norm dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft
        fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
        fft_rfftn group_norm instance_norm layer_norm rms_norm
    """,
}
_OPERATORS = frozenset(" ".join(_LISTED.values()).split())


def may_be_stored(overload: Any) -> bool:
    """Whether a stored graph may call this operator of ATen."""
    name = str(overload).split(".")[1]
    in_place = name.endswith("_") and not name.endswith("__")
    if overload._schema.is_mutable and not in_place:
        return False
    name = name.removesuffix("_") if in_place else name
    return name in _OPERATORS or (_is_core(name) and not _trusts_its_caller(name))


def _trusts_its_caller(name: str) -> bool:
    return name.startswith(_TRUSTING) or name.endswith("_backward")


def _is_core(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.core in getattr(packet, each).tags for each in packet.overloads())
