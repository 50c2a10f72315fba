"""A quick part of tests/evidence/fuzz.py: 100 hostile inputs, each of which ends in success or in one sentence."""
import pytest
from evidence import fuzz


@pytest.mark.slow
def test_hostile_input_ends_in_success_or_one_sentence(tmp_path):
    counts, failures = fuzz.attack(100, "quick", tmp_path)
    assert not failures, "\n".join(failures)
    assert len(counts) == len(fuzz.KINDS) and min(map(sum, counts.values())) >= 2
