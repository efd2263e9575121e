"""What a quantization says about itself."""

from mllm_edge.cli.proof import _rounding


def test_it_says_whether_calibration_paid() -> None:
    assert _rounding({"against_rounding": None}) == ""
    paid = _rounding({"against_rounding": [0.2, 0.9, 0.1]})
    assert paid == "decoder on samples held apart: KL 0.2 as calibrated, 0.9 rounded to nearest (difference ± 0.1)"
    lost = _rounding({"against_rounding": [2.4, 0.9, 0.3]})
    assert lost.startswith("decoder on samples held apart: KL 2.4 as calibrated, 0.9")
    assert "the decoder is rounded" in lost
    assert "--recipe int8" in lost
    unclear = _rounding({"against_rounding": [0.0020, 0.0012, 0.0009]})
    assert "is rounded" not in unclear
