"""The reused buffer: one for each thread, grown when needed, writable outside of inference mode."""

from __future__ import annotations

import threading

import torch

from inlay.kernels.scratch import release_scratch, scratch

CPU = torch.device("cpu")


def test_memory_is_reused_and_grows() -> None:
    release_scratch()
    small = scratch(10, torch.float32, CPU).data_ptr()
    assert scratch(20, torch.bfloat16, CPU).data_ptr() == small
    assert scratch(1000, torch.float32, CPU).numel() == 1000
    assert scratch(5, torch.float32, CPU).data_ptr() == scratch(1000, torch.float32, CPU).data_ptr()
    release_scratch()


def test_each_thread_has_its_own() -> None:
    mine, others = scratch(10, torch.float32, CPU).data_ptr(), []
    thread = threading.Thread(target=lambda: others.append(scratch(10, torch.float32, CPU).data_ptr()))
    thread.start()
    thread.join()
    assert others != [mine]


def test_a_buffer_first_needed_in_inference_mode_serves_training() -> None:
    release_scratch()
    with torch.inference_mode():
        scratch(10, torch.float32, CPU).fill_(1)
    scratch(10, torch.float32, CPU).fill_(2)
    release_scratch()
