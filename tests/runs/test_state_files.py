"""Training state on disk."""

import torch

from pipeline.runs.state_files import load_state, save_state


def test_save_state_round_trips_types_and_bits(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(4, 5).to(torch.bfloat16)}},
        "groups": [{"lr": 1e-3, "betas": [0.9, 0.999], "name": None, "fused": True}],
        "n": 7,
    }
    save_state(tmp_path, "trainer", tree)
    back = load_state(tmp_path, "trainer")
    assert (
        torch.equal(back["state"][0]["m"], tree["state"][0]["m"])
        and back["state"][0]["m"].dtype == torch.bfloat16
    )
    assert torch.equal(back["state"][0]["step"], tree["state"][0]["step"])
    assert back["groups"] == tree["groups"] and back["n"] == 7
