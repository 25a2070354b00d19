from __future__ import annotations

import os
import signal
import threading

import pytest

from pretrain.engine.session import preempt
from pretrain.engine.session.preempt import SAVE, STOP, Watch


@pytest.fixture
def watch(tmp_path):
    watch = Watch(tmp_path, rank=0)
    yield watch
    watch.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_to_stop_and_interrupts_nothing(watch, number):
    assert watch.poll() == 0
    os.kill(os.getpid(), number)
    assert watch.poll() == STOP
    assert watch.poll() == STOP, "the request stays until the step's edge has seen it"
    assert watch.reason == signal.Signals(number).name


def test_a_second_ctrl_c_interrupts_at_once(watch):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_folder_that_is_gone_is_an_error(watch, tmp_path, replaced):
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    if replaced:
        tmp_path.mkdir()
    with pytest.raises(FileNotFoundError, match="removed or replaced while the run wrote to it"):
        watch.poll()


def test_outside_the_main_thread_signals_keep_their_handlers_and_files_count(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def listen() -> None:
        watch = Watch(tmp_path, rank=0)
        (tmp_path / "stop").touch()
        found.append(watch.poll())
        watch.close()

    found: list[int] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [STOP] and signal.getsignal(signal.SIGTERM) is before


def test_a_file_is_one_request(watch, tmp_path):
    (tmp_path / "save").touch()
    assert watch.poll() == SAVE
    (tmp_path / "stop").touch()
    assert watch.poll() == 0, "the disk is looked at once a second at most"
    watch._next_look = 0.0
    assert watch.poll() == STOP
    assert not list(tmp_path.iterdir())


def test_only_rank_0_looks_at_files(tmp_path):
    (tmp_path / "stop").touch()
    watch = Watch(tmp_path, rank=1)
    try:
        assert watch.poll() == 0
    finally:
        watch.close()
    assert (tmp_path / "stop").exists()


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    watch = Watch(tmp_path, rank=0)
    assert signal.getsignal(signal.SIGTERM) != before
    watch.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_markers_say_how_a_run_ended(tmp_path):
    preempt.mark(tmp_path, "PREEMPTED", "step 7")
    assert (tmp_path / "PREEMPTED").read_text() == "step 7\n"
    preempt.unmark(tmp_path)
    preempt.mark(tmp_path, "DONE")
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
    with pytest.raises(ValueError, match="FINISHED"):
        preempt.mark(tmp_path, "FINISHED")
