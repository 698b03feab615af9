"""Jobs side by side: order, bits, errors, threads, and how many run ahead."""

import threading

import pytest
import torch

from lost.config.model import LostConfig
from lost.model.lost_init import factorise
from lost.model.workers import run_side_by_side


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_in_order_with_one_torch_thread_each(num_threads):
    inside = list(run_side_by_side(lambda i=i: (i, torch.get_num_threads()) for i in range(20)))
    assert inside == [(i, 1) for i in range(20)]
    assert torch.get_num_threads() == num_threads
    assert threads_of_a_new_thread() == num_threads


def test_an_error_comes_out_and_the_threads_are_back(num_threads):
    def fail():
        raise ValueError("third")

    jobs = [lambda: 1, lambda: 2, fail, lambda: 4]
    taken = []
    with pytest.raises(ValueError, match="third"):
        taken.extend(run_side_by_side(jobs))
    assert torch.get_num_threads() == threads_of_a_new_thread() == num_threads


def test_only_as_many_jobs_as_threads_run_ahead(num_threads):
    started = []
    results = run_side_by_side(lambda i=i: started.append(i) for i in range(20))
    next(results)
    assert len(started) <= num_threads + 1
    results.close()


def test_bits_do_not_depend_on_the_number_of_threads():
    weight = torch.randn(300, 260, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    made = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        jobs = [lambda: factorise(weight, LostConfig(lost_rank=50), 50, 7)] * 2
        made[count] = list(run_side_by_side(jobs))
    torch.set_num_threads(before)
    for first, second in zip(made[1], made[2], strict=True):
        assert torch.equal(first.low_rank_down, second.low_rank_down)
        assert torch.equal(first.low_rank_up, second.low_rank_up)
