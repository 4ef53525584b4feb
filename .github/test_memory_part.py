# SPDX-License-Identifier: MIT
"""To be merged into test_measure.py, whose test of --memory stays as it is."""
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def module(name):
    spec = importlib.util.spec_from_file_location(name, HERE / (name + ".py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("per_step", [1, 2, 4])
def test_attention_flops_count_the_pairs_that_the_mask_shows(per_step):
    """Of a trajectory and of what fills its row."""
    import torch

    measure = module("measure")
    dirl, P, L, fill = measure.dirl, 12, 20, 24
    steps = (torch.arange(L) % 4) // per_step + 1
    document = dirl.trajectory_document(torch.ones(P).long(), torch.ones(L).long(), steps, 4, 9)
    row = dirl.join([document], length=len(document["ids"]) + fill)
    i, sees = torch.arange(len(row["ids"])), dirl.mask_mod(row["doc"], row["view"], row["pos"] // 4)
    assert int(sees(0, 0, i[:, None], i).sum()) == measure.visible_pairs(P, L, 4 // per_step, fill)
