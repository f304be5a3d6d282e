"""What the library uses of torch's private parts: all in one file, and what each is used for still holds."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from lycoris.ops import torch_private

SOURCE = Path(torch_private.__file__).parent
PRIVATE = re.compile(r"torch\._C\b|\btorch(\.\w+)*\._[a-z]\w*\(|_execution_engine|from torch[\w.]* import [^\n]*\b_\w")
USED = {
    "_CheckpointFrame",
    "_current_autograd_node",
    "_current_graph_task_id",
    "_execution_engine.queue_callback",
    "_get_sequence_nr",
    "_is_mkldnn_bf16_supported",
    "_pop_saved_tensors_default_hooks",
    "_push_saved_tensors_default_hooks",
    "_top_saved_tensors_default_hooks",
    "_unsafe_view",
    "DisableTorchFunctionSubclass",
}


def test_no_other_file_uses_private_parts_of_torch() -> None:
    found = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"torch_private.py"}


def test_these_are_all() -> None:
    source = Path(torch_private.__file__).read_text()
    direct = r"(?:_C\.(?:_autograd\.)?|Variable\.|checkpoint import |aten\.)([\w.]+)$"
    used = re.findall(direct, source, re.MULTILINE) + re.findall(r'getattr\(torch[\w.]*, "(\w+)"', source)
    assert set(used) == USED
    assert len(used) == len(USED)


def test_what_they_say() -> None:
    x = torch.ones(2, requires_grad=True)
    seen = []

    def region(x: torch.Tensor) -> torch.Tensor:
        hooks = torch_private.top_saved_tensors_hooks(True)
        frames = [cell.cell_contents for cell in hooks[0].__closure__]
        seen.append((torch_private.current_graph_task(), torch_private.current_node(), frames))
        return x.exp()

    before = torch_private.sequence_number()
    y = checkpoint(region, x, use_reentrant=False)
    assert torch_private.sequence_number() > before
    assert torch_private.top_saved_tensors_hooks(True) is None
    ended = []
    y.register_hook(lambda _: torch_private.queue_callback(lambda: ended.append(torch_private.current_node())))
    y.sum().backward()
    (task, node, frames), (again, node_again, _) = seen
    assert (task, node, ended) == (-1, None, [None])
    assert any(isinstance(frame, torch_private.CheckpointFrame) for frame in frames)
    assert again != -1
    assert node_again is not None
