r"""Adapters whose training started from a part of the base matrix: PiSSA and OLoRA.

Such a start takes a part W_0 of rank r out of each adapted matrix W and gives it to the adapter. PEFT stores neither
W - W_0 nor W_0: loading the adapter, it computes W_0 from W again,

    pissa    U_r S_r V_r of the singular value decomposition
    olora    s Q_r R_r of the QR decomposition W^T = Q R (rows and columns as in PEFT, `[out, in]`)

and adds s A B to W - W_0. That is a LoRA of rank 2 r on W itself, [A, A_0] and [B; -B_0] with s A_0 B_0 = W_0, as PEFT
converts it too. Both W_0 are unique (signs cancel), unless singular values coincide or columns are dependent.

PiSSA: Meng et al. 2024, arXiv 2404.02948. OLoRA: Büyükakyüz 2024, arXiv 2406.01775.
"""

from __future__ import annotations

import math

import numpy as np

from methods.adapters.peft_folder import Module

_APART = 1e-6  # what PEFT, in float32, can tell apart, as a share of the largest


def subtracted(module: Module, kernel: np.ndarray, start: str, rslora: bool, name: str) -> Module:
    """The adapter of the matrix as it came, `[in, out]`, that does what `module` does to the one without W_0.

    Raises:
      ValueError: if W_0 is not unique, or the rank is above the matrix's.
    """
    rank = module.a.shape[1]
    factor = module.alpha / (math.sqrt(rank) if rslora else rank)
    weight = np.asarray(kernel, np.float64).T
    if rank > min(weight.shape):
        raise ValueError(f"{name} has no start of rank {rank} for init_lora_weights='{start}': it is {weight.shape}.")
    if start == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        apart = values[rank - 1] - (values[rank] if rank < len(values) else 0)
        unique = apart > _APART * values[0]
        root = np.sqrt(values[:rank] / factor)
        a, b = right[:rank].T * root, root[:, None] * left[:, :rank].T
    else:
        q, r = np.linalg.qr(weight)
        size = np.abs(np.diagonal(r))[:rank]
        unique = (size > _APART * np.linalg.norm(weight)).all()
        a, b = r[:rank].T, q[:, :rank].T
    if not unique:
        raise ValueError(
            f"The start of init_lora_weights='{start}' at {name} is not unique, for directions of the matrix are of "
            "one length: save the adapter in PEFT with path_initial_model_for_weight_conversion."
        )
    dtype = module.a.dtype
    return Module(
        np.concatenate([module.a, a.astype(dtype)], axis=1),
        np.concatenate([module.b, -b.astype(dtype)]),
        module.m,
        module.alpha * (math.sqrt(2) if rslora else 2),
    )
