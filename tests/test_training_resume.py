"""Training goes on from checkpoints and from exported files; needs the extra `train`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from training.networks import SPECS, PlaneNet  # noqa: E402
from training.train import state_of  # noqa: E402
from vidpipe.model.descriptor import find_model  # noqa: E402


@pytest.mark.parametrize("name", ["nano-2x", "clean-1x-fast", "clean-2x-fast", "quality-2x"])
def test_an_exported_file_is_taken_up_as_the_network_that_it_is(name: str, tmp_path: Path) -> None:
    path = find_model(name)
    state = state_of(path)
    assert (state["model"], state["steps"], state["trained_s"]) == (name, 0, 0.0)
    net = PlaneNet(SPECS[name])
    net.load_state_dict(state["average"])
    x = np.random.default_rng(0).random((1, 1, 32, 48), np.float32)
    feeds, strength = {"input": x}, None
    if SPECS[name].strength:
        feeds["strength"], strength = np.ones(1, np.float32), torch.ones(1)
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, feeds)
    with torch.no_grad():
        got = net(torch.from_numpy(x), strength).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    # A checkpoint of it is taken up alike.
    torch.save(state, tmp_path / "kept.pt")
    kept = state_of(tmp_path / "kept.pt")
    assert all(torch.equal(kept["average"][k], v) for k, v in state["average"].items())
