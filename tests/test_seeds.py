from saerl_fast.rl.seeds import derived_seed


def test_seeds_differ_by_purpose_step_and_draw() -> None:
    seeds = {derived_seed(0, purpose, step, draw) for purpose in (1, 2) for step in (0, 1) for draw in (0, 1)}
    assert len(seeds) == 8 and derived_seed(0, 1, 1) == derived_seed(0, 1, 1, 0)
