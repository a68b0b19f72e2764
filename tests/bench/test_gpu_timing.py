import pytest
import torch

from vitrify.bench import gpu_timing, timing
from vitrify.bench.registry import Check, Contender
from vitrify.bench.roofline import Cost

CUDA = torch.device("cuda")


def contender(run, timed="graph"):
    return Contender("one", run, lambda _: Check(0, 0, "nothing"), Cost(0, 0), timed)


@pytest.fixture
def clock(monkeypatch):
    """Stand in for a GPU on which each call takes 0.3 ms, and the host 0.01; return the waits that were asked for."""
    waits, made = [], []

    def row_ms(launch, launch_ms, device):
        waits.append(launch_ms)
        made.clear()
        launch()
        return 0.3 * len(made)

    monkeypatch.setattr(gpu_timing, "_row_ms", row_ms)
    monkeypatch.setattr(gpu_timing, "_host_ms", lambda launch, device: (made.clear(), launch(), 0.01 * len(made))[-1])
    return waits, made


@pytest.mark.parametrize(
    ("call_ms", "inputs", "calls"),
    [(5.0, 1, 1), (5.0, 4, 4), (0.3, 3, 6), (0.25, 4, 4), (0.001, 2, 128), (0.001, 3, 129), (0.0, 1, 128)],
)
def test_rows_take_a_millisecond_and_use_each_input_as_often(call_ms, inputs, calls):
    assert gpu_timing.calls_in_a_row(call_ms, inputs) == calls


def test_captured_calls_are_replayed_and_counted(clock, monkeypatch):
    waits, made = clock
    captured = []

    class Graph:
        def replay(self):
            made.extend(captured)

    def capture(launch, device):
        made.clear()
        launch()
        captured.extend(made)
        return Graph()

    monkeypatch.setattr(gpu_timing, "_capture", capture)
    measure, how = gpu_timing.timer(contender(made.append), "abc", CUDA)
    assert captured == list("abcabc")  # 4 calls take a millisecond; 6 use every input twice
    assert how == "graph of 6 calls"
    assert measure(0) == pytest.approx(0.3)
    assert waits[-1] == gpu_timing.GRAPH_LAUNCH_MS


def test_what_cannot_be_captured_is_called_in_a_loop_that_says_why(clock, monkeypatch):
    waits, made = clock

    def capture(launch, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(gpu_timing, "_capture", capture)
    measure, how = gpu_timing.timer(contender(made.append), "abc", CUDA)
    assert how == "loop of 6 calls (not captured: operation not permitted when stream is capturing)"
    assert measure(3) == pytest.approx(0.3)
    assert made == list("abcabc")
    assert waits[-1] == pytest.approx(0.06)  # as long as the host needs for six


def test_what_waits_for_the_gpu_is_not_captured_and_models_are_called_one_at_a_time(clock, monkeypatch):
    monkeypatch.setattr(gpu_timing, "_capture", lambda launch, device: pytest.fail("captured"))
    assert gpu_timing.timer(contender(clock[1].append, "loop"), "abc", CUDA)[1] == "loop of 6 calls"
    monkeypatch.setattr(timing, "_time_ms", lambda run, argument, device: (run(argument), 7.0)[1])
    calls = []
    measure, how = gpu_timing.timer(contender(calls.append, "call"), "abc", CUDA)
    assert how == "single calls"
    assert measure(1) == 7.0
    assert calls == ["b"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_short_calls_take_less_than_their_launches_and_waits_are_called_in_a_loop():
    inputs = [torch.randn(1024, device="cuda") for _ in range(2)]
    measure, how = gpu_timing.timer(contender(lambda x: x + 1), inputs, CUDA)
    assert how == f"graph of {gpu_timing.MAX_CALLS} calls"
    assert 0 < measure(0) < timing.single_calls(lambda x: x + 1, inputs, CUDA)(0)
    assert gpu_timing.timer(contender(lambda x: x.sum().item(), "loop"), inputs, CUDA)[0](0) > 0
    large = [torch.randn(4096, 4096, device="cuda")]
    both = [gpu_timing.timer(contender(lambda x: x @ x, timed), large, CUDA)[0](0) for timed in ("graph", "loop")]
    assert both[0] == pytest.approx(both[1], rel=0.2)  # a long call is as long in either way
