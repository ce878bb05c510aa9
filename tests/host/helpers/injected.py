"""Faults within a rank, at a place that its parent orders. Imports nothing of the host: a rank must first be told its flags.

An order is a file in a folder that both know, named after the rank. It holds a kind and a place, and is gone when it is obeyed.
"""

import json
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import torch

SLOWER = 20  # times
JUMP = 3600.0  # seconds


class Injected:
    """What a rank does first: as ``settings`` say, and then what orders in ``folder`` say."""

    def __init__(self, settings, folder):
        self.settings, self.folder = settings, folder

    def __call__(self):
        orders = Orders(Path(self.folder, multiprocessing.current_process().name.rpartition("-")[2]))
        orders.obey("spawn")
        self.settings()
        from asyncdiff_nodes.engine import wire
        from asyncdiff_nodes.engine.rank import message_loop, split_model

        load, call, receive = split_model.SplitModel.load, message_loop.Rank._call, wire.receive

        def loading(model, name, tensor):
            orders.obey("weights")
            return load(model, name, tensor)

        def calling(rank, message, tensors):
            orders.rank, began = rank, time.monotonic()
            orders.obey(f"call {message.index}")
            call(rank, message, tensors)
            if orders.slow == message.run:
                time.sleep((SLOWER - 1) * (time.monotonic() - began))

        def receiving(conn):
            message, tensors = receive(conn)
            if isinstance(message, tuple) and message[0] == "close":
                orders.obey("shutdown")
            return message, tensors

        split_model.SplitModel.load, message_loop.Rank._call, wire.receive = loading, calling, receiving


class Orders:
    """Of one rank."""

    def __init__(self, file):
        self.file = file
        self.rank = None
        self.slow = -1  # the run that is to be slow

    def obey(self, place):
        """Do what is ordered for ``place``."""
        try:
            order = json.loads(self.file.read_text())
        except FileNotFoundError:
            return
        if order["place"] == place:
            self.file.unlink()
            getattr(self, order["kind"])()

    def sigkill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def sigsegv(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def exit_0(self):
        os._exit(0)

    def out_of_memory(self):
        torch.empty(2**60)

    def exception(self):
        """In whichever block is next; at once where there is none."""
        if self.rank is None:
            raise ArithmeticError("injected")
        from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

        def failing(*args, **kwargs):
            raise ArithmeticError("injected")

        ResBlock.forward = failing

    def pipe_closed(self):
        """In the middle of a message; and the process stays."""
        (conn,) = self.rank._send.args
        os.write(conn.fileno(), struct.pack("!i", 1000) + b"half of it")
        os.close(conn.fileno())
        time.sleep(3600)

    def hangs(self):
        time.sleep(3600)

    def suspended(self):
        """Until somebody wakes it."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def slower(self):
        self.slow = self.rank._run

    def clock_jumps(self):
        """An hour back, for good."""
        clock = time.time
        time.time = lambda: clock() - JUMP
