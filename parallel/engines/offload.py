"""Where the tensors go that a forward pass saves for its backward: host memory, or nowhere where a parameter will do.

Autograd shows each tensor that it saves, and asks for it again in the backward (``saved_tensors_hooks``). Here

- a parameter, or a transposed or reshaped view of one, is not saved: the backward reads the parameter again. It is
  never copied, and what an engine gathers for one module and frees again (ZeRO stage 3) is not held;
- a tensor of at least 64 KiB goes to host memory if that is asked for, once per storage however many views of it are
  saved, and comes back once when its first view is needed;
- everything else stays as it is.

Copies are exact, so gradients are the same bit for bit. With CUDA the host memory is pinned and copies run on a stream
of their own: to the host while the forward goes on, back one storage ahead of the backward. On a CPU the copy is a
copy in the same memory: it shows what would move, and saves nothing; `make test-gpu` looks at streams and memory.
Where blocks are recomputed, their inputs are all that is saved, so these alone move; the states that exchanges brought
stay on the device: recomputing reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 64 * 1024


class SavedTensors:
    """Decides, in each forward of ``model`` from now on, how saved tensors are kept.

    Args:
        model: make it after everything else that hooks into the model's forward.
        device: whose tensors may go to the host.
        to_host: whether they do.
        gathered: gives a parameter's whole value in the backward. Default: the parameter itself.

    Attributes:
        moved_bytes: copied to the host so far.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        to_host: bool,
        gathered: Callable[[nn.Parameter], Tensor] = lambda p: p,
    ):
        self.device, self.to_host, self.moved_bytes = device, to_host, 0
        self._gathered = gathered
        self._parameters: dict[int, nn.Parameter] = {}  # by the address of their first element
        self._storages: dict[int, nn.Parameter] = {}  # one of those that lie in it, by its address
        self._copies: weakref.WeakValueDictionary[tuple[int, int], _HostCopy] = weakref.WeakValueDictionary()
        self._newest: weakref.ref[_HostCopy] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._all = list(model.parameters())
        for module in model.modules():
            module.register_forward_pre_hook(self._note_parameters)
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._exit, always_call=True)

    def _note_parameters(self, module: nn.Module, _args: tuple) -> None:
        """Those that a module reads are at their place now; an engine may have them elsewhere in the next forward."""
        lists = (m for m in module.children() if isinstance(m, (nn.ParameterList, nn.ParameterDict)))  # are not called
        for owner in (module, *lists):
            self._note(owner.parameters(recurse=False))

    def _note(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if isinstance(p, DTensor):
                continue  # a share: nothing computes with it
            self._parameters[p.data_ptr()] = self._storages[p.untyped_storage().data_ptr()] = p

    def _enter(self, _module: nn.Module, _args: tuple) -> None:
        self._note(self._all)  # in case a module reads those of another
        self._hooks.append(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._hooks[-1].__enter__()
        self._newest = None

    def _exit(self, _module: nn.Module, _args: tuple, _output: Tensor) -> None:
        self._hooks.pop().__exit__(None, None, None)

    def _pack(self, x: Tensor) -> _Kept | _View | _ParameterView:
        plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_conj() and not x.is_neg()
        if not plain or x.device.type != self.device.type or not x.numel():
            return _Kept(x, x._version)
        p = self._parameters.get(x.data_ptr())
        if p is not None and p.data_ptr() == x.data_ptr() and p.dtype == x.dtype and p.numel() == x.numel():
            return _ParameterView(p, x.shape, x.stride())
        storage = x.untyped_storage()
        p = self._storages.get(storage.data_ptr())
        if p is not None and p.untyped_storage().data_ptr() == storage.data_ptr():
            return _Kept(x, None)  # a part of a parameter: an engine may have filled it anew
        size = min(x.numel() * x.element_size(), storage.nbytes())  # an expanded view is larger than its storage
        if not self.to_host or size < MIN_BYTES:
            return _Kept(x, x._version)
        if 2 * size < storage.nbytes():  # a small part of something large
            x = x.clone()
        return _View(self._copied(x), x.dtype, x.shape, x.stride(), x.storage_offset())

    def _copied(self, x: Tensor) -> _HostCopy:
        """The copy of the storage of ``x``; an earlier one, if nothing was written to it in between."""
        storage = x.untyped_storage()
        key = StorageWeakRef(storage), x._version  # while the key lives, no other storage can have this identity
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _HostCopy(storage, self._stream, self._newest)
            self._newest = weakref.ref(copy)
            self.moved_bytes += storage.nbytes()
        copy.views += 1
        return copy

    def _unpack(self, kept: _Kept | _View | _ParameterView) -> Tensor:
        if isinstance(kept, _View):
            return kept.copy.view(kept)
        if isinstance(kept, _ParameterView):
            p = self._gathered(kept.parameter).detach()
            return p.as_strided(kept.shape, kept.stride, p.storage_offset())
        if kept.version is not None and kept.tensor._version != kept.version:  # autograd itself looks no more
            raise RuntimeError(
                f"a tensor of shape {tuple(kept.tensor.shape)} was written to in place after the forward had saved it "
                "for the backward. Clone it before writing."
            )
        return kept.tensor


@dataclass(frozen=True)
class _Kept:
    """A tensor that stays on its device, at the version of its content that was saved."""

    tensor: Tensor
    version: int | None


@dataclass(frozen=True)
class _ParameterView:
    """All elements of a parameter, in some shape."""

    parameter: nn.Parameter
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _View:
    """A tensor that lies in a storage whose copy is on the host."""

    copy: _HostCopy
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _HostCopy:
    """The bytes of one storage on the host, and on their way back.

    Attributes:
        views: saved and not yet asked for; the storage is kept on the device from the first to the last.
    """

    def __init__(
        self,
        storage: torch.UntypedStorage,
        stream: torch.cuda.Stream | None,
        before: weakref.ref[_HostCopy] | None,
    ):
        self.views = 0
        self._device, self._stream, self._before = storage.device, stream, before
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(source)
        else:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # its memory is not reused before the copy is done

    def fetch(self) -> None:
        """Begin to copy the bytes back; on the stream that brought them here, so after that."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host.clone()
        else:
            with torch.cuda.stream(self._stream):
                self._back = self._host.to(self._device, non_blocking=True)
                self._arrived = self._stream.record_event()

    def view(self, view: _View) -> Tensor:
        """The saved tensor, on the device; the storage saved before it, needed next, begins to come back."""
        self.fetch()
        back, before = self._back, self._before and self._before()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            back.record_stream(current)
            if before is not None and before.views:
                before.fetch()
        self.views -= 1
        if self.views <= 0:  # below: a retained graph is run again
            self._back = None
        empty = torch.empty(0, dtype=view.dtype, device=self._device)
        return empty.set_(back.untyped_storage(), view.offset, view.shape, view.stride)
