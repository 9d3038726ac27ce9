"""Training state to and from a folder of checkpoints, whatever the plan that wrote or reads it.

`step_000120/` holds the state after 120 steps: blocks of tensors by parameter name (written by
torch.distributed.checkpoint), and `manifest.json`, which lists every file with its size and
checksum. It is `step_000120.tmp/` until it is whole.
"""

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.optim import Optimizer

from .blocks import Block, load, save
from .errors import UserError
from .mesh import Mesh
from .objects import send_without_numpy
from .optimizers import Models, as_modules, kind_of, updated_by

MANIFEST = "manifest.json"
READ_BYTES = 2**22


class Checkpoints:
    """keep: how many of the newest stay in the folder."""

    def __init__(self, folder: str, mesh: Mesh, *, keep: int = 3):
        assert keep >= 1, f"at least one checkpoint must be kept, not {keep}"
        self.folder, self.mesh, self.keep = Path(folder), mesh, keep
        send_without_numpy()
        # the writing thread's messages must not mix with the training's
        self.group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        model: Models,
        optimizer: Optimizer,
        extra: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """step: how many steps are done. extra: small values for JSON, the same on all ranks.

        Copies the state, then writes it while training goes on.
        """
        self.wait()
        blocks, _ = _state(model, optimizer)
        copies = {name: block.copied_to_cpu() for name, block in blocks.items()}
        manifest = {
            "step": step,
            "extra": dict(extra or {}),
            "optimizer": kind_of(optimizer),
        }
        self._thread = threading.Thread(target=self._guarded, args=(copies, manifest))
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until what was begun is written; every program ends with it.

        Errors: UserError if it could not be written; older checkpoints are still there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if isinstance(failure, UserError):
                raise failure
            raise UserError(f"no checkpoint could be written to {self.folder}: {_reason(failure)}")

    def restore(self, model: Models, optimizer: Optimizer | None = None) -> dict[str, Any] | None:
        """The newest checkpoint into model and optimizer; its `extra` and `step`, or None if the
        folder has none.

        Errors: UserError if it is damaged, or of another model or optimizer: nothing is loaded.
        """
        self.wait()
        newest = self._same_everywhere(lambda: _steps(self.folder)[-1:])
        if not newest:
            return None
        path = self.folder / _name(newest[0])
        manifest = self._same_everywhere(lambda: _read_manifest(path))
        if isinstance(manifest, str):
            self._refuse([manifest], path)
        self._refuse(self._damages(path, manifest["files"]), path)
        self._load(path, manifest, model, optimizer)
        return {**manifest["extra"], "step": manifest["step"]}

    def _load(
        self, path: Path, manifest: dict[str, Any], model: Models, optimizer: Optimizer | None
    ) -> None:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if optimizer is not None and manifest["optimizer"] != kind_of(optimizer):
            self._fail(
                f"{path} was written with the optimizer {manifest['optimizer']},"
                f" not {kind_of(optimizer)}"
            )
        self._same_model(_state(model, None)[0], saved, path)
        if optimizer is not None:
            _make_optimizer_state(model, optimizer, saved)
        blocks, twins = _state(model, optimizer)
        load(blocks, path, self.group)
        for copy, original in twins:
            copy.local.copy_(original.local)
        changed = getattr(optimizer, "weights_changed", None)
        if changed is not None:  # copies of them lie in host memory
            changed()

    def _guarded(self, blocks: dict[str, Block], manifest: dict[str, Any]) -> None:
        try:
            self._write(blocks, manifest)
        except BaseException as error:
            self._failure = error

    def _write(self, blocks: dict[str, Block], manifest: dict[str, Any]) -> None:
        final = self.folder / _name(manifest["step"])
        draft = final.with_suffix(".tmp")
        failure = self._same_everywhere(lambda: _begin(draft))
        if failure:
            raise UserError(failure)
        save(blocks, draft, self.group)
        own = {p.name: _measure(p) for p in draft.glob(f"__{dist.get_rank()}_*.distcp")}
        listed = self._gather(own)
        if dist.get_rank() == 0:
            files = {name: size for rank in listed for name, size in rank.items()}
            files[".metadata"] = _measure(draft / ".metadata")
            _finish(draft, final, manifest | {"files": files})
            for step in _steps(self.folder)[: -self.keep]:
                shutil.rmtree(self.folder / _name(step), ignore_errors=True)

    def _same_model(self, blocks: dict[str, Block], saved: Mapping[str, Any], path: Path) -> None:
        """Refuse unless all ranks' names and shapes together are those in the checkpoint."""
        own = {name: list(block.shape) for name, block in blocks.items()}
        here = {name: shape for rank in self._gather(own) for name, shape in rank.items()}
        there = {name: list(s.size) for name, s in saved.items() if name.startswith("model/")}
        faults = []
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                faults.append(
                    f"{name.removeprefix('model/')} is {there.get(name) or 'absent'} there"
                    f" and {here.get(name) or 'absent'} here"
                )
        if faults:
            more = f", and {len(faults) - 3} more differ" if len(faults) > 3 else ""
            self._fail(f"{path} is of another model: {'; '.join(faults[:3])}{more}")

    def _damages(self, path: Path, files: Mapping[str, list[int]]) -> list[str]:
        """What is wrong with the files; each rank looks at some of them."""
        rank, world = dist.get_rank(), dist.get_world_size()
        faults = []
        for name in sorted(files)[rank::world]:
            if not (path / name).exists():
                faults.append(f"{name} is missing")
            elif _measure(path / name) != files[name]:
                faults.append(f"{name} is not as it was written")
        return [fault for found in self._gather(faults) for fault in found]

    def _refuse(self, faults: list[str], path: Path) -> None:
        if not faults:
            return
        whole = [
            step
            for step in _steps(self.folder)
            if self.folder / _name(step) != path and _looks_whole(self.folder / _name(step))
        ]
        older = (
            f"{self.folder / _name(whole[-1])} is whole: remove the damaged one to go on from there"
            if whole
            else "there is no other"
        )
        self._fail(f"the checkpoint {path} is damaged: {faults[0]}; {older}")

    def _fail(self, message: str) -> None:
        """All ranks see the same fault; one of them speaks."""
        raise UserError(message) if dist.get_rank() == 0 else SystemExit(1)

    def _same_everywhere(self, look: Callable[[], Any]) -> Any:
        """Rank 0 looks at the disk, all ranks act on what it saw."""
        seen = [look() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(seen, src=0, group=self.group)
        return seen[0]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


def latest(folder: str) -> int | None:
    """The newest checkpoint's step."""
    steps = _steps(Path(folder))
    return steps[-1] if steps else None


def _state(
    model: Models, optimizer: Optimizer | None
) -> tuple[dict[str, Block], list[tuple[Block, Block]]]:
    """Blocks by name, and (copy, original) of weights that stages of this rank have in common."""
    blocks: dict[str, Block] = {}
    twins: list[tuple[Block, Block]] = []
    for name, tensor in _named_tensors(model):
        found = {f"model/{name}": tensor}
        if optimizer is not None:
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{name}/{key}"] = value
        for full_name, value in found.items():
            block = Block.of(value, beside=tensor)
            if full_name in blocks:
                twins.append((block, blocks[full_name]))
            else:
                blocks[full_name] = block
    return blocks, twins


def _named_tensors(model: Models) -> list[tuple[str, Tensor]]:
    """Parameters and kept buffers, each once in a module; FSDP2 shows its sharded ones here."""
    out = []
    for module in as_modules(model):
        seen: set[int] = set()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                out.append((name, tensor))
    return out


def _make_optimizer_state(model: Models, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Memory for the state that the checkpoint has of this rank's parameters."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    keys: dict[str, list[str]] = {}
    for full_name in saved:
        if full_name.startswith("optimizer/"):
            name, key = full_name.removeprefix("optimizer/").rsplit("/", 1)
            keys.setdefault(name, []).append(key)
    for name, p in _named_tensors(model):
        if p not in groups:
            continue
        for key in keys.get(name, ()):
            stored = saved[f"optimizer/{name}/{key}"]
            home = updated_by(optimizer, p)
            if stored.size == p.shape:
                # a run in another precision goes on in its own types: reading converts
                dtype = getattr(optimizer, "moments", None) or p.dtype
                optimizer.state[p][key] = torch.zeros_like(home, dtype=dtype, requires_grad=False)
            else:
                # PyTorch counts steps on the CPU, but its fused and capturable kernels do not
                near = groups[p].get("fused") or groups[p].get("capturable")
                device, dtype = home.device if near else "cpu", stored.properties.dtype
                optimizer.state[p][key] = torch.zeros(stored.size, dtype=dtype, device=device)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step_(\d{6,})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _begin(draft: Path) -> str | None:
    try:
        for left_over in draft.parent.glob("step_*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        draft.mkdir(parents=True)
    except OSError as error:
        return f"no checkpoint could be written to {draft.parent}: {error.strerror}"
    return None


def _finish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    unseen = [name for name in manifest["files"] if not (draft / name).exists()]
    if unseen:
        raise UserError(
            f"{draft} lacks {unseen[0]}, which another machine wrote:"
            " checkpoints need a file system that all machines share"
        )
    with open(draft / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # an earlier run's, of the same step
    os.rename(draft, final)


def _measure(path: Path) -> list[int]:
    """[bytes, CRC-32]"""
    size = checksum = 0
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return [size, checksum]


def _read_manifest(path: Path) -> dict[str, Any] | str:
    """Or what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return {key: manifest[key] for key in ("step", "extra", "optimizer", "files")}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not as it was written"


def _looks_whole(path: Path) -> bool:
    """By the files' sizes alone: it may be a large one."""
    manifest = _read_manifest(path)
    if isinstance(manifest, str):
        return False
    files = {path / name: size for name, (size, _) in manifest["files"].items()}
    return all(file.exists() and file.stat().st_size == size for file, size in files.items())


def _reason(failure: BaseException) -> str:
    """The first cause a person can act on."""
    if isinstance(failure, dcp.CheckpointException):
        failure = next(iter(failure.failures.values()))[0]
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return f"{type(failure).__name__}: {failure}"
