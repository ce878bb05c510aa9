"""Which streams of windows of frames go on."""

from asyncdiff_nodes.host.routing.frame_windows import Windows


def test_windows_that_stay_are_one_stream_each():
    windows = Windows()
    found = [windows.stream(name, timestep) for timestep in (900.0, 500.0, 100.0) for name in "ab"]
    assert len({stream for stream, _ in found}) == 2 and not any(gone for _, gone in found)
    assert windows.turn == 3


def test_those_that_were_left_out_of_a_step_are_let_go_and_begin_anew():
    windows = Windows()
    first = [windows.stream(name, 900.0)[0] for name in "ab"]
    assert windows.stream("b", 500.0) == (first[1], [])
    second, gone = windows.stream("c", 100.0)
    assert gone == first[:1] and second not in first
    again, gone = windows.stream("a", 100.0)
    assert again not in (*first, second) and gone == []
