"""What a quantization says about itself."""

from mllm_edge.cli.proof import _rounding


def test_it_says_whether_calibration_paid() -> None:
    assert _rounding({"against_rounding": None}) == ""
    paid = _rounding({"against_rounding": [0.2, 0.9]})
    assert paid == "decoder on samples held apart: KL 0.2 as calibrated, 0.9 rounded to nearest"
    lost = _rounding({"against_rounding": [2.4, 0.9]})
    assert lost.startswith("decoder on samples held apart: KL 2.4 as calibrated, 0.9")
    assert "the decoder is rounded" in lost
    assert "--recipe int8" in lost
