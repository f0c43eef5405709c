from concurrent.futures import ThreadPoolExecutor

import pytest

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.stages.preflight import check_packages, set_up


def test_many_may_set_up_in_one_folder_at_once(tmp_path):
    set_up(Config(run_dir=str(tmp_path)))  # transformers is imported by one
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(lambda _: set_up(Config(run_dir=str(tmp_path / "run"))), range(400)))
    assert not list(tmp_path.iterdir())


def test_a_missing_sae_is_said_before_the_model_is_loaded(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    config.sae.path = tmp_path / "nowhere"
    with pytest.raises(SaerlError, match="SAE .*nowhere does not exist"):
        set_up(config)
    assert not list(tmp_path.iterdir())


def test_settings_assigned_one_by_one_are_asked_again_whether_they_go_together():
    config = Config()
    config.train.rollout.engine = "vllm"
    config.train.lora.rank = 4
    with pytest.raises(SaerlError, match="set train.lora.rank=0"):
        check_packages(config)
