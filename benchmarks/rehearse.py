"""train.train() on CUDA without a GPU: tensors of shapes alone on a device that says it is one, and no value computed.

    python benchmarks/rehearse.py --preset wan1.3b --ranks 16       # every flag of train.py, and --ranks, --layers

It finds what a CPU run cannot show and a GPU would only show as an error or as lost time: operators on tensors of two
devices (which end it, with where), dtypes that meet, host syncs, copies between host and device, what attention is
given and which kernels take that, the collectives of two ranks side by side, live bytes at the peak of each update.

cost.py counts the same train() on "meta", where FSDP does not run, and answers within a minute what a run needs. Here
FSDP, the fused AdamW and cuDNN's memory layouts take part: slower, needs a C++ compiler, and corrects cost.py's
formulas of what a rank holds. Not seen: workspaces, fragments of the allocator, anything that takes time.
"""

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

# torch asks once, early, whether there is CUDA. This answers yes: a guard that does nothing lets autograd run on fake
# CUDA tensors, and convolutions choose the layouts that they would choose with cuDNN.
FAKE_CUDA = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct FakeGuard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
struct FakeHooks final : at::CUDAHooksInterface {
  FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91600; }
  long versionRuntimeCuDNN() const override { return 91600; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
namespace at { C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::FakeHooks) }
"""


def load_fake_cuda():
    """Compile FAKE_CUDA against the installed torch, a few seconds, and load it before torch is."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "fake.cpp", Path(folder) / "fake.so"
        source.write_text(FAKE_CUDA)
        subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", source,
                        "-o", library, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], check=True)
        ctypes.CDLL(torch / "lib" / "libtorch_cpu.so", ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library)


load_fake_cuda()

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401, collectives of tensors without values
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.distributed.fsdp._fully_shard import _fsdp_init as fsdp
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from compare import without_files  # first: vae is not this folder's
import cost
import model
import train

HERE, aten = Path(__file__).resolve().parent, torch.ops.aten
COPIES = aten._to_copy, aten.copy_
TAKE_HOST_INDICES = aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_  # by copying them


# ---------------------------------------------------------------------------------------------------------------------
# A device that does nothing


class Nothing:
    """A stream, an event, or a context of one."""

    def __init__(self, *_, **__):
        self.device = torch.device("cuda", 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record(self, *_):
        return self

    record_event = record

    def synchronize(self, *_):
        pass

    wait = wait_event = wait_stream = synchronize


def answer_as_cuda():
    """torch.cuda's functions as on a node of eight cards."""
    answers = dict(is_available=True, is_initialized=True, device_count=cost.NODE, current_device=0, set_device=None,
                   _lazy_init=None, get_device_capability=(9, 0), is_bf16_supported=True, memory_allocated=0,
                   max_memory_allocated=0, reset_peak_memory_stats=None, synchronize=None)
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in "Stream", "Event", "stream", "device", "StreamContext", "current_stream", "default_stream":
        setattr(torch.cuda, name, Nothing)
    fake_tensor.init_gpu_context = lambda _: None
    FakeTensorMode.avoid_device_init = True
    move = fsdp._move_states_to_device

    def moved(parameters, buffers, device):
        move(parameters, buffers, device)
        for x in [*parameters, *buffers]:
            x.fake_device = device  # what it is given as its data has it, which a fake tensor does not notice
    fsdp._move_states_to_device = moved
    torch.utils.weakref = mock.MagicMock(getweakrefs=lambda _: [])  # nothing remembers what .to() swaps


# ---------------------------------------------------------------------------------------------------------------------
# What is seen


def where():
    """The innermost line of the project that is at work."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent == HERE.parent and path.name != "cost.py":
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def kernels(q, k, v):
    """The attention kernels that take these on an H100, by the rules of torch's sdp_utils.cpp."""
    half, d = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16), q.shape[3]
    rows = all(t.stride(3) == 1 and t.shape[3] == d for t in (q, k, v))
    aligned = d * q.itemsize % 16 == 0 and all(t.storage_offset() * t.itemsize % 16 == 0 for t in (q, k, v))
    fits = {"cudnn": half and rows and d <= 128 and d % 8 == 0 and k.shape[2] > 1,
            "flash": half and rows and d <= 256, "efficient": rows and aligned, "math": True}
    return [name for name, fit in fits.items() if fit]


class Rehearsal(cost.Count):
    """cost.Count of what lies on the device, and {(kind, what, where): [times, bytes]} of what may be a mistake."""

    def __init__(self):
        super().__init__()
        self.updates = []
        self.begin()

    def begin(self):
        self.found, self.dtypes, self.attention, self.collectives = {}, Counter(), Counter(), []
        self.peak, self.before = self.now, (Counter(self.work), 0)

    def end(self, name):
        work, collectives = self.before
        self.updates.append((name, self.peak, self.work - work, len(self.collectives) - collectives))
        self.peak, self.before = self.now, (Counter(self.work), len(self.collectives))

    def find(self, kind, what, size=0):
        entry = self.found.setdefault((kind, what, where()), [0, 0])
        entry[:] = entry[0] + 1, entry[1] + size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it becomes operators on its shard first
        kwargs, packet = kwargs or {}, func._overloadpacket
        if func.is_view or torch.Tag.inplace_view in func.tags or func is aten._unsafe_view.default:
            return func(*args, **kwargs)
        inputs = cost.tensors([*args, *kwargs.values()])
        on_device = [x for x in inputs if x.is_cuda]
        on_host = [x for x in inputs if not x.is_cuda]
        if packet is aten._local_scalar_dense:
            if on_device:
                self.find("sync", "item()")
            return 1.0 if inputs[0].is_floating_point() else 1
        if packet is aten.nonzero and on_device:  # taken as if all were; a mask as an index ends with an error
            self.find("sync", "nonzero()")
            return inputs[0].new_empty((inputs[0].numel(), inputs[0].ndim), dtype=torch.int64)
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append((packet.__name__, *[(name_of(x.dtype), x.numel()) for x in inputs]))
        elif on_device and on_host and packet in TAKE_HOST_INDICES:
            self.find("host to device", "indices, blocking", sum(x.nbytes for x in on_host))
        elif on_device and on_host and packet not in COPIES:
            self.find("two devices", f"{packet.__name__} with {[list(x.shape) for x in on_host]} on the host")
        out = func(*args, **kwargs)
        made = cost.tensors(out)
        if packet in COPIES:
            source, target = (inputs[1], inputs[0]) if packet is aten.copy_ else (inputs[0], out)
            if source.is_cuda != target.is_cuda:
                blocking = not (kwargs.get("non_blocking") or packet is aten.copy_ and True in args[2:])
                self.find("host to device" if target.is_cuda else "device to host, sync",
                          "blocking" if blocking else "not blocking", source.nbytes)
        if on_device or any(x.is_cuda for x in made):
            kind, amount = cost.kind_and_amount(func, args, kwargs, out)
            self.work[kind] += amount
            if kind != "memory":
                matrices = [name_of(x.dtype) for x in inputs if x.ndim > 1][:3]
                self.dtypes[kind.removeprefix("fp32 "), " x ".join(dict.fromkeys(matrices))] += 1
            for x in made:
                if x.is_cuda:
                    self.see(x.untyped_storage())
        return out

    def tolist(self, x):
        self.find("sync", "tolist()")
        return [1.0] * len(x)

    def resized(self, storage, size):
        """FSDP frees gathered parameters, and takes their memory again, by their storage's size."""
        if storage._cdata in self.alive:
            old, reference = self.alive[storage._cdata]
            self.alive[storage._cdata] = size, reference
            self.now += size - old
            self.peak = max(self.peak, self.now)

    def attend(self, q, k, v):
        """In the place of scaled_dot_product_attention, which asks the device which kernel it has."""
        fit, graph = kernels(q, k, v), torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        self.attention[name_of(q.dtype), f"{list(q.shape)} on {k.shape[2]}", str(list(q.stride())), ", ".join(fit)] += 1
        if "flash" in fit:
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if "efficient" in fit:
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, graph)[0]
        return aten._scaled_dot_product_attention_math(q, k, v)[0]


# ---------------------------------------------------------------------------------------------------------------------
# A run


@contextmanager
def resizes_told_to(seen):
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        seen.resized(storage, size)
        return resize(storage, size)
    with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
        yield


def rehearse(cfg, rank, ranks, fake):
    """One cycle of train.train(cfg) as that rank under the FakeTensorMode `fake`: a Rehearsal, its `start` set."""
    seen, name, local = Rehearsal(), [], min(ranks, cost.NODE)
    environ = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank % local, LOCAL_WORLD_SIZE=local)
    setup, global_means, adamw, init = train.setup, train.global_means, train.adamw, dist.init_process_group

    def on_a_real_mesh(*args, **how):
        with _disable_current_modes():  # which ranks there are is a value
            return setup(*args, **how)

    def unseen(*args, of=ShardingPropagator._propagate_tensor_meta_non_cached):
        with _disable_current_modes():  # DTensor tries an operator's first call on tensors of the unsharded shapes
            return of(*args)

    def named(sums):
        name[:] = [next(iter(sums))]
        return global_means(sums)

    def stepping(net, lr):
        optimizer = adamw(net, lr)
        optimizer.register_step_post_hook(lambda *_: seen.end(name[0]))
        return optimizer

    def everything_loaded(*_):
        seen.start = seen.now
        seen.begin()
        return mock.MagicMock()

    with (mock.patch.dict(os.environ, {key: str(value) for key, value in environ.items()}),
          mock.patch.multiple(train, setup=on_a_real_mesh, global_means=named, adamw=stepping,
                              attention_backend=lambda *_: "chosen on a GPU"),
          mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
          mock.patch.multiple(train.checkpoint, Log=everything_loaded, load=lambda *_: None),  # asks the disk for room
          mock.patch.object(train.Draw, "choice", lambda _, what, options: options // 2),  # the average, as in cost.py
          mock.patch.object(train.Draw, "uniform", lambda draw, _: torch.rand(len(draw.index))),
          mock.patch.object(FakeTensor, "tolist", lambda x: seen.tolist(x)),
          mock.patch.object(F, "scaled_dot_product_attention", seen.attend),
          mock.patch.object(dist, "init_process_group", lambda *_, **__: init(
              "fake", store=FakeStore(), rank=rank, world_size=ranks)),
          mock.patch.object(torch.cuda, "synchronize", lambda *_: seen.find("sync", "synchronize()")),
          mock.patch.object(Nothing, "synchronize", lambda *_: seen.find("sync", "synchronize()")),
          resizes_told_to(seen), fake, seen):
        train.train(cfg)
    dist.destroy_process_group()
    return seen


def table(*rows):
    """Lines of a Markdown table; the first row is its head."""
    yield "\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows[1:])


def report(cfg, ranks, pair, seen, other):
    yield (f"{cfg.preset}, {cfg.frames} frames {cfg.height}x{cfg.width}, window {cfg.window}, batch {cfg.batch} and "
           f"{cfg.discriminator_batch}, micro-batch {cfg.micro_batch}, {cfg.dtype}; ranks {pair[0]} and {pair[1]} of "
           f"{ranks}, {cfg.shard or min(ranks, cost.NODE)} to a copy; torch {torch.__version__}")
    rows = []
    for key, label in cost.UPDATES.items():
        of_it = [update for update in seen.updates if update[0] == key]
        if of_it:
            work = sum((done for _, _, done, _ in of_it), Counter())
            amounts = [cost.short(work[kind] / 1e12) for kind in cost.RATES]
            rows.append([label, len(of_it), f"{max(peak for _, peak, _, _ in of_it) / cost.GIB:.2f}", *amounts,
                         sum(n for *_, n in of_it)])
    yield from table(["", "updates", "GiB live at the peak", *[f"{kind}, T" for kind in cost.RATES], "collectives"],
                     *rows)
    yield f"\n{seen.start / cost.GIB:.2f} GiB live when all is loaded; T: TFLOP, of memory TB, a cycle of this rank"
    found = sorted(seen.found.items(), key=lambda item: (item[0][0], -item[1][0]))
    yield from table(["finding", "", "where", "times a cycle", "MiB"],
                     *[[*key, times, cost.short(size / 2**20)] for key, (times, size) in found])
    yield from table(["operators", "dtypes of their inputs", "times"],
                     *[[*key, times] for key, times in sorted(seen.dtypes.items())])
    yield from table(["attention", "query on keys", "query's strides", "kernels that take it", "times"],
                     *[[*key, times] for key, times in seen.attention.most_common()])
    counts = [Counter(call[0] for call in each.collectives) for each in (seen, other)]
    yield from table(["collective", *[f"rank {rank}" for rank in pair]],
                     *[[name, *[count[name] for count in counts]] for name in sorted(counts[0] | counts[1])],
                     ["all", *map(Counter.total, counts)])
    verdict = "equal" if seen.collectives == other.collectives else "DIFFER"
    yield f"\nsequences of collectives, their types and sizes: {verdict}"


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0)  # of the preset's DiT, fewer for a quick look
    own, flags = parser.parse_known_args()
    answer_as_cuda()
    cfg = train.parse_flags(["--preset", "wan1.3b", *flags])
    cfg = replace(cfg, fake_warmup=0, dmd_warmup=0, discriminator_warmup=0, cycles=1, samples=0, out=tempfile.mkdtemp(),
                  dtype="bf16" if cfg.dtype == "auto" else cfg.dtype)
    if own.layers:
        model.CONFIGS[cfg.preset] = replace(model.CONFIGS[cfg.preset], layers=own.layers)
    without_files(train, cfg)
    pair = 0, (own.ranks // 2 + 1) % own.ranks  # of another node and of another place in it
    small = replace(cfg, height=128, width=128, frames=5, window=1)  # what ranks tell each other are parameters
    fake = FakeTensorMode()
    seen = [rehearse(each, rank, own.ranks, fake) for rank, each in zip(pair, (cfg, small))]
    print(*report(cfg, own.ranks, pair, *seen), sep="\n")


if __name__ == "__main__":
    main()
