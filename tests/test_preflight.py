from concurrent.futures import ThreadPoolExecutor

from saerl_fast.config import Config
from saerl_fast.stages.preflight import set_up


def test_many_may_set_up_in_one_folder_at_once(tmp_path):
    set_up(Config(run_dir=str(tmp_path)))  # transformers is imported by one
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(lambda _: set_up(Config(run_dir=str(tmp_path / "run"))), range(400)))
    assert not list((tmp_path / "run").iterdir())
