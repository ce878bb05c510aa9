"""A simulated accelerator: three devices of a kind that PyTorch knows as ``sim`` or otherwise, which compute on the CPU.

It is as strict as hardware is:

* an operation on tensors of two devices raises; so does one on another device than the thread's current one in a process that has
  one device of its own, where CUDA would open a context on the first card;
* a copy that the host does not wait for is late: one to the host leaves NaN in its target until the stream, or an event after it,
  is waited for; one from pinned memory reads its source when the next kernel starts;
* an event that was not reached cannot be timed;
* memory is limited, for all processes together, each of which also takes :data:`CONTEXT_BYTES` on every device that it uses.

Importing this module registers it, in a rank as well: there :func:`prepare` is unpickled with the first message.
"""

import fcntl
import math
import mmap
import os
import random
import struct
import tempfile
import threading
import time
import types
import weakref
from collections import deque

import psutil
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

KIND = os.environ.setdefault("ASYNCDIFF_SIM_KIND", "sim")
COUNT = 3
BUDGET = int(os.environ.setdefault("ASYNCDIFF_SIM_BUDGET", str(2 * 2**30)))
CONTEXT_BYTES = 8 * 2**20
LATE = float("nan")


class _Here(threading.local):
    device = 0  # the thread's current one


_here = _Here()
_own: set[int] = set()  # the device of a process that is a rank


# -- memory, of all processes ---------------------------------------------------------------------------------------------


class _Ledger:
    """Bytes that each process has, and had at most, on each device, in a file that all map; what a dead one had is free."""

    _ROW = struct.Struct(f"{1 + 2 * COUNT}q")
    _ROWS = 256

    def __init__(self):
        path = os.environ.get("ASYNCDIFF_SIM_LEDGER")
        if path is None:
            file, path = tempfile.mkstemp(prefix="sim-ledger-")
            os.ftruncate(file, self._ROWS * self._ROW.size)
            os.environ["ASYNCDIFF_SIM_LEDGER"] = path
            weakref.finalize(self, _remove, path, os.getpid())
        else:
            file = os.open(path, os.O_RDWR)
        self._lock, self._given = threading.Lock(), deque()
        self._file, self._map = file, mmap.mmap(file, self._ROWS * self._ROW.size)

    def used(self, device, by_others=False):
        """Bytes of all processes, or of all but this one."""
        return sum(row[1 + device] for _, row in self._rows() if not by_others or row[0] != os.getpid())

    def own(self, device):
        """Bytes of this process."""
        return self.used(device) - self.used(device, by_others=True)

    def peaks(self, pid):
        """The most bytes that a process had of each device since :meth:`restart`, or its beginning."""
        return next(row[1 + COUNT :] for _, row in self._rows() if row[0] == pid)

    def restart(self):
        """Have peaks of all processes begin anew; nobody may compute meanwhile."""
        for number, row in self._rows():
            self._ROW.pack_into(self._map, number * self._ROW.size, *row[: 1 + COUNT], *row[1 : 1 + COUNT])

    def take(self, device, nbytes):
        """Take so many bytes."""
        with self._lock:
            self._add(device, nbytes)
        self._settle()

    def give(self, device, nbytes):
        """Give them back: called wherever a thread happens to free something, even in the midst of :meth:`take`."""
        self._given.append((device, nbytes))
        self._settle()

    def _settle(self):
        while self._given and self._lock.acquire(blocking=False):
            try:
                device, nbytes = self._given.popleft()
                self._add(device, -nbytes)
            finally:
                self._lock.release()

    def _add(self, device, nbytes):
        fcntl.lockf(self._file, fcntl.LOCK_EX)  # of a process: those that were forked share the file
        try:
            rows = list(self._rows())
            mine = next((number for number, row in rows if row[0] == os.getpid()), None)
            own = [os.getpid(), *[0] * 2 * COUNT]
            if mine is None:
                taken = {number for number, _ in rows}
                mine = next(number for number in range(self._ROWS) if number not in taken)
            else:
                own = list(dict(rows)[mine])
            more = nbytes + (CONTEXT_BYTES if own[1 + device] == 0 and nbytes > 0 else 0)
            if more > 0 and sum(row[1 + device] for _, row in rows) + more > BUDGET:
                raise torch.OutOfMemoryError(f"{KIND}:{device} is out of memory: {nbytes} bytes were asked for")
            own[1 + device] += more
            own[1 + COUNT + device] = max(own[1 + COUNT + device], own[1 + device])
            self._ROW.pack_into(self._map, mine * self._ROW.size, *own)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _rows(self):
        for number in range(self._ROWS):
            row = self._ROW.unpack_from(self._map, number * self._ROW.size)
            if row[0] and psutil.pid_exists(row[0]):
                yield number, row


def _remove(path, pid):
    if os.getpid() == pid:
        os.unlink(path)


_ledger = _Ledger()


# -- streams and events ---------------------------------------------------------------------------------------------------


class Stream:
    """The order of work of one device in this process."""

    def __init__(self, index):
        self.index = index
        self._jobs: deque = deque()  # (number, whether it brings values to the device, what to do)
        self._waits_for: deque = deque()  # what is done elsewhere, such as a transfer between devices
        self.transfers: deque = deque()  # all of the device's, whether or not this stream waits for them
        self._lock = threading.RLock()
        self.posted = self.reached = 0

    def post(self, do, inwards=False):
        """Take a job on, which whatever thread waits for it does; tensors may be of inference."""
        do = torch.inference_mode()(do)
        with self._lock:
            self.posted += 1
            self._jobs.append((self.posted, inwards, do))

    def wait_for(self, done):
        """Do nothing more before the threading event ``done``; the host goes on."""
        self._waits_for.append(done)

    @property
    def blocked(self):
        """Whether it waits for something that is not done."""
        return not all(done.is_set() for done in list(self._waits_for))

    def before_kernel(self):
        """What the kernel may read is on the device now; what goes to the host stays on its way.

        Half of the kernels are launched for the first time: to load them, the whole device is synchronised.
        """
        while self._waits_for:
            self._waits_for.popleft().wait()
        if _random.random() < 0.5:
            self.finish_transfers()
        with self._lock:
            for number, inwards, do in list(self._jobs):
                if inwards:
                    do()
                    self._jobs.remove((number, inwards, do))

    def run(self, until=math.inf):
        while self._waits_for:
            self._waits_for.popleft().wait()
        with self._lock:
            while self._jobs and self._jobs[0][0] <= until:
                self._jobs.popleft()[2]()
            self.reached = max(self.reached, min(until, self.posted))

    def finish_transfers(self):
        while self.transfers:
            self.transfers.popleft().wait()

    def synchronize(self):
        self.run()


_random = random.Random(1)
_streams = [Stream(index) for index in range(COUNT)]


def stream_of(tensor):
    """The stream of the device that has it."""
    return _streams[tensor.device.index]


class Event:
    """A point in a stream's order of work."""

    def __init__(self, enable_timing=False):
        self._timing, self._asked = enable_timing, 0

    def record(self, stream):
        _check_current(stream.index)
        stream.post(lambda: None)
        self._stream, self._number, self._time = stream, stream.posted, time.perf_counter()

    def query(self):
        """It takes a device a while to come to it."""
        _check_current(self._stream.index)
        self._asked += 1
        if self._asked > 2 and not self._stream.blocked:
            self.synchronize()
        return self._stream.reached >= self._number

    def synchronize(self):
        _check_current(self._stream.index)
        self._stream.run(self._number)

    def elapsed_time(self, end):
        for event in (self, end):
            if not event._timing:
                raise RuntimeError("an event without timing was asked for a time")
            if event._stream.reached < event._number:
                raise RuntimeError("device not ready: an event that was not reached was asked for a time")
        return (end._time - self._time) * 1e3


def _index(device):
    return device if isinstance(device, int) else _fixed(KIND if device is None else device).index


def _check_current(index):
    if index != _here.device and _own:
        raise RuntimeError(
            f"{KIND}:{index} was used in a thread whose device is {KIND}:{_here.device}: a context would open there"
        )


class _Module(backend_registration._DummyBackendModule):
    """What PyTorch's module for a kind of device has."""

    Stream, Event = Stream, Event

    def current_device(self):
        return _here.device

    def set_device(self, device):
        _here.device = _index(device)
        if _own and _here.device not in _own:
            raise RuntimeError(f"a rank on {KIND}:{_own} was given {KIND}:{_here.device}")

    def device_count(self):
        return COUNT

    def current_stream(self, device=None):
        return _streams[_index(device)]

    def synchronize(self, device=None):
        _streams[_index(device)].finish_transfers()
        _streams[_index(device)].synchronize()

    def empty_cache(self):
        """Memory that is freed synchronises the whole device."""
        self.synchronize()

    def mem_get_info(self, device=None):
        return BUDGET - _ledger.used(_index(device)), BUDGET

    def memory_stats(self, device=None):
        """Nothing is cached: what is reserved is in use."""
        used = _ledger.own(_index(device))
        return {"active_bytes.all.current": used, "reserved_bytes.all.current": used}

    def get_device_name(self, device=None):
        return self.get_device_properties(device).name

    def get_device_properties(self, device=None):
        return types.SimpleNamespace(name=f"Simulated {_index(device)}", total_memory=BUDGET, is_integrated=False)

    def get_rng_state(self, device=None):
        """The CPU draws the random numbers of all devices."""
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


# -- tensors --------------------------------------------------------------------------------------------------------------

_pinned: weakref.WeakSet = weakref.WeakSet()  # storages
_counted: weakref.WeakSet = weakref.WeakSet()  # storages that the ledger knows of


def _storage(tensor):
    return tensor.untyped_storage()


class SimTensor(torch.Tensor):
    """A tensor on a simulated device; its values are in ``raw``, on the CPU."""

    @staticmethod
    def __new__(cls, raw, device):
        assert not isinstance(raw, SimTensor), "its values are on the CPU"
        device = _fixed(device)
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        made.raw = raw
        return made

    def __init__(self, raw, device):
        _count(raw, self.device.index)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        """PyTorch refuses it for classes of others."""
        return self.cpu().tolist()

    def __repr__(self):
        return f"SimTensor({self.raw}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if name == "aten::_has_compatible_shallow_copy_type":  # a module that moves gets new parameters
            return False
        if name == "aten::to":  # in inference mode
            return func.decompose(*args, **kwargs)
        if name in ("aten::copy_", "aten::_to_copy"):
            return (_copy if name == "aten::copy_" else _to_copy)(*args, **kwargs)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and _counts(leaf)}
        if len(devices) > 1:
            raise RuntimeError(f"{name} was given tensors of {sorted(map(str, devices))}")
        target = next((device for device in devices if device.type == KIND), torch.device("cpu"))
        if kwargs.get("device") is not None:
            target = _fixed(kwargs["device"])
            kwargs["device"] = "cpu" if target.type == KIND else target
        kwargs.pop("pin_memory", None)
        if target.type == KIND:
            _check_current(target.index)
            if not func.is_view:
                _streams[target.index].before_kernel()
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        if func._schema.is_mutable:
            first = func._schema.arguments[0].alias_info
            if len(func._schema.returns) == 1 and first is not None and first.is_write:
                return args[0]
        if target.type != KIND:
            return out
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out)):
            _streams[target.index].synchronize()  # the host has a value of it
        return tree_map(lambda leaf: SimTensor(leaf, target) if isinstance(leaf, torch.Tensor) else leaf, out)


def _count(raw, index):
    storage = _storage(raw)
    if storage in _counted:
        return
    _ledger.take(index, storage.nbytes())
    _counted.add(storage)
    weakref.finalize(storage, _ledger.give, index, storage.nbytes())


def _counts(tensor):
    """Whether an operation may not mix it with tensors of another device: numbers on the CPU go along."""
    return isinstance(tensor, SimTensor) or tensor.dim() > 0


def _raw(leaf):
    return leaf.raw if isinstance(leaf, SimTensor) else leaf


def _fixed(device):
    device = torch.device(device)
    return device if device.type != KIND or device.index is not None else torch.device(KIND, _here.device)


def _spoil(tensor):
    """What a copy leaves in its target until it is done."""
    tensor.fill_(LATE if tensor.is_floating_point() else 77)


def _copy(target, source, non_blocking=False):
    stream = _streams[(target if isinstance(target, SimTensor) else source).device.index]
    _check_current(stream.index)
    if isinstance(target, SimTensor) and isinstance(source, SimTensor):
        for each in {target.device.index, source.device.index}:
            _streams[each].before_kernel()
        target.raw.copy_(source.raw)
    elif isinstance(target, SimTensor):
        if non_blocking and _storage(source) in _pinned:
            _spoil(target.raw)
            stream.post(lambda: target.raw.copy_(source), inwards=True)
        else:
            stream.before_kernel()
            target.raw.copy_(source)
    else:
        stream.before_kernel()
        if non_blocking and _storage(target) in _pinned:
            kept = source.raw.clone()
            _spoil(target)
            stream.post(lambda: target.copy_(kept))
        else:
            stream.synchronize()
            target.copy_(source.raw)
    return target


def _to_copy(source, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    where = source.device if device is None else _fixed(device)
    if where.type != KIND or where == source.device:
        _check_current(source.device.index)
        _streams[source.device.index].before_kernel()
    made = torch.empty_like(_raw(source), dtype=dtype, device="cpu", memory_format=memory_format or torch.preserve_format)
    if where.type == KIND:
        return _copy(SimTensor(made, where), source, non_blocking)
    if non_blocking:
        _pinned.add(_storage(made))
    return _copy(made, source, non_blocking)


# -- registration ---------------------------------------------------------------------------------------------------------


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return SimTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format), _fixed(device))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return SimTensor(torch.empty_strided(size, stride, dtype=dtype), _fixed(device))


def _pinning(allocate):
    """A function of PyTorch's that can also pin: a backend written in Python cannot offer an allocator for that."""

    def allocated(*args, pin_memory=False, **kwargs):
        made = allocate(*args, **kwargs)
        if pin_memory:
            _pinned.add(_storage(made))
        return made

    return allocated


backend_registration._setup_privateuseone_for_python_backend(KIND, _Module(), None, None)
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", lambda source, target, non_blocking=False: _copy(target, source, non_blocking), "PrivateUse1")
torch.empty_strided = _pinning(torch.empty_strided)


def prepare():
    """In a rank: it has one device of its own, and may use no other."""
    _own.clear()
    _own.add(_here.device)
